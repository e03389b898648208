"""The exit statuses of `brokerctl`, one for each kind of failure.

No payload or key is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import IO, Any, Final

import click

from brokerd_client.errors import (
    Abandoned,
    AuthenticationError,
    BrokerdError,
    Closed,
    Disconnected,
    InDoubt,
    KeyRemoved,
    LocalError,
    NameTaken,
    Refused,
    TimedOut,
)

#: What the library's errors say of its arguments, and of which options that is true here.
OPTIONS: Final = (
    ("give key, key_file or", "give --key-file or"),
    ("the address is an argument, or BROKERD_ADDRESS", "give --address, or BROKERD_ADDRESS"),
    ("omit ssl, or give", "give"),
    ("leave out tls:// or ssl=False", "leave out tls://"),
)

__all__ = ["OPTIONS", "Failure", "Status", "ended_by_ctrl_c", "failure_of", "is_turned_away"]


class Status(IntEnum):
    """The outcomes that a script can distinguish."""

    DONE = 0
    """The command has done its work."""
    REFUSED = 1
    """The broker or the other client refused; the message names it."""
    USAGE = 2
    """The command line, the key file or the address is wrong; nothing was sent."""
    TIMED_OUT = 3
    """The time limit was over first."""
    UNREACHABLE = 4
    """No broker answers at the address, or the connection ended."""
    IN_DOUBT = 5
    """The connection ended before the outcome was known."""
    CONFIG = 78
    """The configuration has mistakes, which are listed; nothing was changed."""
    INTERRUPTED = 130
    """Ctrl-C came before the command was done; shells use this number too."""


class Failure(click.ClickException):
    """The failure of a command, with its exit status."""

    def __init__(self, status: Status, message: str) -> None:
        for argument, option in OPTIONS:
            message = message.replace(argument, option)
        super().__init__(message)
        self.exit_code = int(status)  # type: ignore[misc]  # click calls it a class's, and reads it from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the reason in one line on standard error."""
        click.echo(f"brokerctl: {self.format_message()}", file=file or sys.stderr)


@contextmanager
def ended_by_ctrl_c(is_the_end: bool) -> Iterator[None]:
    """Treat Ctrl-C in the block as success if it is the expected end; else re-raise it."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_the_end:
            raise


def is_turned_away(error: BrokerdError) -> bool:
    """Return whether the broker has closed the connection to reject this client."""
    return isinstance(error, Disconnected) and isinstance(error.__cause__, (NameTaken, KeyRemoved))


def failure_of(error: BrokerdError) -> Failure:
    """Return the failure that corresponds to an error of the library."""
    if isinstance(error, Abandoned):
        return Failure(Status.IN_DOUBT, f"{error.code}: {error}")
    if isinstance(error, Refused):
        return Failure(Status.REFUSED, f"{error.code}: {error}")
    if isinstance(error, AuthenticationError):
        return Failure(Status.REFUSED, f"not authenticated: {error}")
    if isinstance(error, LocalError):
        return Failure(Status.USAGE, str(error))
    if isinstance(error, TimedOut):
        return Failure(Status.TIMED_OUT, f"timed out: {error}")
    if isinstance(error, InDoubt):
        return Failure(Status.IN_DOUBT, f"in doubt: {error}")
    if is_turned_away(error):
        return Failure(Status.REFUSED, str(error))
    if isinstance(error, (Disconnected, Closed)):
        return Failure(Status.UNREACHABLE, str(error))
    # A peer that violates the protocol is not a broker.
    return Failure(Status.UNREACHABLE, f"no broker there: {error}")
