"""The configuration file of ``nbdq serve``: TOML, whose sections are the members of :class:`Settings`.

Everything that is wrong with it is found in one run, each problem with its place. Paths are relative to the working
directory of the server, as on the command line.
"""

import os
import tomllib
from collections import Counter
from collections.abc import Iterator

from nbdq.cli.serve.config_reader import Problems, place_of, read_table
from nbdq.cli.serve.settings import ExportSettings, Settings
from nbdq.errors import ExportError, in_words, printable
from nbdq.storage import FileStorage

_SIZE_MAX = 4 << 20


class ConfigError(ExportError):
    """The configuration cannot be used; nothing of it is."""

    def __init__(self, path: str, problems: list[str]) -> None:
        """``problems`` in the file at ``path``, one line each."""
        self.lines = [f"{printable(path, 1024)}: {problem}" for problem in problems]
        super().__init__("; ".join(self.lines))


def load_settings(path: str) -> Settings:
    """Read the file, and check what can be checked without opening an image.

    Raises:
        ConfigError: something is wrong with what it says.
        OSError: it cannot be read.
    """
    storage = FileStorage.open(path)
    try:
        text = storage.read(0, _SIZE_MAX + 1)
    finally:
        storage.close()
    problems = Problems()
    settings = None
    try:
        if len(text) > _SIZE_MAX:
            raise ExportError("the file is too large")
        settings = read_table(Settings, tomllib.loads(text.decode()), "", problems)
    except UnicodeDecodeError as error:
        problems.append(f"byte {error.start} is not UTF-8, which TOML is written in")
    except tomllib.TOMLDecodeError as error:
        problems.append(f'not TOML: {printable(str(error))}; strings and modes stand in quotes, as in "0660"')
    except (ValueError, RecursionError, ExportError) as error:
        problems.append(printable(str(error)))
    if settings is not None:
        problems += contradictions(settings)
    if settings is None or problems:
        raise ConfigError(path, problems)
    return settings


def where(number: int, export: ExportSettings) -> str:
    """What errors call an export of the file, which begins to count at 1."""
    return place_of("export", number, export.name or export.image)


def contradictions(settings: Settings) -> Iterator[str]:
    """What cannot be, taken together; and files that are not there."""
    exports = list(enumerate(settings.export, 1))
    if not exports and not settings.export_directory:
        yield "nothing is served; write [[export]] or [[export-directory]]"
    names = Counter(export.export_name for _, export in exports)
    defaults = [number for number, export in exports if export.default]
    for number, export in exports:
        if names[export.export_name] > 1:
            yield f"{where(number, export)}: another export has the name {printable(export.export_name)!r}, too"
        if export.default and len(defaults) > 1:
            yield f"{where(number, export)}: only one export can be the default"
        for path in (export.image, *(path for _, path in export.backing or ()), *export.allow_backing):
            if not _exists(path):
                yield f"{where(number, export)}: {printable(path, 1024)}: there is no such file"
    if defaults and "" in names:
        yield "an export has the empty name, which is what clients say who want the default; leave out default = true"
    for number, directory in enumerate(settings.export_directory, 1):
        place = place_of("export-directory", number, directory.path)
        if not os.path.isdir(directory.path):
            yield f"{place}: {printable(directory.path, 1024)}: there is no such directory"
    if settings.admin.volume_policy is not None and not _exists(settings.admin.volume_policy):
        yield f"admin: volume-policy: {printable(settings.admin.volume_policy, 1024)}: there is no such file"


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # whoever opens it can say what is the matter
    return True


def report(error: Exception) -> list[str]:
    """What to print of an error, one line for each problem."""
    return error.lines if isinstance(error, ConfigError) else [in_words(error)]
