"""The states in which a power cut may leave the files of one operation that nobody else interferes with."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.crash.recorder import Act, Recorder
from tests.crash.states import Timeline, choices, materialise


def crash_states(
    paths: Sequence[Path], operate: Callable[[], object], *, seed: int, per_cut: int = 40
) -> Iterator[list[bytes]]:
    """Run ``operate``, then give each distinct state that a cut during it may leave: the contents of each of ``paths``.

    The first is what there was before, the last what there is afterwards. Where a moment has more than ``per_cut``
    states, those are chosen by ``seed``.
    """
    before = [path.read_bytes() for path in paths]
    recorder = Recorder(paths)
    with recorder.installed():
        operate()
    after = [path.read_bytes() for path in paths]
    generator = random.Random(seed)
    timeline = Timeline(before, recorder.entries)
    seen = {tuple(before), tuple(after)}
    yield before
    for entry in sorted(recorder.entries, key=lambda entry: entry.begun):
        if entry.act is Act.SYNC:
            continue
        moment = timeline.at(entry.begun)
        for fates in choices(moment, entry, generator, count=per_cut):
            state = [bytes(content) for content in materialise(moment, fates)]
            if tuple(state) not in seen:
                seen.add(tuple(state))
                yield state
    yield after
