"""The command ``brokerd``: runs the broker, and has commands that need no running
broker.

Commands for a running broker belong to ``brokerctl``. Only ``check --against-running``
asks one too, as ``brokerctl`` does, and ``health`` waits for a challenge. A mistake in
a configuration gives a line on standard error and exit status 78, never a traceback.
Each command imports its modules when it is called, so that ``brokerd key`` does not
load an event loop.
"""

from __future__ import annotations

import math
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from brokerd import __version__
from brokerd._held_signals import release_signals
from brokerd.cli.startup import run
from brokerd.config.problems import EX_CONFIG
from brokerd.config.text_files import DEFAULT_CONFIG, IN_ENVIRON, VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from brokerd.config.model import Config

__all__ = ["DEFAULT_CONFIG", "main"]


class _Commands(click.Group):
    """The commands; a file in the place of a command gives an error with the right
    form.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command, as click does. Raises UsageError."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if not (args[0].endswith((".yaml", ".yml")) or Path(args[0]).is_file()):
                raise
            right = f"To run the broker with this file: brokerd --config {args[0]}"
            raise click.UsageError(f"{error.message} {right}", ctx) from None


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--config",
    envvar="BROKERD_CONFIG",
    default=DEFAULT_CONFIG,
    show_default=f"$BROKERD_CONFIG, else the text in ${VARIABLE}, else {DEFAULT_CONFIG}",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The configuration file.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, asked: _show_version(context) if asked else None,
    help="Show the version and the routing loop, and exit.",
)
@click.pass_context
def main(context: click.Context, config: Path) -> None:
    """Run the broker in the foreground; with a COMMAND, do that instead."""
    if context.invoked_subcommand is not None:
        # Signals were blocked for a broker, but none is started.
        release_signals()
    context.obj = _chosen(context, config)
    if context.invoked_subcommand is None:
        context.exit(run(context.obj))


def _show_version(context: click.Context) -> None:
    """Print the version, which routing loop runs, and why if it is the slow one."""
    from brokerd.core import WHY_SOURCES

    click.echo(f"brokerd, version {__version__}")
    click.echo(f"routing=python: {WHY_SOURCES}" if WHY_SOURCES else "routing=compiled")
    context.exit()


def _chosen(context: click.Context, config: Path) -> Path:
    """Return the configuration file by the options and the environment.

    For a text in the environment, return IN_ENVIRON.
    """
    source = context.get_parameter_source("config")
    if not os.environ.get(VARIABLE) or source is click.core.ParameterSource.COMMANDLINE:
        return config
    if source is click.core.ParameterSource.ENVIRONMENT:
        click.echo(
            f"BROKERD_CONFIG and {VARIABLE} are both set (keep one: a file, or the text itself)",
            err=True,
        )
        context.exit(EX_CONFIG)
    return Path(IN_ENVIRON)


@main.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--against-running", is_flag=True, help="Ask the running broker what a reload would change."
)
@click.option(
    "--json", "as_json", is_flag=True, help="With --against-running: print the answer as JSON."
)
@click.option(
    "--memory", is_flag=True, help="Show how much memory its limits allow at most, and for what."
)
@click.pass_context
def check(
    context: click.Context, file: Path | None, against_running: bool, as_json: bool, memory: bool
) -> None:
    """Check a configuration and everything it includes; change nothing.

    Each mistake is a line on standard error, and the exit status is then 78. No socket
    is opened, and nothing is written.

    With --against-running, the broker that runs with this configuration is asked what a
    reload would change. BROKERD_NAME, BROKERD_KEY_FILE and BROKERD_ADDRESS name the
    client that asks; without them, an administrator of the configuration does. The exit
    status is 0 only if the reload would work.
    """
    from brokerd.config.lint import lint_warnings
    from brokerd.config.load import load
    from brokerd.config.problems import ConfigError, one_line

    path = file if file is not None else context.obj
    try:
        config = load(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        context.exit(EX_CONFIG)
    if against_running:
        # The broker's answer includes the warnings.
        context.exit(_check_against_running(config, as_json))
    for warning in (*lint_warnings(config, datetime.now(UTC)), *_about_surroundings(config)):
        click.echo(f"warning: {warning}", err=True)
    clients, listeners = len(config.clients), len(config.listen)
    click.echo(
        one_line(
            f"{path}: ok, {clients} client{'' if clients == 1 else 's'}, "
            f"{listeners} listener{'' if listeners == 1 else 's'}"
        )
    )
    for where in _places(config):
        click.echo(one_line(f"  {where}"))
    for pattern in config.unmatched:
        click.echo(f"  {pattern}")
    if memory:
        from brokerd.config.memory_bound import memory_bound

        bound = memory_bound(config)
        for part, size in bound.parts().items():
            click.echo(f"{part:>18} {size / 2**20:12,.0f} MiB")
        click.echo(f"{'at most':>18} {bound.total / 2**20:12,.0f} MiB")


def _about_surroundings(config: Config) -> Iterator[str]:
    """Yield a warning for each thing on this machine that the broker could not use."""
    from brokerd.config.address_check import obstacle, overlapping
    from brokerd.config.problems import one_line
    from brokerd.config.service_user import is_for_service, unreadable_warnings

    yield from map(one_line, unreadable_warnings(config))
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    privileged = is_root and not is_for_service(config)
    places = [(entry.address, entry.source) for entry in config.listen]
    if config.monitor is not None:
        places.append((config.monitor.address, config.monitor.source))
    for number, (address, source) in enumerate(places):
        wrong = obstacle(address, privileged=privileged)
        if wrong:
            yield one_line(f"{source}: can't listen at {address}: {wrong}")
        for other, source_of_other in places[:number]:
            if overlapping(address, other):
                yield one_line(
                    f"{source}: can't listen at {address} and at {other}, given at"
                    f" {source_of_other}: one includes the other (keep one of them)"
                )


def _places(config: Config) -> Iterator[str]:
    """Yield a line for each address at which the broker will listen."""
    for entry in config.listen:
        address = entry.address
        if address.is_file:
            yield f"listens at {os.path.abspath(address.path)} (Unix socket, mode {entry.mode:04o})"  # noqa: PTH100
        elif address.family == "AF_UNIX":
            yield f"listens at {address} (Unix socket without a file)"
        elif address.family == "AF_PIPE":
            yield f"listens at {address} (named pipe)"
        else:
            yield f"listens at {address} ({'TLS' if entry.tls is not None else 'TCP'})"
    if config.monitor is not None:
        where = config.monitor.address
        yield f"monitor at {os.path.abspath(where.path) if where.is_file else where} (HTTP)"  # noqa: PTH100 - as above


def _check_against_running(config: Config, as_json: bool) -> int:
    """Print what a reload would change in the running broker; return the exit status."""
    from dataclasses import replace

    from brokerd.ctl.against_running import Administrator, ask_for_plan
    from brokerd.ctl.output import print_json
    from brokerd.ctl.plan import judge, plan_lines
    from brokerd.ctl.status import Failure

    now = datetime.now(UTC)
    admins = [client for client in config.clients.values() if client.admin]
    administrators = [
        Administrator(client.name, key)
        for client in admins
        for key in (
            [key.value for key in client.keys if key.valid_at(now)] if client.keys else [None]
        )
    ]
    try:
        addresses = [
            str(replace(entry.address, tls=entry.tls is not None)) for entry in config.listen
        ]
        answer = ask_for_plan(config.path, addresses, administrators, os.environ)
        if as_json:
            print_json(answer)
        else:
            for line in plan_lines(answer):
                click.echo(line)
        judge(answer)
    except Failure as failure:
        click.echo(f"brokerd: {failure.format_message()}", err=True)
        return failure.exit_code
    return 0


@main.command()
@click.option(
    "--address",
    metavar="ADDRESS",
    help="The address to check, by default one of the configuration.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, max=86400, min_open=True),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest time for the answer, in seconds.",
)
@click.pass_context
def health(context: click.Context, address: str | None, timeout: float) -> None:
    """Check that the running broker answers; needs no key.

    A broker is healthy if it challenges a new connection. The exit status is then 0,
    otherwise 1.
    """
    from brokerd.cli import health
    from brokerd.config.file_reader import Unreadable
    from brokerd.config.listen_addresses import Entrance, entrances
    from brokerd.config.problems import one_line
    from brokerd_client.address import parse
    from brokerd_client.errors import AddressError

    if math.isnan(timeout):  # FloatRange lets it pass.
        raise click.BadParameter("nan is not a number of seconds.", param_hint="'--timeout'")
    asked = ""
    try:
        if address is not None:
            where = parse(address)
            entrance = Entrance(where, where.tls)
        else:
            entrance = health.entrance_to_ask(entrances(str(context.obj), os.environ))
        asked = f"{entrance.address}: "
        took = health.probe(entrance, timeout)
    except AddressError as error:
        raise click.BadParameter(str(error), param_hint="--address") from None
    except (health.Unhealthy, Unreadable) as error:
        click.echo(one_line(f"unhealthy: {asked}{error}"), err=True)
        context.exit(1)
    click.echo(one_line(f"healthy: {asked}answered in {took * 1000:.1f} ms"))


@main.command()
@click.argument("name", required=False)
@click.option("--add", is_flag=True, help="Write the key to a file and make NAME a client with it.")
@click.option("--admin", is_flag=True, help="With --add: make NAME an administrator.")
@click.option("--remove", is_flag=True, help="Remove a client that --add has made, with its key.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --add and --remove: the configuration file.",
)
@click.pass_context
def key(
    context: click.Context,
    name: str | None,
    add: bool,
    admin: bool,
    remove: bool,
    config: Path | None,
) -> None:
    """Print a new key; with a client's NAME, also the YAML to paste.

    With --add, the key is not printed. It is written to keys/NAME beside the
    configuration, readable by its owner only. clients.d/NAME.yaml makes NAME a client
    with this key. Both files are written, or none; no file is overwritten. --remove
    removes both again. The running broker learns of either at its next reload.
    """
    from brokerd.config.key_files import new_key

    if name is not None:
        _check_name(name)
    if add and remove:
        raise click.UsageError("give --add or --remove")
    if admin and not add:
        raise click.UsageError("--admin is for --add NAME")
    if add or remove:
        if name is None:
            which = "--add needs the NAME of the new" if add else "--remove needs the NAME of the"
            raise click.UsageError(f"{which} client")
        file = context.obj if config is None else config
        context.exit(_add_client(name, file, admin=admin) if add else _remove_client(name, file))
    key = new_key()
    click.echo(key)
    if name is not None:
        click.echo(
            "\n# To write it to a file beside the configuration that only its owner can read:\n#  "
            f" (umask 077; mkdir -p keys; printf '%s\\n' {key} > keys/{name})\n# or, in a"
            " configuration that only its owner can read, give the key itself: key, not"
            f" key_file.\nclients:\n  {_quoted(name)}:\n    key_file: {_quoted(f'keys/{name}')}"
        )


def _add_client(name: str, config: Path, *, admin: bool) -> int:
    """Create a new client's files, print the next steps, and return the exit status."""
    from brokerd.cli.add_client import NotAdded, add_client
    from brokerd.cli.client_commands import command_of, reload_command
    from brokerd.config.load import load
    from brokerd.config.problems import ConfigError

    try:
        added = add_client(name, config, admin=admin)
        loaded = load(config)
    except ConfigError as error:
        click.echo(str(error), err=True)
        return EX_CONFIG
    except NotAdded as error:
        click.echo(f"brokerd: {error}", err=True)
        return 1
    click.echo(
        f"added client {name}: {added.entry}, with its key in {added.key}\n"
        f"Next: {reload_command(loaded, name, os.environ)}\n"
        "Then: give the key to the client; it connects with its name and the key:\n"
        f"  {command_of(loaded, name, added.key, 'ping')}"
    )
    return 0


