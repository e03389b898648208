"""The notes that both kinds of traffic members write, and the number of messages in
flight.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterable

from brokerd_client.errors import BrokerdError

#: Messages, and requests, in flight to each recipient.
MESSAGES, REQUESTS = 8, 4
#: Seconds until a message or request times out; more than any fault lasts.
TIMEOUT_S = 60.0
PAUSE_S = 0.01


class NoteFile:
    """A file of lines; each line is in the file when ``note`` returns."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


class Outcomes:
    """The outcomes of messages with a receipt. The latest note of a message counts; any
    thread may call.
    """

    def __init__(self, notes: NoteFile) -> None:
        self._notes = notes
        self._lock = threading.Lock()
        self._sent: dict[int, tuple[str, int]] = {}
        self._early: dict[int, str] = {}

    def note(self, to: str, first: int, outcomes: Iterable[object]) -> None:
        """Note the outcomes of messages numbered from ``first``."""
        with self._lock:
            for number, outcome in enumerate(outcomes, first):
                self._notes.note("message", to, number, type(outcome).__name__)
                if not isinstance(outcome, BrokerdError):
                    message_id = outcome.id  # type: ignore[attr-defined]
                    self._sent[message_id] = to, number
                    if message_id in self._early:
                        self._notes.note("message", to, number, self._early[message_id])

    def undelivered(self, error: BrokerdError) -> None:
        """Note that a message with a receipt is given back after all. The sender may
        not have its receipt yet.
        """
        message_id = getattr(error, "message_id", 0)
        with self._lock:
            if message_id in self._sent:
                self._notes.note("message", *self._sent[message_id], type(error).__name__)
            else:
                self._early[message_id] = type(error).__name__


def context_of(ca: str) -> ssl.SSLContext | None:
    """Return the TLS context to connect with.

    Args:
        ca: The file with the CA of the broker's certificate, "-" for a connection
            without TLS.
    """
    return None if ca == "-" else ssl.create_default_context(cafile=ca)
