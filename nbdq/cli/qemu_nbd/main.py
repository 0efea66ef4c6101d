"""``nbdq-qemu-nbd``, from its command line to its exit status."""

import sys
from contextlib import suppress

from nbdq.cli.qemu_nbd.arguments import UsageError, parse
from nbdq.cli.qemu_nbd.usage import HELP, VERSION
from nbdq.errors import NbdqError, in_words


def main() -> None:
    """Be qemu-nbd. Errors are on stderr, as ``qemu-nbd: …``, with exit status 1."""
    try:
        status = _run(sys.argv[1:])
        sys.stdout.flush()
    except (NbdqError, OSError) as error:
        status = _fail(error)
    sys.exit(status)


def _run(words: list[str]) -> int:
    arguments = parse(words)
    if arguments.help or arguments.version:
        print(HELP if arguments.help else VERSION, end="")
    elif arguments.lists:
        from nbdq.cli.qemu_nbd.listing import print_exports  # the other half of the program

        print_exports(arguments)
    else:
        from nbdq.cli.qemu_nbd.serving import serve

        serve(arguments)
    return 0


def _fail(error: Exception) -> int:
    with suppress(OSError):
        print(f"qemu-nbd: {in_words(error)}", file=sys.stderr)
        if isinstance(error, UsageError):
            print("qemu-nbd: Try `qemu-nbd --help' for more information.", file=sys.stderr)
        sys.stderr.flush()
    return 1
