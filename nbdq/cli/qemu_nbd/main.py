"""``nbdq-qemu-nbd``, from its command line to its exit status."""

import gc
import logging
import sys
from contextlib import suppress

from nbdq.cli.qemu_nbd.arguments import Arguments, UsageError, parse
from nbdq.cli.qemu_nbd.usage import HELP, VERSION
from nbdq.errors import ExportError, NbdqError, in_words


def main() -> None:
    """Be qemu-nbd. Errors are on stderr, as ``qemu-nbd: …``, with exit status 1."""
    try:
        _run(sys.argv[1:])
        sys.stdout.flush()
    except (NbdqError, OSError) as error:
        _fail(error)


def _run(words: list[str]) -> None:
    arguments = parse(words)
    if arguments.help or arguments.version:
        print(HELP if arguments.help else VERSION, end="")
    elif arguments.lists:
        from nbdq.cli.qemu_nbd.listing import print_exports  # the other half of the program

        print_exports(arguments)
    else:
        _serve(arguments)


def _serve(arguments: Arguments) -> None:
    """Listen, and only then load what makes a server, which takes longer than some callers wait until they connect."""
    from nbdq.cli.qemu_nbd.places import inherited_listener, listen
    from nbdq.cli.serve.detach import Background
    from nbdq.cli.serve.signals import StopSignals

    if arguments.selinux_label is not None:
        raise ExportError("SELinux support not enabled in this binary")
    logging.basicConfig(format="qemu-nbd: %(message)s", level=logging.WARNING)
    inherited = inherited_listener(arguments)
    background = Background() if arguments.fork else None
    with StopSignals() as signals:
        listeners = listen(arguments) if inherited is None else [inherited]
        try:
            gc.disable()  # what is imported stays; looking for garbage in it takes a tenth of the start-up time
            from nbdq.cli.qemu_nbd.serving import serve

            gc.enable()
            serve(arguments, listeners, background, signals)
        finally:
            for listener in listeners:
                listener.close()


def _fail(error: Exception) -> None:
    with suppress(OSError):
        print(f"qemu-nbd: {in_words(error)}", file=sys.stderr)
        if isinstance(error, UsageError):
            print("qemu-nbd: Try `qemu-nbd --help' for more information.", file=sys.stderr)
        sys.stderr.flush()
    sys.exit(1)