def _remove_client(name: str, config: Path) -> int:
    """Remove a client's files, print the next step, and return the exit status."""
    from brokerd.cli.client_commands import reload_command
    from brokerd.cli.remove_client import NotRemoved, remove_client
    from brokerd.config.load import load
    from brokerd.config.problems import ConfigError

    try:
        removed = remove_client(name, config)
        loaded = load(config)
    except ConfigError as error:
        click.echo(str(error), err=True)
        return EX_CONFIG
    except NotRemoved as error:
        click.echo(f"brokerd: {error}", err=True)
        return 1
    click.echo(
        f"removed client {name}: {', '.join(map(str, removed.files))}\n"
        f"Next, to disconnect it: {reload_command(loaded, name, os.environ)}"
    )
    return 0


@main.group()
def store() -> None:
    """Check or copy the database of the mailboxes."""


_DIRECTORY = click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The directory of the database, by default the configuration's.",
)


@store.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@_DIRECTORY
@click.pass_context
def store_check(context: click.Context, file: Path | None, directory: Path | None) -> None:
    """Check the database of a stopped broker, or a backup; change nothing.

    Each problem is a line on standard error, and the exit status is then 1. FILE is a
    backup. For a running broker, make a backup, which is checked too.
    """
    from brokerd.cli.store_commands import check_at

    context.exit(check_at(file or directory or _store_directory(context)))


