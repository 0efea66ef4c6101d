"""The options of ``nbdq serve`` that let administrators in."""

import grp
import os
import pwd
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Annotated, Any

import click

from nbdq.admin.monitor import Access
from nbdq.admin.policies import Policies
from nbdq.admin.service import Administration
from nbdq.admin.state import State, hold
from nbdq.cli.options import Mode, together
from nbdq.errors import ExportError, printable
from nbdq.server.listener import Listener, listen_unix


class _User(click.ParamType[int]):
    """A user's name or number."""

    name = "user"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else int(value) if value.isdigit() else pwd.getpwnam(value).pw_uid
        except KeyError:
            self.fail(f"there is no user {value!r}", param, ctx)


class _Group(click.ParamType[int]):
    """A group's name or number."""

    name = "group"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else int(value) if value.isdigit() else grp.getgrnam(value).gr_gid
        except KeyError:
            self.fail(f"there is no group {value!r}", param, ctx)


@dataclass(frozen=True)
class AdminSettings:
    """Who may administer, and what outlives the server."""

    socket: str | None = None
    """Path of a unix socket; nobody may without."""
    mode: Annotated[int, Mode()] = 0o600
    """File mode of the socket."""
    users: Annotated[tuple[int, ...], _User()] = ()
    """Who may, besides root and the user of the server."""
    group: Annotated[int, _Group()] | None = None
    """Of the socket; its members may if ``mode`` lets them in."""
    state: str | None = None
    """File that keeps which images are the tops of disks, and which jobs go on."""
    volume_policy: str | None = None
    """TOML file: what overlays look like in which directory, and which images are templates."""


#: The options that ``admin_settings`` takes.
administration_options = together(
    click.option("--admin", type=click.Path(), help="Let administrators in on this unix socket (nbdq ctl, QMP)."),
    click.option(
        "--admin-mode",
        type=Mode(),
        default="0600",
        show_default=True,
        help="File mode of the admin socket.",
    ),
    click.option(
        "--admin-user",
        "admin_users",
        type=_User(),
        multiple=True,
        help="A user who may administer, besides root and the user of the server; may be repeated.",
    ),
    click.option(
        "--admin-group",
        type=_Group(),
        help="The group of the admin socket; its members may administer if --admin-mode lets them in.",
    ),
    click.option(
        "--state",
        type=click.Path(dir_okay=False),
        help="Keep here which images are the tops of disks, and which jobs go on, for the next start.",
    ),
    click.option(
        "--volume-policy",
        type=click.Path(exists=True, dir_okay=False),
        help="TOML file: what overlays look like in which directory, and which images are templates.",
    ),
)


def admin_settings(
    *,
    admin: str | None,
    admin_mode: int,
    admin_users: tuple[int, ...],
    admin_group: int | None,
    state: str | None,
    volume_policy: str | None,
) -> AdminSettings:
    """What the options say."""
    return AdminSettings(admin, admin_mode, admin_users, admin_group, state, volume_policy)


def open_administration(settings: AdminSettings, listener: Listener | None = None) -> Administration:
    """Listen for administrators, if there are to be any, on the ``listener`` if it was opened for us, and read what the
    last server left behind.

    Raises:
        click.UsageError: there is a socket in the settings, and one that was opened for us, too; or that is on TCP.
        ExportError: the socket cannot be made.
        StateError, PolicyError, OSError: a file cannot be used.
    """
    policies = Policies() if settings.volume_policy is None else Policies.load(settings.volume_policy)
    access = Access(users=settings.users, groups=() if settings.group is None else (settings.group,))
    with ExitStack() as undo:
        held = None if settings.state is None else undo.enter_context(closing(hold(settings.state)))
        records = State(settings.state)
        if listener is not None:
            undo.enter_context(closing(listener))
            if settings.socket is not None or listener.path is None:
                text = "administrators come to the unix socket that socket activation names admin; leave out --admin"
                raise click.UsageError(text)
        elif settings.socket is not None:
            listener = undo.enter_context(closing(listen_unix(settings.socket, mode=settings.mode)))
            _give_to_group(settings.socket, settings.group)
        undo.pop_all()  # they are the administration's now
        return Administration(records, policies, listener, access, held=held)


def _give_to_group(path: str, group: int | None) -> None:
    if group is not None:
        try:
            os.chown(path, -1, group)
        except OSError as error:
            raise ExportError(f"cannot give {printable(path)} to group {group}: {error.strerror}") from None
