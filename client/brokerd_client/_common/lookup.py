"""Look-up of a host name's addresses in a thread of its own.

So a slow look-up does not delay anything else. The system offers no way to cancel a
look-up. The thread is therefore a daemon thread, and ends with its look-up.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Union

__all__ = ["Candidate", "Lookup", "numeric"]

#: An address family, and an address of it in the form that the socket module takes.
Candidate = tuple[int, Union[tuple[object, ...], str]]


class Lookup:
    """A running look-up.

    on_done: called in the look-up's thread when the look-up is done.
    """

    def __init__(self, host: str, port: int, on_done: Callable[[], object]) -> None:
        self._host = host
        self._port = port
        self._on_done = on_done
        self._result: list[Candidate] | Exception | None = None
        try:
            threading.Thread(target=self._run, name="brokerd look-up", daemon=True).start()
        except RuntimeError as error:
            # The system has no more threads.
            raise OSError(str(error)) from error

    @property
    def done(self) -> bool:
        """Whether the look-up has ended, with addresses or an error."""
        return self._result is not None

    def result(self) -> list[Candidate]:
        """Return the addresses.

        Raises BlockingIOError before the look-up has ended, OSError if it found no
        address.
        """
        if self._result is None:
            raise BlockingIOError(f"the look-up of {self._host} is under way")
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def _run(self) -> None:
        try:
            self._result = _getaddrinfo(self._host, self._port, 0)
        except OSError as error:
            self._result = error
        except Exception as error:  # noqa: BLE001 - a name that the idna codec refuses, for example
            self._result = OSError(f"{self._host} is not a valid host name: {error}")
        self._on_done()


def numeric(host: str, port: int) -> list[Candidate] | None:
    """Return the address if ``host`` is an IP address; None if it is a name to look up."""
    try:
        return _getaddrinfo(host, port, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None


def _getaddrinfo(host: str, port: int, flags: int) -> list[Candidate]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in entries]
