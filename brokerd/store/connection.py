"""The broker's end of its store process: requests in, answers out, in order.

Nothing here waits for the store: what the socket does not take stays in memory. How
much that may be is decided by the core, which stops accepting messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from brokerd.core.mailboxes.journal import (
    Batch,
    Buried,
    Committed,
    Contents,
    Failed,
    FailureKind,
    Rows,
    State,
)
from brokerd.store import __main__ as program
from brokerd.store.answer_poll import AnswerPoll
from brokerd.store.directory import Refused
from brokerd.store.messages import (
    VERSION,
    Message,
    Piece,
    Received,
    commit_message,
    message,
    rows_of,
)

__all__ = ["StoreConnection", "StoreSettings"]

#: Bytes received at once, and the size asked for of the socket's buffers.
_READ: Final = 256 << 10
_SOCKET_BYTES: Final = 4 << 20
#: Seconds per turn of the loop after which further answers wait. The answer to a large
#: batch takes longer: then it is one at a time.
_TURN_S: Final = 0.00003
#: Pieces per call of sendmsg.
_PIECES: Final = 256
#: Longest wait, in seconds, for the end of a process that has closed its socket: it does
#: nothing else any more.
_ENDING_S: Final = 1.0


class StoreSettings(NamedTuple):
    """The ``store`` section of the configuration.

    Attributes:
        path: The directory of the database.
        min_free: Bytes of the file system that messages leave free.
        dedup: Seconds for which a deduplication key is known.
    """

    path: Path
    min_free: int
    dedup: float


class Answers(Protocol):
    """Receives the answers of the store; see ``brokerd.core.mailboxes.journal``."""

    def committed(self, answer: Committed) -> None:
        """Receive the answer to ``commit``."""

    def failed(self, answer: Failed) -> None:
        """Receive the other answer to ``commit``."""

    def buried(self, buried: Buried) -> None:
        """Receive which messages a read has found damaged."""

    def rows(self, request: int, rows: Rows) -> None:
        """Receive the answer to ``read``."""

    def key_looked_up(self, request: int, known: bool) -> None:
        """Receive the answer to ``look_up_key``."""

    def purged(self, request: int, count: int, size: int) -> None:
        """Receive the answer to ``purge``."""

    def forgotten(self, keys: Sequence[tuple[str, int]]) -> None:
        """Receive how many keys of each mailbox were forgotten."""


class StoreConnection:
    """The broker's end of a store process. It is a ``Journal`` of the core.

    Attributes:
        pid: The process id of the store; 0 until it is open.
        failure: Why nothing is stored any more; "" while all is well.

    Args:
        settings: The configuration.
        on_settled: Called after answers were passed on.
        may_poll: Whether spare processors may poll for answers, and for requests.
    """

    def __init__(
        self, settings: StoreSettings, on_settled: Callable[[], None], *, may_poll: bool = False
    ) -> None:
        self.settings = settings
        self.pid = 0
        self.failure = ""
        self._answers: Answers | None = None
        self._on_settled = on_settled
        self._loop = asyncio.get_running_loop()
        self._may_poll = may_poll
        self._poll = AnswerPoll(self._loop, may_poll=may_poll)
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._received = Received()
        #: Whether received answers wait for the next turn of the loop.
        self._passing_on = False
        self._buffer = memoryview(bytearray(_READ))
        self._unsent: deque[memoryview] = deque()
        self._writing = False
        #: Requests that wait while one store process replaces another.
        self._held: list[tuple[str, int, list[Piece]]] | None = None
        self._outstanding: deque[tuple[str, int]] = deque()
        self._opened: asyncio.Future[list[Contents]] | None = None
        #: Whether the socket has taken everything, and whether the store has ended.
        self._sent = asyncio.Event()
        self._sent.set()
        self._ended = asyncio.Event()
        #: Whether the broker wants the store to end.
        self._ending = False

    # Start and end

    async def open(self) -> list[Contents]:
        """Start the store process; return what its database contains.

        Raises Refused if the database can't be used, or OSError.
        """
        if os.name != "posix":
            raise Refused("mailboxes need a POSIX system: a socket can't be passed on here")
        self._launch()
        self._opened = self._loop.create_future()
        self._write(self._opening())
        try:
            return await self._opened
        except BaseException:
            self.kill()
            raise

    def _opening(self) -> list[Piece]:
        return message("open", VERSION, self.settings.dedup, self.settings.min_free)

    def serve(self, answers: Answers) -> None:
        """Pass answers on from now on."""
        self._answers = answers

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            for sock in (ours, theirs):
                # As much of the next transaction as possible lies there while the store
                # writes one to disk.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            arguments = [
                program.__file__,
                str(self.settings.path),
                str(theirs.fileno()),
                "1" if self._may_poll else "0",
            ]
            try:
                self._process = subprocess.Popen(  # noqa: S603 - a program of our own
                    [sys.executable, "-P", *arguments],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self.pid = self._process.pid
        self._use(ours)

    def _use(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._ending = False
        self._ended.clear()
        self._loop.add_reader(sock, self._on_readable)

    async def close(self, within_s: float) -> bool:
        """Close the broker's end; the store commits what it has received, and ends.

        Returns whether it has ended in time. A store that has not ends by itself.
        """
        if self._sock is None:
            return True
        try:
            async with asyncio.timeout(within_s):
                await self._end()
        except TimeoutError:
            self.kill()
            return False
        return True

    async def _end(self) -> None:
        """Close the broker's end once everything is written; wait for the store's."""
        self._ending = True
        await self._sent.wait()
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        await self._ended.wait()

    def kill(self) -> None:
        """Leave the store at once. It commits what it has received."""
        self._leave_process()
        self._drop_socket()

    def _leave_process(self) -> None:
        """Wait in a thread for the process, which ends by itself."""
        if self._process is not None and self._process.returncode is None:
            threading.Thread(target=self._process.wait, name="store", daemon=True).start()

    def _drop_socket(self) -> None:
        self._poll.end()
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            if self._writing:
                self._loop.remove_writer(self._sock)
                self._writing = False
            self._sock.close()
            self._sock = None
        self._unsent.clear()
        self._sent.set()
        self._ended.set()

    # Upgrades

    def shared(self) -> tuple[dict[str, Any], socket.socket] | None:
        """Return the facts for ``attach`` in another process, and the socket.

        Nothing may be on its way, and only one of the two processes may go on using it.
        None: the store process has ended.
        """
        assert not self._outstanding, "the core is quiet"
        if self._sock is None:
            return None
        facts = {
            "version": VERSION,
            "pid": self.pid,
            "path": str(self.settings.path),
            "min_free": self.settings.min_free,
            "dedup": self.settings.dedup,
        }
        return facts, self._sock

    def attach(self, pid: int, sock: socket.socket, version: int) -> None:
        """Take over a store process from the former process of the broker.

        One of another version gets no request: they all wait for ``renew``.
        """
        self.pid = pid
        self._use(sock)
        if version != VERSION:
            self._held = []
        self.configure(self.settings)

    async def renew(self) -> None:
        """Replace the store process by one of this version, without losing a request.

        Raises Refused or OSError; nothing is stored any more then.
        """
        if self._held is None:
            self._held = []
        try:
            await self._end()
            self._opened = self._loop.create_future()
            self._launch()
            self._write(self._opening())
            await self._opened
        except (Refused, OSError) as error:
            self.failure = self.failure or str(error)
            raise
        finally:
            held, self._held = self._held, None
            self.configure(self.settings)
            for word, number, pieces in held:
                self._request(word, number, pieces)

    # Requests

    def configure(self, settings: StoreSettings) -> None:
        """Take over the settings of a reload; the path stays."""
        self.settings = settings
        if self._held is None:
            self._write(message("configure", settings.dedup, settings.min_free))

    def commit(self, batch: Batch) -> None:
        """Write a batch to disk."""
        self._request("commit", batch.number, commit_message(batch))

    def read(
        self,
        request: int,
        mailbox: str,
        state: State | None,
        after: tuple[float, int],
        max_messages: int,
        max_bytes: int,
    ) -> None:
        """Read messages."""
        pieces = message("read", request, mailbox, state, after, max_messages, max_bytes)
        self._request("read", request, pieces)

    def look_up_key(self, request: int, mailbox: str, sender: str, key: str) -> None:
        """Look up a deduplication key."""
        self._request("look_up_key", request, message("look_up_key", request, mailbox, sender, key))

    def purge(
        self,
        request: int,
        mailbox: str,
        state: State | None,
        before_seq: int,
        without: tuple[int, ...],
    ) -> None:
        """Remove messages of one state."""
        pieces = message("purge", request, mailbox, state, before_seq, without)
        self._request("purge", request, pieces)

    def _request(self, word: str, number: int, pieces: list[Piece]) -> None:
        if self._held is not None:
            self._held.append((word, number, pieces))
            return
        self._outstanding.append((word, number))
        if self._sock is None:
            self._loop.call_soon(self._fail_outstanding)
            return
        self._write(pieces)
        if len(self._outstanding) == 1:
            self._poll.begin()
        else:
            self._poll.end()

    def _write(self, pieces: Sequence[Piece]) -> None:
        if self._sock is None:
            return
        self._sent.clear()
        self._unsent += (memoryview(piece) for piece in pieces if len(piece))
        if not self._writing:
            self._on_writable()

    def _on_writable(self) -> None:
        sock, unsent = self._sock, self._unsent
        assert sock is not None
        try:
            while unsent:
                some = [unsent[at] for at in range(min(len(unsent), _PIECES))]
                sent = sock.sendmsg(some)
                while unsent and sent >= len(unsent[0]):
                    sent -= len(unsent.popleft())
                if sent:
                    unsent[0] = unsent[0][sent:]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(sock, self._on_writable)
            return
        except OSError:
            # The reader finds out what has happened.
            unsent.clear()
        self._sent.set()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(sock)

    # Answers

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            count = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._lost()
            return
        self._poll.end()
        self._received.add(self._buffer[:count])
        if not self._passing_on:
            self._pass_some_on()

    def _pass_some_on(self) -> None:
        """Pass answers on for some time, and the rest in the next turn of the loop."""
        self._passing_on = False
        if self._sock is None:
            return
        end = time.monotonic() + _TURN_S
        try:
            while answer := self._received.next():
                self._pass_on(answer)
                if self._received and time.monotonic() > end:
                    self._passing_on = True
                    self._loop.call_soon(self._pass_some_on)
                    break
        finally:
            if self._answers is not None:
                self._on_settled()

    def _pass_on(self, answer: Message) -> None:
        word, arguments = answer.word, answer.arguments
        if word == "opened":
            self._has_opened(arguments)
            return
        if word == "refused":
            if self._opened is not None and not self._opened.done():
                self._opened.set_exception(Refused(arguments[0]))
            return
        answers = self._answers
        assert answers is not None, "the store answers requests"
        if word == "forgotten":
            answers.forgotten(_pairs(arguments[0]))
            return
        if word == "buried":
            mailbox, messages = arguments
            answers.buried(Buried(mailbox, tuple(map(tuple, messages))))
            return
        self._outstanding.popleft()
        if word == "committed":
            number, duplicates, forgotten = arguments
            answers.committed(Committed(number, _pairs(duplicates), _pairs(forgotten)))
        elif word == "failed":
            number, kind, text, forgotten = arguments
            answers.failed(Failed(number, FailureKind(kind), text, _pairs(forgotten)))
        elif word == "rows":
            answers.rows(arguments[0], rows_of(answer))
        elif word == "key_looked_up":
            answers.key_looked_up(*arguments)
        else:
            answers.purged(*arguments)

    def _has_opened(self, arguments: list[Any]) -> None:
        _, self.pid, contents = arguments
        if self._opened is not None and not self._opened.done():
            self._opened.set_result([Contents(*each) for each in contents])

    def _lost(self) -> None:
        """Fail what has no answer: the store process has closed its end."""
        self._drop_socket()
        while answer := self._received.next():
            self._pass_on(answer)
        how = ""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                how = f" with status {self._process.wait(_ENDING_S)}"
        reason = f"the store process ended{how}"
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(Refused(reason))
        if self._outstanding or not self._ending:
            self.failure = self.failure or reason
        self._fail_outstanding()

    def _fail_outstanding(self) -> None:
        """Answer requests that the store does not answer any more."""
        answers = self._answers
        if answers is None:
            return
        while self._outstanding:
            word, number = self._outstanding.popleft()
            if word == "commit":
                answers.failed(Failed(number, FailureKind.IO, self.failure))
            elif word == "read":
                answers.rows(number, [])
            elif word == "look_up_key":
                answers.key_looked_up(number, False)
            else:
                answers.purged(number, 0, 0)
        self._on_settled()


def _pairs(listed: Sequence[Sequence[Any]]) -> tuple[tuple[str, int], ...]:
    return tuple((name, number) for name, number in listed)
