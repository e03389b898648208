"""Commands that ask the broker itself, and completion.

The commands are clients, ping, stats, channels, can, disconnect, reload, upgrade, drain and
log-level. Each is an operation of ``$broker`` (docs/protocol.md, "Operations"). All but
clients and ping require ``admin: true``.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import click
from click.shell_completion import get_completion_class

import brokerd_client
from brokerd.ctl.command import DEFAULT_TIMEOUT_S, Access, brokerctl, connecting
from brokerd.ctl.keys import show_keys
from brokerd.ctl.names import complete_name
from brokerd.ctl.output import as_bytes, console, note, print_json, print_table, print_values, since
from brokerd.ctl.plan import judge, plan_lines
from brokerd.ctl.seconds import DAY_S, Seconds
from brokerd.ctl.status import Failure, Status, ended_by_ctrl_c

__all__ = ["COMMANDS"]

#: Limits an upgrade, in seconds: by then the new process has taken over or failed.
_UPGRADE_TIMEOUT_S: Final = 60.0

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_timeout = click.option(
    "--timeout",
    type=Seconds(min=0),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Time limit in seconds.",
)


@click.command()
@_as_json
@click.option(
    "--watch",
    is_flag=True,
    help="Keep printing clients that come online or go offline, until Ctrl-C.",
)
@click.option(
    "--keys", is_flag=True, help="List all clients' keys and their last use (administrators only)."
)
@connecting
@click.pass_obj
def clients(access: Access, as_json: bool, watch: bool, keys: bool) -> None:
    """List the clients that you may send to, and whether they are online."""
    if keys and watch:
        raise Failure(Status.USAGE, "--keys can't be watched: omit --watch")
    with access.connect() as client:
        if keys:
            show_keys(client.control("keys"), as_json)
            return
        if watch:
            with ended_by_ctrl_c(is_the_end=True):
                _watch(client, as_json)
            return
        infos = sorted(client.clients(), key=lambda info: info.name)
    if as_json:
        print_json(
            [{"name": info.name, "online": info.online, "since": info.since} for info in infos]
        )
    else:
        rows = [
            (info.name, "online" if info.online else "offline", since(info.since)) for info in infos
        ]
        print_table(("name", "", "since"), rows)


def _watch(client: brokerd_client.Client, as_json: bool) -> None:
    note("watching; Ctrl-C ends it")
    with client.watch_presence() as changes:
        for change in changes:
            if as_json:
                print_json({"name": change.name, "online": change.online})
            else:
                click.echo(f"{change.name}\t{'online' if change.online else 'offline'}")
            sys.stdout.flush()


@click.command()
@click.option(
    "--count", type=click.IntRange(min=1), default=1, show_default=True, help="Number of pings."
)
@click.option(
    "--interval",
    type=Seconds(min=0, max=DAY_S),
    default=1.0,
    show_default=True,
    help="Seconds between pings.",
)
@_as_json
@connecting
@click.pass_obj
def ping(access: Access, count: int, interval: float, as_json: bool) -> None:
    """Ask the broker for an answer, and print how long it took."""
    with access.connect() as client:
        for number in range(count):
            if number:
                time.sleep(interval)
            seconds = client.ping()
            if as_json:
                print_json({"seconds": seconds, "name": client.name})
            else:
                click.echo(f"{client.name}: {seconds * 1000:.3f} ms")


@click.command()
@_as_json
@_timeout
@connecting
@click.pass_obj
def stats(access: Access, as_json: bool, timeout: float) -> None:
    """Show the broker's counters."""
    with access.connect(timeout=timeout) as client:
        answer = client.control("stats", timeout=timeout)
    if as_json:
        print_json(answer)
    else:
        print_values(dict(_readable(answer)))