@store.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@_DIRECTORY
@click.pass_context
def store_backup(context: click.Context, file: Path, directory: Path | None) -> None:
    """Copy the database to FILE, while the broker runs; check the copy.

    To restore it: stop the broker, remove mailboxes.db-wal and mailboxes.state from its
    directory, put the copy there as mailboxes.db, and start the broker.
    """
    from brokerd.cli.store_commands import back_up_to

    context.exit(back_up_to(directory or _store_directory(context), file))


def _store_directory(context: click.Context) -> Path:
    """Return the directory of the configuration's store, or exit."""
    from brokerd.cli.store_commands import directory_of
    from brokerd.config.problems import ConfigError

    try:
        return directory_of(context.obj)
    except ConfigError as error:
        click.echo(str(error), err=True)
        context.exit(EX_CONFIG)


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors and other programs."""
    import json

    from brokerd.config.json_schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """Start a broker on a temporary socket and show three clients talking.

    Needs no configuration and leaves nothing behind.
    """
    from brokerd.cli.demo import run

    context.exit(run())


def _check_name(name: str) -> None:
    """Raise click's usage error if the text can't name a client."""
    from brokerd_client.errors import InvalidName
    from brokerd_client.wire import envelope

    try:
        envelope.check_name(name)
    except InvalidName as error:
        raise click.BadParameter(str(error), param_hint="NAME") from None


def _quoted(text: str) -> str:
    """Return the name or path for YAML, in quotes only if YAML would not read it as
    text.
    """
    import yaml

    return text if yaml.safe_load(text) == text else f'"{text}"'


if __name__ == "__main__":
    sys.exit(main())
