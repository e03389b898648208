"""The `brokerctl` command: the client and the address that every subcommand uses."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

import brokerd_client
from brokerd import __version__
from brokerd.config.admin_user import local_admin
from brokerd.config.text_files import DEFAULT_CONFIG, IN_ENVIRON, VARIABLE
from brokerd.ctl.status import Failure, Status, failure_of, is_turned_away
from brokerd.ctl.tls import context_of
from brokerd_client.errors import BrokerdError, Closed, Disconnected, TimedOut

__all__ = ["DEFAULT_TIMEOUT_S", "Access", "brokerctl", "connecting", "main"]

#: Limits each operation without a timeout of its own, in seconds.
DEFAULT_TIMEOUT_S: Final = 10.0
#: Limits the received messages that wait to be printed, in bytes per client. A single
#: message or answer may be four times as long.
_INBOX: Final = 64 * 2**20

_IDENTITY: Final = ("BROKERD_NAME", "BROKERD_KEY_FILE")

_Function = TypeVar("_Function", bound=Callable[..., Any])

_HELP = "Control and use a running broker."
_EPILOG = """\b
Exit status:
  0  done
  1  refused by the broker or by the other client
  2  the command line, the key file or the address is wrong
  3  timed out
  4  no broker could be reached, or the connection ended
  5  in doubt: the connection ended before the outcome was known
  78  the configuration has mistakes (reload)
  130  interrupted by Ctrl-C
"""


@dataclass(slots=True)
class Access:
    """The broker's address and the client's identity; None means: from the environment."""

    address: str | None = None
    name: str | None = None
    key_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    cert_key: str | None = None

    def connect(
        self, *, timeout: float = DEFAULT_TIMEOUT_S, reconnect: bool = False
    ) -> brokerd_client.Client:
        """Return a connected client. Raises Failure if no broker can be reached."""
        self._become_local_admin()
        # The command itself says why it ends, and `top` shows whether it is connected.
        logging.getLogger("brokerd_client.connection").setLevel(logging.ERROR)
        try:
            return brokerd_client.connect(
                self.address,
                self.name,
                key_file=self.key_file,
                timeout=timeout,
                reconnect=reconnect,
                inbox=_INBOX,
                ssl=context_of(self.address, self.ca, self.cert, self.cert_key),
            )
        except TimedOut as error:
            raise Failure(Status.UNREACHABLE, f"no broker answered: {error}") from error
        except (Disconnected, Closed) as error:
            if is_turned_away(error):
                raise
            raise Failure(Status.UNREACHABLE, f"no broker can be reached: {error}") from error
        except BrokerdError:
            raise
        except OSError as error:
            raise Failure(Status.UNREACHABLE, f"no broker can be reached: {error}") from error

    def _become_local_admin(self) -> None:
        """Without name and key, take those of this user in the broker's configuration."""
        given = (self.name, self.key_file, *map(os.environ.get, _IDENTITY))
        if any(given) or sys.platform == "win32":
            return
        file = os.environ.get("BROKERD_CONFIG") or DEFAULT_CONFIG
        if os.environ.get(VARIABLE) and not os.environ.get("BROKERD_CONFIG"):
            file = IN_ENVIRON
        admin = local_admin(file, os.environ, os.geteuid())
        if admin is not None:
            self.name = admin.name
            if not (self.address or os.environ.get("BROKERD_ADDRESS")):
                self.address = admin.socket


def _store(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        assert parameter.name is not None
        setattr(context.ensure_object(Access), parameter.name, value)


def _option(name: str, words: str, *, file: bool = False) -> Callable[[_Function], _Function]:
    return click.option(
        f"--{name}",
        type=click.Path(dir_okay=False) if file else None,
        help=f"{words}  [env: BROKERD_{name.upper().replace('-', '_')}]",
        expose_value=False,
        callback=_store,
    )


#: In reverse order, as decorators are applied.
_OPTIONS: Final = (
    _option("key-file", "The file that holds this client's key.", file=True),
    _option(
        "cert-key", "Over TLS, the private key of --cert, if it is in another file.", file=True
    ),
    _option("cert", "Over TLS, the certificate to show to the broker.", file=True),
    _option(
        "ca",
        "Over TLS, the CA certificates to trust; the system's list by default.",
        file=True,
    ),
    _option("name", "This client's name; by default, the broker finds it by the key."),
    _option("address", "HOST:PORT, [IPV6]:PORT, tls://HOST:PORT, a path or @ABSTRACT."),
)


def connecting(function: _Function) -> _Function:
    """Add the connection options to a command; they may precede or follow its name."""
    for option in _OPTIONS:
        function = option(function)
    return function


class _Group(click.Group):
    """A group that handles the library's errors for its commands."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn an error of the library into an exit status."""
        try:
            return super().invoke(ctx)
        except BrokerdError as error:
            raise failure_of(error) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(Status.INTERRUPTED) from None


@click.group(
    cls=_Group, help=_HELP, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="brokerctl")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as the commands' own --json.")
@connecting
@click.pass_context
def brokerctl(context: click.Context, as_json: bool) -> None:
    context.ensure_object(Access)
    if as_json:
        _give_json(context)


def _give_json(context: click.Context) -> None:
    """Turn on --json of the command that follows; one that prints nothing ignores it."""
    name = context.invoked_subcommand or ""
    if name == "completion":
        raise Failure(Status.USAGE, f"{name} prints no JSON: omit --json")
    context.default_map = {name: _with_json(brokerctl.commands[name])}


def _with_json(command: click.Command) -> dict[str, Any]:
    """Return the defaults that turn on --json of a command, or of those in a group."""
    if isinstance(command, click.Group):
        return {name: _with_json(each) for name, each in command.commands.items()}
    return {"as_json": True}


def main() -> None:
    """Run `brokerctl`."""
    brokerctl(prog_name="brokerctl")
