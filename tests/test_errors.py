"""Errors are one line: what, where, how to mend it; and foreign text cannot forge another."""

import inspect
import unicodedata

import pytest

from nbdq import errors
from nbdq.errors import (
    CorruptImage,
    ExportError,
    ImageError,
    NbdqError,
    NotFound,
    OperationError,
    ProtocolError,
    in_words,
    printable,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain.qcow2", "plain.qcow2"),
        ("", ""),
        ("größe 大きさ", "größe 大きさ"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("\u202etxt.exe", r"\u202etxt.exe"),  # writes right to left
        ("\u2028", r"\u2028"),
        ("\x85", r"\x85"),  # a line end to str.splitlines
        ("\udcff", r"\udcff"),  # a byte of a file name that is not UTF-8
        (b"caf\xc3\xa9 \xff\n", r"café \xff\n"),
        (b"", ""),
    ],
)
def test_foreign_text_stays_on_its_line(text: str | bytes, shown: str) -> None:
    assert printable(text) == shown


def test_foreign_text_of_any_character_is_printable() -> None:
    for start in (0, 0x1000, 0x2000, 0xD000, 0xF000, 0x1D000, 0xE0000):  # where the odd ones live
        shown = printable("".join(map(chr, range(start, start + 0x1000))), limit=0x1000)
        assert len(shown.splitlines()) == 1
        assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in shown)
        shown.encode()


def test_foreign_text_is_cut_where_a_line_would_be_too_long() -> None:
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 200 + "…"
    assert printable(b"\xff" * 9, 8).endswith("…")
    assert len(printable("\n" * 10**6, 100)) == 201


def test_an_image_error_says_what_where_and_how_to_mend_it() -> None:
    error = CorruptImage("a\nb.qcow2", "the L1 table lies outside of the file", "restore it")
    assert str(error) == r"a\nb.qcow2: the L1 table lies outside of the file; restore it"
    assert (error.path, error.what, error.mend) == (
        *("a\nb.qcow2", "the L1 table lies outside of the file", "restore it"),
    )
    assert str(CorruptImage("disk", "broken")) == "disk: broken"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert errors.__doc__ is not None
    drawn = {line.strip("│├└─ ").split()[0] for line in errors.__doc__.splitlines() if line.startswith("    ")}
    assert drawn == {c.__name__ for c in classes}
    assert all(issubclass(c, NbdqError) for c in classes)
    others = (NbdqError, ProtocolError, ExportError, OperationError, NotFound)
    assert {c for c in classes if issubclass(c, ImageError)} == {c for c in classes if c not in others}


def test_an_error_of_the_system_names_the_file_if_it_is_known() -> None:
    assert in_words(OSError(5, "broken")) == "broken"
    assert in_words(OSError(5, "broken", "a\nb")) == r"a\nb: broken"
    assert in_words(OSError("only words")) == "only words"
    assert in_words(CorruptImage("disk", "broken")) == "disk: broken"
    assert not issubclass(NbdqError, OSError)
