"""Twin runs of live operations: nbdq on one copy of a chain, QEMU's storage daemon on another, the same for both.

Guests write to both over NBD, administrators snapshot, commit, stream, resize and track them over QMP; a round ends
with both servers stopped, one image amended live by nbdq and the other by qemu-img. Then QEMU says whether they
still are the same chain: contents of every layer and of every internal snapshot, names of backing files, ``map``,
bitmaps, and ``check``, which may not even find leaks. Then they change places. To run for long:

    .venv/bin/python -m tests.random.live_twins --seed 1 --runs 500

It prints each failure with the fewest actions that show it, and figures at the end.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nbdq.admin.client import AdminError
from tests.random.chains import random_chain
from tests.random.live_actions import ACTIONS, WEIGHTS, Action, QemuFailed, Twins, can_grow, compat, facts
from tests.random.live_judge import judge
from tests.support.images import Variant, build
from tests.support.scratch import scratch
from tests.support.tools import execute

#: The status of timeout(1) when it had to end something.
_TIMED_OUT = 124
Rounds = Sequence[Sequence[Action]]


def live_chain(seed: int) -> Variant:
    """The first of the random chains from ``seed`` on that has layers to operate on, and a disk to write to."""
    chains = (random_chain(seed * 1000 + number) for number in range(1000))
    return next(chain for chain in chains if 2 <= len(chain.layers) <= 4 and chain.layers[-1].format == "qcow2")


def random_rounds(seed: int, *, rounds: int, count: int) -> list[list[Action]]:
    """``rounds`` lists of ``count`` actions each, and an amendment: the same today and tomorrow."""
    random = Random(seed)

    def one(kind: str) -> Action:
        return Action(kind, random.randrange(1 << 32))

    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [
        [*map(one, random.choices(kinds, weights, k=count)), *([one("amend")] if random.random() < 0.5 else [])]
        for _ in range(rounds)
    ]


def make_twins(variant: Variant, directory: Path) -> Twins:
    """The chain, twice: names in headers may be whole paths, so that a copy will not do."""
    images = []
    for name in ("one", "two"):
        (directory / name).mkdir()
        images.append(build(variant, directory / name))
    return Twins(*images)


def play_twins(twins: Twins, rounds: Rounds) -> None:
    """Play all actions; after each round, judge, and let nbdq go on with what QEMU left behind, and QEMU with nbdq's.

    Raises:
        AssertionError: the twins differ, or one of them is damaged.
    """
    for actions in rounds:
        amendments: list[tuple[_Amendment, str | None]] = []
        formats = [facts(path)["format"] if path.suffix != ".raw" else "raw" for path in twins.ours.paths]
        with ExitStack() as stack:
            for side, image in zip(twins.sides, (twins.ours, twins.theirs), strict=True):
                stack.enter_context(side.serving(image.paths, formats, image.options))
            for action in actions:
                twins.say(f"  {action}")
                random = Random(action.seed)
                if action.kind != "amend":
                    ACTIONS[action.kind](twins, random)
                elif (amendment := _amendment(twins, random)) is not None:
                    amendments.append((amendment, amendment.live(twins)))
        for amendment, refusal in amendments:
            theirs = amendment.offline(twins)
            twins.say(f"    {amendment} → {refusal or 'done'} | {theirs or 'done'}")
            assert (refusal is None) == (theirs is None), f"amend: nbdq: {refusal}; QEMU: {theirs}"
        judge(twins)
        twins.ours, twins.theirs = twins.theirs, twins.ours


@dataclass(frozen=True)
class _Amendment:
    """Another version, width of refcounts or size of the top: live by nbdq, while nobody serves it by qemu-img."""

    options: dict[str, int | str | bool]

    def live(self, twins: Twins) -> str | None:
        """Why nbdq refuses; None if it did it."""
        try:
            twins.sides[0].run_job("x-nbdq-amend", device="disk", **self.options)
        except AdminError as error:
            return str(error)
        return None

    def offline(self, twins: Twins) -> str | None:
        """Why qemu-img refuses."""
        options = ",".join(
            f"{key}={value}".replace("True", "on").replace("False", "off") for key, value in self.options.items()
        )
        top = twins.theirs.top
        # Some changes of the width of refcounts never end in QEMU 7.2.
        done = execute("timeout", "10", "qemu-img", "amend", "-q", "-f", "qcow2", "-o", options, top, cwd=top.parent)
        if done.returncode == _TIMED_OUT:
            raise QemuFailed(f"amend -o {options} does not end")
        return done.stderr.strip() if done.returncode else None


def _amendment(twins: Twins, random: Random) -> _Amendment | None:
    """Something that both can do with the top; None if it is raw."""
    top = twins.facts()
    if top["format"] != "qcow2":
        return None
    choices: list[dict[str, int | str | bool]] = [{"compat": "1.1"}]
    if can_grow(top):
        choices.append({"size": top["virtual-size"] + (1 << 20)})
    if compat(top) == "1.1":
        choices += [{"refcount_bits": random.choice((1, 8, 16, 64))}, {"lazy_refcounts": random.random() < 0.5}]
        # Bitmaps would be lost, which nbdq refuses and QEMU does.
        if not twins.sides[0]("x-nbdq-bitmap-list", node="disk"):
            choices.append({"compat": "0.10"})
    chosen = random.choice(choices)
    if "size" in chosen:
        twins.excuse_end(top)
    return _Amendment(chosen)


def failure(seed: int, rounds: Rounds) -> tuple[str, list[str]]:
    """Why the twins of ``seed`` differ after such rounds, and what happened; no reason if they do not."""
    with scratch() as directory:
        twins = make_twins(live_chain(seed), directory)
        try:
            play_twins(twins, rounds)
        except QemuFailed as error:
            action = next(line for line in reversed(twins.told) if line[:4].count(" ") == 2)
            print(f"seed {seed}: QEMU failed:{action}: {error}", file=sys.stderr)
        except AssertionError as error:
            return str(error) or traceback.format_exc(), twins.told
        except Exception:
            return traceback.format_exc(), twins.told
        return "", twins.told


def shrink(rounds: Rounds, fails: Callable[[Rounds], bool]) -> Rounds:
    """The fewest actions that still fail, found by leaving out one after the other, from the last on."""
    found = [list(actions) for actions in rounds]
    for number in reversed(range(len(found))):
        for position in reversed(range(len(found[number]))):
            fewer = [list(actions) for actions in found]
            del fewer[number][position]
            if fails(fewer):
                found = fewer
    return found


def main() -> int:
    """Run twins as the command line says; 1 if any differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.random.live_twins")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--actions", type=int, default=15)
    parser.add_argument("--no-shrink", action="store_true", help="print failures as they are")
    words = parser.parse_args()
    failures: Counter[str] = Counter()
    done: Counter[str] = Counter()
    begun = time.monotonic()
    for seed in range(words.seed, words.seed + words.runs):
        rounds: Rounds = random_rounds(seed, rounds=words.rounds, count=words.actions)
        why, told = failure(seed, rounds)
        done.update(action.kind for actions in rounds for action in actions)
        if why:
            failures[why.splitlines()[0][:100]] += 1
            if not words.no_shrink:
                rounds = shrink(rounds, lambda fewer, seed=seed: bool(failure(seed, fewer)[0]))
                why, told = failure(seed, rounds)
            print(f"FAILED seed {seed}:", *live_chain(seed).layers, *told, why, sep="\n  ", flush=True)
    took = time.monotonic() - begun
    print(f"{words.runs} twins, {done.total()} actions ({dict(done)}), {failures.total()} failures, {took:.0f} s")
    print(*(f"  {count} × {why}" for why, count in failures.most_common()), sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