@click.command()
@_as_json
@_timeout
@connecting
@click.pass_obj
def channels(access: Access, as_json: bool, timeout: float) -> None:
    """List the open channels: their clients, since when, and the bytes each way."""
    with access.connect(timeout=timeout) as client:
        answer = client.control("channels", timeout=timeout)["channels"]
    if as_json:
        print_json(answer)
        return
    size = as_bytes if console.is_terminal else str
    rows = [
        (
            each["caller"],
            each["recipient"],
            since(each["since"]),
            size(each["bytes_to_recipient"]),
            size(each["bytes_to_caller"]),
            size(each["waiting_bytes"]),
        )
        for each in answer
    ]
    print_table(("caller", "recipient", "since", "sent", "received", "waiting"), rows)


def _readable(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return each counter with its name, in a readable unit."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _readable(value, f"{prefix}{key} ")
        elif key.endswith("_at") and isinstance(value, (int, float)):
            rows.append((prefix + key.replace("_", " "), since(value)))
        elif (
            (key.endswith("_bytes") or key.startswith("bytes_"))
            and isinstance(value, int)
            and console.is_terminal
        ):
            rows.append((prefix + key.replace("_", " "), as_bytes(value)))
        elif isinstance(value, bool):
            rows.append((prefix + key.replace("_", " "), "yes" if value else "no"))
        else:
            rows.append((prefix + key.replace("_", " "), str(value)))
    return rows


@click.command()
@click.argument("sender", shell_complete=complete_name)
@click.argument("verb", type=click.Choice(["send", "open", "publish", "subscribe"]))
@click.argument("target", shell_complete=complete_name)
@_as_json
@_timeout
@connecting
@click.pass_obj
def can(access: Access, sender: str, verb: str, target: str, as_json: bool, timeout: float) -> None:
    """Show whether a client may do something, and the rule that decides it.

    As in `can alice send bob`, `can alice open bob`, `can alice publish jobs.new`, `can
    alice subscribe 'jobs.>'`. The exit status is 1 if it may not.
    """
    with access.connect(timeout=timeout) as client:
        answer = client.control("can", timeout=timeout, sender=sender, verb=verb, target=target)
    if as_json:
        print_json(answer)
    else:
        where = f"  ({answer['where']})" if answer.get("where") else ""
        click.echo(f"{'yes' if answer['allowed'] else 'no'}: {answer.get('why', '')}{where}")
    if not answer["allowed"]:
        raise click.exceptions.Exit(Status.REFUSED)


@click.command()
@click.argument("whom", metavar="NAME|ADDRESS", shell_complete=complete_name)
@_as_json
@_timeout
@connecting
@click.pass_obj
def disconnect(access: Access, whom: str, as_json: bool, timeout: float) -> None:
    """End all connections and channels of a client, or the one connection whose address
    is NAME/INSTANCE.
    """
    with access.connect(timeout=timeout) as client:
        answer = client.control("disconnect", timeout=timeout, address=whom)
    if as_json:
        print_json(answer)
    else:
        for address in answer["disconnected"]:
            click.echo(f"disconnected {address}")
        if answer["channels"]:
            click.echo(f"closed channels: {answer['channels']}")


@click.command()
@click.option(
    "--dry-run",
    is_flag=True,
    help="Change nothing: show what would change, and whether it would work.",
)
@_as_json
@_timeout
@connecting
@click.pass_obj
def reload(access: Access, dry_run: bool, as_json: bool, timeout: float) -> None:
    """Make the broker read its configuration again; an invalid one changes nothing.

    Prints what changes: + is added, - is removed, ~ changes, ! needs attention. With
    mistakes in the configuration the exit status is 78. A dry run binds no address. So
    an address that another program uses is found only by the reload itself.
    """
    with access.connect(timeout=timeout) as client:
        answer = client.control("reload", timeout=timeout, dry_run=dry_run)
    if as_json:
        print_json(answer)
    else:
        for line in plan_lines(answer):
            click.echo(line)
        if answer["reloaded"]:
            click.echo("reloaded")
    judge(answer)


@click.command()
@_as_json
@click.option(
    "--timeout",
    type=Seconds(min=0),
    default=_UPGRADE_TIMEOUT_S,
    show_default=True,
    help="Time limit in seconds.",
)
@connecting
@click.pass_obj
def upgrade(access: Access, as_json: bool, timeout: float) -> None:
    """Replace the broker with the code and the configuration on disk; plain connections
    go on.

    Returns when the new process answers. If that can't take over, the old process goes
    on and gives the reason.
    """
    with access.connect() as client:
        answer = client.control("upgrade", timeout=timeout)
    if as_json:
        print_json(answer)
    elif answer["upgraded"]:
        count = answer["connections"]
        click.echo(
            f"upgraded to {answer['version']}, process {answer['pid']}: {count} "
            f"connection{'' if count == 1 else 's'} went on after {answer['pause_ms']} ms"
        )
    if not answer["upgraded"]:
        problems = "\n".join(answer["problems"])
        raise Failure(Status.REFUSED, f"the broker was not replaced:\n{problems}")


@click.command()
@_as_json
@_timeout
@connecting
@click.pass_obj
def drain(access: Access, as_json: bool, timeout: float) -> None:
    """Stop the broker gracefully: accept nothing new, deliver what waits, and exit.

    A service manager that listens for the broker starts it again at the next
    connection; then the command says so.
    """
    with access.connect(timeout=timeout) as client:
        answer = client.control("drain", timeout=timeout)
    if as_json:
        print_json(answer)
    else:
        click.echo("draining")
        if answer.get("activated"):
            addresses = ", ".join(answer["activated"])
            click.echo(
                f"the service manager still listens at {addresses}, and starts the broker again"
                " at the next connection (to keep it stopped:"
                " systemctl stop brokerd.socket brokerd.service)"
            )


@click.command("log-level")
@click.argument("area", required=False)
@click.argument("level", required=False)
@click.option(
    "--for",
    "for_",
    metavar="DURATION",
    help="How long, as in 10m; by default until the next reload.",
)
@_as_json
@_timeout
@connecting
@click.pass_obj
def log_level(
    access: Access,
    area: str | None,
    level: str | None,
    for_: str | None,
    as_json: bool,
    timeout: float,
) -> None:
    """Show the levels of the broker's log by area; with AREA and LEVEL, change one.

    As in `log-level client debug --for 10m`. AREA may be all; LEVEL may be default, for
    the configured level. A change ends at the next reload or restart.
    """
    if (area is None) != (level is None) or (area is None and for_ is not None):
        raise Failure(Status.USAGE, "give an area and a level, such as client debug; or neither")
    arguments = {"area": area, "level": level, "for": for_}
    with access.connect(timeout=timeout) as client:
        fields = {key: value for key, value in arguments.items() if value is not None}
        answer = client.control("log_level", timeout=timeout, **fields)
    if as_json:
        print_json(answer)
        return
    rows = []
    for name, state in answer["levels"].items():
        left = (
            f"for {state['seconds']:.0f} s more" if "seconds" in state else "until the next reload"
        )
        rows.append((name, state["level"], left if state["changed"] else ""))
    print_table(("area", "level", "changed"), rows)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script by which a shell completes this command.

    \b
    bash:  eval "$(brokerctl completion bash)"          in ~/.bashrc
    zsh:   eval "$(brokerctl completion zsh)"           in ~/.zshrc
    fish:  brokerctl completion fish > ~/.config/fish/completions/brokerctl.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise Failure(Status.USAGE, f"completion for {shell} is not available")
    click.echo(kind(brokerctl, {}, "brokerctl", "_BROKERCTL_COMPLETE").source())


COMMANDS: Final = (
    clients,
    ping,
    stats,
    channels,
    can,
    disconnect,
    reload,
    upgrade,
    drain,
    log_level,
    completion,
)
