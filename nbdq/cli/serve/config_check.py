"""``nbdq serve --check-config``: what a start would refuse, found out without one.

Images are opened for reading, without locks, so that a server which is running does not mind; nothing is written, and
no listener is made. What only the moment of the start can show, such as a lock or a port that somebody else has, is not
looked at.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

from nbdq.admin.monitor import Access
from nbdq.admin.policies import Policies
from nbdq.admin.service import Administration
from nbdq.admin.state import State
from nbdq.chain.bitmaps import find_bitmaps
from nbdq.chain.clusters import ClusterCache
from nbdq.chain.live import LiveChain
from nbdq.chain.marker import check_not_committed, check_not_overlaid
from nbdq.chain.policy import Policy
from nbdq.cli.serve.reload import Catalogue
from nbdq.cli.serve.settings import ExportSettings, Settings
from nbdq.cli.serve.tls import open_tls
from nbdq.cli.serve.volumes import open_chain
from nbdq.errors import ExportError, NbdqError, in_words, printable
from nbdq.locks import Locking
from nbdq.qcow2.writing.prepare import check_sound
from nbdq.server.exports.export import Export


def problems_of(settings: Settings, *, of_file: bool) -> Iterator[tuple[str, bool]]:
    """What is wrong, one line each, and whether it stands in the way of a start for certain; an image of
    a directory does not."""
    try:
        policies = Policies() if settings.admin.volume_policy is None else Policies.load(settings.admin.volume_policy)
        administration = Administration(State(settings.admin.state), policies, None, Access())
    except (NbdqError, OSError) as error:
        yield f"admin: {in_words(error)}", True
        return
    try:
        places = [place.tls for place in settings.listen] or [None]
        open_tls(settings.tls, map(settings.tls.mode_of, places))
    except (NbdqError, OSError) as error:
        yield f"tls: {in_words(error)}", True
    for place, path in _paths_to_make(settings):
        if not os.path.isdir(directory := os.path.dirname(path) or "."):  # the service manager may make it
            yield f"{place}: {printable(path, 1024)}: there is no directory {printable(directory, 1024)} yet", False
        elif os.path.isdir(path) or not path:
            yield f"{place}: {printable(path, 1024)!r} is no name for a file", True
    try:
        wanted = Catalogue(of_file=of_file).wanted(settings)
    except (NbdqError, OSError) as error:
        yield f"export-directory: {in_words(error)}", True
        return
    clusters = ClusterCache(budget=0)
    names: set[str] = set()
    for number, each in enumerate(wanted, 1):
        try:
            _check_name(each.settings.export_name, names)
            _check_export(each.settings, f"disk {number}", administration, clusters)
        except (NbdqError, OSError) as error:
            yield str(each.failed(error)) if each.is_required else f"not offered: {in_words(error)}", each.is_required


def _paths_to_make(settings: Settings) -> Iterator[tuple[str, str]]:
    """What a start makes, and where the settings say so."""
    for number, listen in enumerate(settings.listen, 1):
        if listen.socket is not None:
            yield f"listen {number}", listen.socket
    for place, path in (
        ("admin", settings.admin.socket),
        ("metrics", settings.metrics.socket),
        ("pid-file", settings.server.pid_file),
    ):
        if path is not None:
            yield place, path


def _check_name(name: str, names: set[str]) -> None:
    """Refuse a name that is among ``names``, which it joins."""
    if name in names:
        raise ExportError(f"two exports are named {printable(name)!r}; give each a name of its own")
    names.add(name)


def _check_export(settings: ExportSettings, name: str, administration: Administration, clusters: ClusterCache) -> None:
    def top_of(name: str, image: str, *, format: str, policy: Policy) -> tuple[str, str, Policy]:
        unlocked = replace(policy, locking=Locking.OFF)
        return administration.top_of(name, image, format=format, policy=unlocked)

    reading = replace(settings, read_only=True, write_threshold=None)
    chain = open_chain(reading, name, identity=None, clusters=clusters, top_of=top_of, index_bytes=1)
    try:
        bitmaps = find_bitmaps(chain.device, settings.bitmaps)
        Export.make(settings.export_name, chain.device, description=settings.description, bitmaps={**bitmaps})
        if settings.writable:
            _check_writable(chain)
    finally:
        chain.close()


def _check_writable(chain: LiveChain) -> None:
    top, *below = chain.layers
    if not os.access(top.path, os.W_OK):
        raise ExportError(f"{printable(top.path, 1024)}: cannot be written to; export it read-only")
    if top.header is not None:
        check_sound(top.path, top.header)
        check_not_committed(top.storage, top.header, [layer.storage for layer in below])
        check_not_overlaid(top.storage, top.header, chain.policy)
