"""Damaged images on the command line: whatever is wrong is said in one line on stderr, with exit status 1."""

import json
import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.crafted import luks_image
from tests.hostile.mutations import Edit, Mutation, mutate
from tests.hostile.seeds import VARIANTS_TO_MUTATE, Seed, StoredFile, make_seed
from tests.support.cli import run_nbdq
from tests.support.serving import refusal, serve
from tests.support.tools import execute, requires

pytestmark = requires("qemu-img", "qemu-io")

_NAMES = ("zstd-mixed", "zlib-v2", "extended-l2-middle", "snapshots", "bitmaps-over-backing", "raw-base", "clusters-1k")
_EACH = 50
_VARIANTS = [variant for variant in VARIANTS_TO_MUTATE if variant.name in _NAMES]


class Damage:
    """One seed on disk, to be damaged in many ways, one after the other."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed
        self.top = Path(seed.directory) / seed.top

    def each(self) -> Iterator[Mutation]:
        """Do each mutation, until the next one is asked for."""
        for number in range(_EACH):
            mutation = mutate(self._seed, number, random_seed="command line")
            path, pristine = Path(self._seed.directory) / mutation.file, self._seed.files[mutation.file]
            mutation.apply(pristine).store(path)
            yield mutation
            pristine.store(path)


@pytest.fixture(params=_VARIANTS, ids=str)
def damage(request: pytest.FixtureRequest, tmp_path: Path) -> Damage:
    return Damage(make_seed(request.param, tmp_path))


def assert_one_line(stderr: str, context: object) -> None:
    """The whole of stderr is one line of ours."""
    lines = stderr.splitlines()
    assert len(lines) == 1, f"{context}: {stderr!r}"
    assert lines[0].startswith("nbdq: "), f"{context}: {stderr!r}"
    assert lines[0].isprintable(), f"{context}: {stderr!r}"


@pytest.mark.parametrize(
    "verb", [("map",), ("map", "--output=json"), ("info",), ("info", "--backing-chain", "--output=json")], ids=" ".join
)
def test_a_verb_works_or_says_in_one_line_why_not(verb: tuple[str, ...], damage: Damage) -> None:
    failed = 0
    for mutation in damage.each():
        result = run_nbdq(*verb, damage.top)  # which raises what nobody caught
        if result.exit_code:
            failed += 1
            assert result.exit_code == 1, mutation
            assert_one_line(result.stderr, mutation)
        elif "--output=json" in verb:
            assert json.loads(result.stdout), mutation
    assert 0 < failed < _EACH


def test_serve_refuses_in_one_line(damage: Damage) -> None:
    """What ``map`` cannot open; with an error in the tables only, an image is served."""
    tried = 0
    for mutation in damage.each():
        result = run_nbdq("map", damage.top)
        if result.exit_code and "guest offset" not in result.stderr and "File contains" not in result.stderr:
            assert_one_line(refusal(damage.top), mutation)
            tried += 1
            if tried == 2:
                break
    assert tried


def test_an_image_with_a_broken_table_is_served_around_it(damage: Damage) -> None:
    """The client gets EIO for what is broken, again and again, and the server ends as if nothing had been."""
    for mutation in damage.each():
        broken = re.search(r"guest offset (\d+)", run_nbdq("map", damage.top).stderr)
        if broken:
            with serve("-r", damage.top) as server:
                read = f"read -q {broken[1]} 512"
                done = execute("qemu-io", "-r", "-f", "raw", "-c", read, "-c", read, "-c", "length", server.uri())
            assert done.stdout.count("Input/output error") == 2, f"{mutation}: {done.stdout}{done.stderr}"
            assert "iB" in done.stdout, f"{mutation}: {done.stdout}"
            return
    pytest.fail("no damage of this kind")


def test_a_damaged_luks_header_is_described_or_refused_in_one_line(tmp_path: Path) -> None:
    """Of an encrypted image nbdq can only say what it is (Q73); that it is encrypted ends every other verb."""
    path = tmp_path / "luks.qcow2"
    image, header = luks_image()
    path.write_bytes(image)
    pristine = StoredFile.load(path)
    pointer = image.index(struct.pack(">Q", header))
    rng = random.Random("luks")
    failed = 0
    for _ in range(100):
        # Names, numbers and the first key slots; now and then the pointer to them.
        place = rng.choice((pointer, pointer + 8, *(header + offset for offset in range(0, 304, 4))))
        data = rng.choice((b"\0", b"\xff", b"-", b"\x1b", b"\x80", b"A")) * rng.choice((1, 4, 8, 40))
        recipe = Mutation("luks", 0, path.name, (), (Edit(place, data, "LUKS header"),))
        recipe.apply(pristine).store(path)
        for verb in (("info",), ("info", "--output=json")):
            result = run_nbdq(*verb, path)
            if result.exit_code:
                failed += 1
                assert_one_line(result.stderr, recipe)
            elif "--output=json" in verb:
                assert json.loads(result.stdout), recipe
        result = run_nbdq("map", path)
        assert result.exit_code == 1, recipe
        assert_one_line(result.stderr, recipe)
    assert 0 < failed < 200
