"""A directory whose files and names are recorded, and the states in which a power cut may leave it.

A name that was made, changed or removed is durable when the directory has been synced since; until then it may have
happened or not, but in order: a directory is a journal of its own. What a file holds is durable by its own sync only,
whatever becomes of its name.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nbdq.storage import FileStorage
from tests.crash.recorder import NEVER, Act, Entry, Recorder
from tests.crash.states import Timeline, choices, everything, materialise

#: What a directory holds.
Contents = dict[str, bytearray]


@dataclass(eq=False)
class NameAct:
    """File number ``file`` got the name ``name`` and lost the name ``gone``; None: none."""

    file: int
    gone: str | None
    name: str | None
    begun: int
    ended: int = NEVER

    def __str__(self) -> str:
        return f"file {self.file}: {self.gone or 'nothing'} becomes {self.name or 'nothing'} (begun {self.begun})"


class TreeRecorder(Recorder):
    """Records all files of one directory, those that come in while it is installed included."""

    def __init__(self, directory: Path, **options: Any) -> None:
        """``options`` are those of :class:`Recorder`."""
        paths = sorted(path for path in directory.iterdir() if path.is_file())
        super().__init__(paths, **options)
        self.directory = directory
        self.initial = [path.read_bytes() for path in paths]
        """By number of the file; new ones begin empty."""
        self.initial_names = {path.name: number for number, path in enumerate(paths)}
        self.name_acts: list[NameAct] = []
        self.directory_syncs: list[tuple[int, int]] = []
        self._names = dict(self.initial_names)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record what happens to files, and to names in the directory."""
        create, rename, unlink, fsync = FileStorage.create, os.rename, os.unlink, os.fsync

        def recorded_create(path: str, *, mode: int = 0o644) -> FileStorage:
            begun = self.tick()
            storage = create(path, mode=mode)
            if self._is_here(path):
                number = len(self.initial)
                self.initial.append(b"")
                self._numbers[storage.identity] = number
                self._note_name(NameAct(number, None, os.path.basename(path), begun))
            return storage

        def recorded_rename(source: str, target: str) -> None:
            begun = self.tick()
            rename(source, target)
            if self._is_here(target):
                gone, name = os.path.basename(source), os.path.basename(target)
                self._note_name(NameAct(self._names[gone], gone, name, begun))

        def recorded_unlink(path: str) -> None:
            begun = self.tick()
            unlink(path)
            if self._is_here(path):
                gone = os.path.basename(path)
                self._note_name(NameAct(self._names[gone], gone, None, begun))

        def recorded_fsync(descriptor: int) -> None:
            begun = self.tick()
            fsync(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(self.directory)):
                self._pause()
                self.directory_syncs.append((begun, self.tick()))

        with ExitStack() as stack:
            stack.enter_context(super().installed())
            stack.enter_context(patch.object(FileStorage, "create", recorded_create))
            stack.enter_context(patch.object(os, "rename", recorded_rename))
            stack.enter_context(patch.object(os, "unlink", recorded_unlink))
            stack.enter_context(patch.object(os, "fsync", recorded_fsync))
            yield

    def _is_here(self, path: str) -> bool:
        return os.path.realpath(os.path.dirname(path)) == os.path.realpath(self.directory)

    def _note_name(self, act: NameAct) -> None:
        _apply(self._names, act)
        self.name_acts.append(act)
        self._pause()
        act.ended = self.tick()


def _apply(names: dict[str, int], act: NameAct) -> None:
    if act.gone is not None:
        names.pop(act.gone, None)
    if act.name is not None:
        names[act.name] = act.file


@dataclass(frozen=True)
class TreeState:
    """One state of the directory."""

    contents: Contents
    story: Callable[[], str]
    """What is missing in it, in words."""


class TreeTimeline:
    """Goes through a recording once, from the first cut to the last."""

    def __init__(self, recorder: TreeRecorder) -> None:
        self._recorder = recorder
        self._files = Timeline(recorder.initial, recorder.entries)

    def cuts(self) -> list[tuple[int, Entry | NameAct]]:
        """Every moment at which more becomes possible, with what began then."""
        entries: Sequence[Entry | NameAct] = [entry for entry in self._recorder.entries if entry.act is not Act.SYNC]
        return [(act.begun, act) for act in (*entries, *self._recorder.name_acts)]

    def states(
        self, cut: int, newest: Entry | NameAct | None, generator: random.Random, *, count: int
    ) -> Iterator[TreeState]:
        """About ``count`` states of the moment ``cut``, which may not lie before the last one.

        With ``newest``, what began at that moment, it has happened in all of them at least in part.
        """
        recorder = self._recorder
        moment = self._files.at(cut)
        begun = sum(act.begun <= cut for act in recorder.name_acts)
        durable = sum(
            any(act.ended < sync and ended <= cut for sync, ended in recorder.directory_syncs)
            for act in recorder.name_acts
        )
        least = begun if isinstance(newest, NameAct) else durable
        entry = newest if isinstance(newest, Entry) else None
        for fates in choices(moment, entry, generator, count=count):
            files = materialise(moment, fates)
            happened: Sequence[int] = range(least, begun + 1)
            if len(happened) > 3:
                happened = sorted({least, begun, generator.choice(happened)})
            for number in happened:
                names = dict(recorder.initial_names)
                for act in recorder.name_acts[:number]:
                    _apply(names, act)

                def story(fates: Any = fates, number: int = number, names: Any = names) -> str:
                    lost = [
                        f"  {item} {'lost' if fate is None else f'has sectors {fate:b} (last first)'}"
                        for item, fate in zip(moment.pending, fates, strict=True)
                        if fate != everything(item)
                    ]
                    missing = [f"  {act}: not happened" for act in recorder.name_acts[number:begun]]
                    return "\n".join((f"  files: {names}", *lost, *missing))

                yield TreeState({name: files[file] for name, file in names.items()}, story)
