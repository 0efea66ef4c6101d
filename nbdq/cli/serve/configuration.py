"""The options of ``nbdq serve`` that name what is served in other ways than image by image: a file, or directories."""

from typing import Any

import click

from nbdq.cli.options import together
from nbdq.cli.serve.settings import DirectorySettings

#: Options that may be given besides ``--config``: they are about this start, and the file has no words for them.
_BESIDES_CONFIG = {"config", "check_config", "persistent", "fork", "ready_fd", "run", "print_uri"}


#: ``config`` and ``check_config``, and the options that ``directories`` takes.
configuration_options = together(
    click.option(
        "--config",
        type=click.Path(dir_okay=False),
        help="Take everything from this TOML file, which is read again on SIGHUP.",
    ),
    click.option("--check-config", is_flag=True, help="Find out whether the server could start, and do not start it."),
    click.option(
        "--export-dir",
        "export_dirs",
        type=click.Path(),
        multiple=True,
        help="Serve each image in this directory under the name of its file, read-only; may be repeated.",
    ),
    click.option(
        "--export-dir-raw",
        "raw_suffixes",
        multiple=True,
        metavar="SUFFIX",
        help="Files there whose names end like this, such as .img, are raw images; may be repeated.",
    ),
    click.option(
        "--export-dir-writable",
        "dirs_writable",
        is_flag=True,
        help="Let clients write to images there that no other image there lies over.",
    ),
    click.option(
        "--rescan",
        type=click.FloatRange(min=0),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="How often to look at these directories; 0: only on SIGHUP.",
    ),
)

#: Options that say how something is to be that another option asks for.
_MEAN_NOTHING_WITHOUT = {
    "socket_mode": "socket",
    "admin_mode": "admin",
    "metrics_mode": "metrics",
    "raw_suffixes": "export_dirs",
    "dirs_writable": "export_dirs",
    "rescan": "export_dirs",
}


def directories(
    export_dirs: tuple[str, ...],
    raw_suffixes: tuple[str, ...],
    dirs_writable: bool,
    rescan: float,
    read_only: bool,
    offer: dict[str, Any],
) -> tuple[DirectorySettings, ...]:
    """What is served of directories; ``offer``, members of :class:`~nbdq.cli.serve.settings.Offer`, is for all."""
    return tuple(
        DirectorySettings(
            path=path,
            raw=raw_suffixes,
            read_only=read_only or not dirs_writable,
            rescan_seconds=rescan,
            **offer,
        )
        for path in export_dirs
    )


def refuse_besides_config(context: click.Context) -> None:
    """Make sure that what the file says is not said in other ways, too.

    Raises:
        click.UsageError: it is.
    """
    for parameter in context.command.params:
        assert parameter.name is not None
        source = context.get_parameter_source(parameter.name)
        if parameter.name not in _BESIDES_CONFIG and source is not click.core.ParameterSource.DEFAULT:
            name = parameter.opts[0] if isinstance(parameter, click.Option) else "IMAGE"
            raise click.UsageError(f"{name} cannot be given besides --config; write it in the file")


def refuse_what_means_nothing(context: click.Context) -> None:
    """Make sure that whoever types an option gets what it is about. In the environment it may be for other servers.

    Raises:
        click.UsageError: the option that it is about is missing.
    """
    names = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    for option, other in _MEAN_NOTHING_WITHOUT.items():
        if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE and not context.params[other]:
            raise click.UsageError(f"{names[option]} means nothing without {names[other]}; give that, too")
