"""How far a command is, shown as qemu-img does it with ``-p``."""

import click

from nbdq.ops.control import Control


class ShownControl(Control):
    """A control that shows its progress on one line."""

    def __init__(self, *, speed: int = 0) -> None:
        """``speed`` as for :class:`Control`."""
        super().__init__(speed=speed)
        self._last = ""
        self._show()

    def advance(self, length: int = 0, *, cost: int | None = None) -> None:
        super().advance(length, cost=cost)
        self._show()

    def _show(self) -> None:
        text = f"    ({min(self.done / self.total, 1) * 100 if self.total else 0:.2f}/100%)\r"
        if text != self._last:
            click.echo(text, nl=False)
            self._last = text

    def end(self) -> None:
        """Everything is done."""
        click.echo("    (100.00/100%)\r")
