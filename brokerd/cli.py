"""The command ``brokerd``: runs the broker, and what goes with it that needs no broker running.

What talks to a running broker is ``brokerctl``. A mistake in a configuration is a line on standard error and exit
status 78, never a traceback. Each command imports what it needs when it is called, so that ``brokerd key`` does
not wait for an event loop.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, cast

import click

from brokerd import __version__

__all__ = ["DEFAULT_CONFIG", "EX_CONFIG", "main"]

#: What is run when nothing else is said.
DEFAULT_CONFIG: Final = "/etc/brokerd/brokerd.yaml"
#: The exit status for a configuration that can't be used (sysexits.h).
EX_CONFIG: Final = 78
#: Bytes of a fresh key: as many as the digest it is used with has.
_KEY_SIZE: Final = 32


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    envvar="BROKERD_CONFIG",
    default=DEFAULT_CONFIG,
    show_default=f"$BROKERD_CONFIG, else {DEFAULT_CONFIG}",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The configuration.",
)
@click.version_option(__version__, prog_name="brokerd")
@click.pass_context
def main(context: click.Context, config: Path) -> None:
    """Run the broker in the foreground; with a COMMAND, do that instead."""
    context.obj = config
    if context.invoked_subcommand is None:
        context.exit(_run(config))


def _run(config: Path) -> int:
    """Run the broker until it is stopped; return the exit status."""
    _import_structlog_alone()
    from brokerd import process
    from brokerd.config.problems import ConfigError

    try:
        return process.run(config)
    except ConfigError as error:
        click.echo(str(error), err=True)
        return EX_CONFIG


def _import_structlog_alone() -> None:
    """Import structlog without rich, which it would load for tracebacks of a form that nothing here prints.

    That is a sixth of the time that it takes the daemon to accept connections.
    """
    modules = cast("dict[str, object]", sys.modules)
    if "rich" not in modules:
        # What is None there can't be imported: see importlib's "The module cache".
        modules["rich"] = None
        try:
            import structlog  # noqa: F401 - it is there when brokerd.logs asks for it
        finally:
            del modules["rich"]


@main.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.pass_context
def check(context: click.Context, file: Path | None) -> None:
    """Check a configuration and everything it includes; change nothing.

    Every mistake is a line on standard error, and the exit status is then 78. Opens no socket and writes nothing.
    """
    from brokerd.config.advice import advice
    from brokerd.config.load import load
    from brokerd.config.problems import ConfigError, one_line

    path = file if file is not None else context.obj
    try:
        config = load(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        context.exit(EX_CONFIG)
    for warning in advice(config, datetime.now(UTC)):
        click.echo(f"warning: {warning}", err=True)
    clients, listeners = len(config.clients), len(config.listen)
    click.echo(
        one_line(
            f"{path}: ok, {clients} client{'' if clients == 1 else 's'}, "
            f"{listeners} listener{'' if listeners == 1 else 's'}"
        )
    )


@main.command()
@click.argument("name", required=False)
def key(name: str | None) -> None:
    """Print a fresh key; with a client's NAME, also the YAML to paste."""
    import secrets

    if name is not None:
        _check_name(name)
    fresh = secrets.token_urlsafe(_KEY_SIZE)
    click.echo(fresh)
    if name is not None:
        click.echo(
            f"\n# To put it into a file beside the configuration that only its owner can read:\n"
            f"#   (umask 077; mkdir -p keys; printf '%s\\n' {fresh} > keys/{name})\n"
            f"# or, in a configuration that only its owner can read, give the key itself: key, not key_file.\n"
            f"clients:\n"
            f"  {_quoted(name)}:\n"
            f"    key_file: {_quoted(f'keys/{name}')}"
        )


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors and other checks."""
    import json

    from brokerd.config.model import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """Start a broker on a temporary socket and show three clients talking.

    Needs no configuration and leaves nothing behind.
    """
    from brokerd.demo import run

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
    """Return the name or path for YAML: in quotes only if YAML would take it for something other than text."""
    import yaml

    return text if yaml.safe_load(text) == text else f'"{text}"'


if __name__ == "__main__":
    sys.exit(main())
