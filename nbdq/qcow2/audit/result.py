"""What a check of one image found, in qemu-img's terms (qcow2.md 4.3)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

#: Lines of :attr:`CheckResult.findings`; a hostile image has a fault in every entry.
MAX_FINDINGS = 1000


@dataclass
class CheckResult:
    """Counts of what is wrong, each with a line that says where as long as there is room, and statistics."""

    total_clusters: int = 0
    """Of the guest disk."""
    corruptions: int = 0
    copied_errors: int = 0
    """Those of the corruptions that are only a wrong COPIED bit."""
    leaks: int = 0
    check_errors: int = 0
    """What could not be checked at all."""
    allocated_clusters: int = 0
    """Guest clusters with a place in a file, the compressed ones too."""
    fragmented_clusters: int = 0
    """Those that do not follow the one before, by QEMU's definition all compressed ones."""
    compressed_clusters: int = 0
    image_end_offset: int = 0
    """Where the last host cluster that is referenced or has a refcount ends, in bytes of the file."""
    rebuild_needed: bool = False
    """The refcount structures cannot be mended in place."""
    cut_off: bool = False
    """Something points past the end of the file: what the refcounts there say may well be right."""
    incomplete: bool = False
    """Some references could not be counted: what looks leaked may be in use."""
    findings: list[str] = field(default_factory=list)
    omitted: int = 0
    """Findings for which there was no room."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong at all."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def corrupt(self, text: str, count: int = 1) -> None:
        """Note ``count`` corruptions, which one line describes."""
        self.corruptions += count
        self._note(text, 1)

    def corrupt_each(self, count: int, texts: Iterable[str]) -> None:
        """Note ``count`` corruptions with a line for some of them; ``texts`` is read as far as there is room."""
        if count:
            self.corruptions += count
            self._note_each(count, texts)

    def leak_each(self, count: int, texts: Iterable[str]) -> None:
        """The same for leaked clusters."""
        if count:
            self.leaks += count
            self._note_each(count, texts)

    def past_end_each(self, count: int, texts: Iterable[str]) -> None:
        """Note ``count`` corruptions that are references to places past the end of the file."""
        if count:
            self.cut_off = True
            self.corrupt_each(count, (f"{text} is past the end of the file" for text in texts))

    def fail(self, text: str, count: int = 1) -> None:
        """Note something that could not be checked."""
        self.check_errors += count
        self._note(text, 1)

    def _note_each(self, count: int, texts: Iterable[str]) -> None:
        source: Iterator[str] = iter(texts)
        while count and len(self.findings) < MAX_FINDINGS:
            text = next(source, None)
            if text is None:
                return
            self.findings.append(text)
            count -= 1
        self.omitted += count

    def _note(self, text: str, count: int) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(text)
        else:
            self.omitted += count
