"""What clients learn of exports, where the handshake finds them, and what it leads to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdq.errors import ExportError, printable
from nbdq.nbd.constants import DEFAULT_PAYLOAD, MAXIMUM_PAYLOAD, MAXIMUM_STRING, TransmissionFlag


@dataclass(frozen=True)
class ExportInfo:
    """What a client learns of an export.

    Raises:
        ExportError: a text or number that the protocol cannot carry or that a client would refuse.
    """

    name: str
    size: int
    """Bytes."""
    flags: TransmissionFlag
    """Without SEND_DF, which follows from structured replies."""
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = DEFAULT_PAYLOAD
    """Bytes; READ and WRITE payloads beyond are refused (P128)."""
    contexts: tuple[str, ...] = ()
    """Names of the metadata contexts on offer; the position of a name is its context id."""
    passing_contexts: tuple[str, ...] = ()
    """Further ones, of which the same name may mean something else when there are others; their ids follow."""
    hidden_contexts: tuple[str, ...] = ()
    """Further ones of that kind, which are there for who asks for them by name; their ids follow."""
    wide_contexts: frozenset[str] = frozenset()
    """Those of all these whose flags need 64 bits, so that only extended headers can carry them."""

    def __post_init__(self) -> None:
        assert TransmissionFlag.SEND_DF not in self.flags
        for text in (self.name, self.description, *self._all_contexts):
            self._check_text(text)
        if not 0 <= self.size < 1 << 63:
            raise ExportError(f"export {printable(self.name)}: a size of {self.size} bytes is not within 0 … 2^63 - 1")
        self._check_blocks()

    def _check_text(self, text: str) -> None:
        """P2: UTF-8, no NUL, bounded."""
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise ExportError(f"export {printable(self.name)}: {printable(text)!r} is not valid Unicode") from None
        if length > MAXIMUM_STRING or "\0" in text:
            raise ExportError(
                f"export {printable(self.name)}: {printable(text)!r} has {length} bytes; "
                f"names and descriptions have at most {MAXIMUM_STRING} and no NUL"
            )

    def _check_blocks(self) -> None:
        """P126: what QEMU's client insists on, and no more than we can consume."""
        minimum, preferred, maximum = self.minimum_block, self.preferred_block, self.maximum_block
        powers = all(size > 0 and size & (size - 1) == 0 for size in (minimum, preferred))
        ordered = minimum <= 64 << 10 and max(512, minimum) <= preferred <= maximum <= MAXIMUM_PAYLOAD
        if not powers or not ordered or maximum % minimum:
            raise ExportError(
                f"export {printable(self.name)}: block sizes {minimum}, {preferred}, {maximum} must ascend; minimum "
                f"a power of two to 64 KiB, preferred a power of two from 512, maximum a multiple of the minimum to "
                f"{MAXIMUM_PAYLOAD >> 20} MiB"
            )

    @property
    def _all_contexts(self) -> tuple[str, ...]:
        return (*self.contexts, *self.passing_contexts, *self.hidden_contexts)

    def contexts_for(self, queries: Sequence[str], *, extended: bool) -> tuple[tuple[int, str], ...]:
        """(id, name) of every context that ``queries`` name in full and that the client's headers can carry (P44)."""
        wanted = set(queries) if extended else set(queries) - self.wide_contexts
        return tuple((number, name) for number, name in enumerate(self._all_contexts) if name in wanted)

    def still_offered(self, selected: Iterable[tuple[int, str]], before: "ExportInfo") -> tuple[tuple[int, str], ...]:
        """Those of the contexts ``selected`` when the export was ``before`` that mean the same now."""
        offered = set(enumerate(self._all_contexts))
        if (before.passing_contexts, before.hidden_contexts) != (self.passing_contexts, self.hidden_contexts):
            offered = set(enumerate(self.contexts))
        return tuple(context for context in selected if context in offered)

    def wire_flags(self, *, structured: bool, status_payload: bool = False) -> TransmissionFlag:
        """The transmission flags as a client sees them (1.6): DF exactly when structured replies are agreed,
        BLOCK_STATUS_PAYLOAD with ``status_payload``, for one with extended headers that has selected contexts."""
        flags = self.flags | TransmissionFlag.HAS_FLAGS
        if structured:
            flags |= TransmissionFlag.SEND_DF
        return flags | TransmissionFlag.BLOCK_STATUS_PAYLOAD if status_payload else flags


class ExportDirectory(Protocol):
    """Where the handshake looks exports up. Neither call may block or open anything (R-07, P36)."""

    def list(self) -> Sequence[ExportInfo]:
        """The exports that a client may see (P32)."""
        ...

    def find(self, name: str) -> ExportInfo | None:
        """The export of exactly that name; the empty name asks for the default export (P31).

        Raises:
            OptionRefused: there is one, but not for this client, or not now (P37).
        """
        ...

    def check_room_for_tls(self) -> None:
        """
        Raises:
            OptionRefused: not for one more client.
        """
        ...


@dataclass(frozen=True)
class Negotiated:
    """What the two sides agreed on; it holds for the whole transmission phase."""

    export: ExportInfo
    structured: bool
    contexts: tuple[tuple[int, str], ...]
    """(id, name) of every selected metadata context; not empty only with structured replies."""
    extended: bool = False
    """Requests and replies have extended headers; then ``structured`` is set, too."""

    @property
    def flags(self) -> TransmissionFlag:
        """The transmission flags that the client was told."""
        status_payload = self.extended and bool(self.contexts)
        return self.export.wire_flags(structured=self.structured, status_payload=status_payload)
