"""``nbdq-qemu-nbd``: nbdq under the command line of qemu-nbd, for programs that start qemu-nbd (nbd.md 5.6).

Options, defaults, exit statuses and messages are qemu-nbd's; ``docs/drop-in.md`` says what differs, and why.
"""
