"""What two processes of the daemon say to each other during an upgrade: facts, bytes and descriptors.

A message is MAGIC, the length of a JSON object as 32 bits in network byte order, and the object:

    {"say": WORD, ...facts, "bytes": N, "descriptors": M}

behind it N bytes, and M descriptors in groups of up to 253 (SCM_MAX_FD of Linux), each group beside one byte. The
words, in the order in which they are said (old: the running process; new: the one that takes its place):

    old offer     format, version, listening: what it would hand over, and where it listens; handed: the names of the
                  sockets that the service manager handed over, monitor: where the monitor listens; the descriptors of
                  both go with it
    new hello     version, formats: its configuration is good, and what it could not listen at before is open
    old copy      what waits, and subscriptions, in blocks, as brokerd.core.precopy has it, and idle connections with
                  their descriptors, as brokerd.net.handover has it, any number of times
    old copied    asks whether all that has been taken in
    new copied    it has
    old state     format, frozen_at, asked_by, reloads: how many ended how, and what brokerd.net.handover captures; the
                  old one does nothing else now
    new ready     everything is set up; no socket has been touched
    old commit    it is yours
    new serving   taken; said before the first socket is touched, so that the old one may go on if this never comes

Either may say ``failed`` with a reason instead, and then the old one goes on. A state has a format, a number; a
newer process reads the formats in READS, and what a format does not know of is left out or ignored.
Nothing here is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from brokerd.log.logger import in_words

__all__ = [
    "FORMAT",
    "HANDOVER_FD",
    "PID_HOLDER_FD",
    "READS",
    "SIGNALS",
    "UpgradeChannel",
    "UpgradeChannelError",
    "UpgradeMessage",
]

#: The format of the state that this version writes, and those it can read.
FORMAT: Final = 3
READS: Final = (2, 3)

#: In the environment of the new process: its end of the channel, and the pipe to the keeper.
HANDOVER_FD: Final = "BROKERD_UPGRADE_FD"
PID_HOLDER_FD: Final = "BROKERD_KEEPER_FD"
#: Signals that both would act on: during the upgrade they are the running process's.
SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name)
)

_MAGIC: Final = b"bkUP"
_HEAD: Final = struct.Struct("!4sI")
_LARGEST_FACTS: Final = 1 << 30
_DESCRIPTORS: Final = 253
_PIECES: Final = 512
#: Bytes that room is made for before any of them has come.
_ROOM: Final = 1 << 20
#: Seconds before descriptors are sent again that the system would not take: it counts those not received yet.
_TRY_AGAIN_S: Final = 0.002


class UpgradeChannelError(Exception):
    """The other process is gone, is too slow, or says something that makes no sense; the message says which."""


class UpgradeMessage:
    """One message. say: which. facts: what else the object holds. The descriptors belong to whoever reads them."""

    def __init__(self, say: str, facts: dict[str, Any], body: bytearray, descriptors: list[int]) -> None:
        self.say = say
        self.facts = facts
        self.body = body
        self.descriptors = descriptors


class UpgradeChannel:
    """One end. sock: of a pair of connected AF_UNIX stream sockets; it blocks for as long as each call says."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        #: Bytes of the last object sent.
        self.told = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close this end; the other one sees it."""
        self._sock.close()

    def wake(self) -> None:
        """Have a receive that another thread waits in end at once."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def send(
        self,
        say: str,
        facts: dict[str, Any] | None = None,
        pieces: Sequence[bytes | bytearray | memoryview] = (),
        descriptors: Sequence[int] = (),
        *,
        within_s: float,
    ) -> None:
        """Send one message. Raises ChannelError."""
        deadline = time.monotonic() + within_s
        size = sum(map(len, pieces))
        told = json.dumps({**(facts or {}), "say": say, "bytes": size, "descriptors": len(descriptors)}).encode()
        self.told = len(told)
        try:
            self._write([_HEAD.pack(_MAGIC, len(told)), told], deadline)
            self._write(pieces, deadline)
            for start in range(0, len(descriptors), _DESCRIPTORS):
                self._pass(descriptors[start : start + _DESCRIPTORS], deadline)
        except TimeoutError as error:
            raise UpgradeChannelError(f"it did not take {say!r} within {round(within_s, 2):g} s") from error
        except OSError as error:
            raise UpgradeChannelError(f"it ended before it took {say!r} ({error.strerror or error})") from error

    def _write(self, pieces: Iterable[bytes | bytearray | memoryview], deadline: float) -> None:
        views = [memoryview(piece) for piece in pieces if piece]
        first = 0
        while first < len(views):
            self._wait_until(deadline)
            sent = self._sock.sendmsg(views[first : first + _PIECES])
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]

    def _pass(self, descriptors: Sequence[int], deadline: float) -> None:
        while True:
            self._wait_until(deadline)
            try:
                socket.send_fds(self._sock, [b"D"], list(descriptors))
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                time.sleep(_TRY_AGAIN_S)
            else:
                return

    def receive(self, *, within_s: float) -> UpgradeMessage:
        """Return the next message. Raises ChannelError."""
        deadline = time.monotonic() + within_s
        try:
            magic, size = _HEAD.unpack(self._read(_HEAD.size, deadline))
            if magic != _MAGIC or size > _LARGEST_FACTS:
                raise UpgradeChannelError("it does not speak this language")
            facts = json.loads(self._read(size, deadline))
            say, body_size, count = facts.pop("say"), _number(facts.pop("bytes")), _number(facts.pop("descriptors"))
            return UpgradeMessage(say, facts, self._read(body_size, deadline), self._take(count, deadline))
        except TimeoutError as error:
            raise UpgradeChannelError(f"it said nothing for {round(within_s, 2):g} s") from error
        except OSError as error:
            raise UpgradeChannelError(f"it ended ({error.strerror or error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UpgradeChannelError(f"it does not speak this language: {in_words(error)}") from error

    def expect(self, *words: str, within_s: float) -> UpgradeMessage:
        """Return the next message, which is to be one of these. Raises ChannelError; for ``failed`` with its reason."""
        message = self.receive(within_s=within_s)
        if message.say not in words:
            _close_all(message.descriptors)
        if message.say == "failed":
            raise UpgradeChannelError(str(message.facts.get("reason", "it did not say why")))
        if message.say not in words:
            raise UpgradeChannelError(f"it said {message.say!r} where {' or '.join(map(repr, words))} was expected")
        return message

    def _read(self, size: int, deadline: float) -> bytearray:
        """Return so many bytes; room is made only for what has come and as much again, whatever was announced."""
        body = bytearray()
        got = 0
        while got < size:
            if got == len(body):
                body += bytes(min(max(got, _ROOM), size - got))
            self._wait_until(deadline)
            with memoryview(body) as view:
                count = self._sock.recv_into(view[got:])
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "it closed the connection between us")
            got += count
        return body

    def _take(self, count: int, deadline: float) -> list[int]:
        """Return so many descriptors. Whatever this raises: those that had come are closed."""
        taken: list[int] = []
        try:
            while len(taken) < count:
                self._wait_until(deadline)
                data, descriptors, flags, _ = socket.recv_fds(self._sock, 1, _DESCRIPTORS)
                taken += descriptors
                if flags & socket.MSG_CTRUNC or len(taken) > count:
                    raise OSError(errno.EMFILE, "not all descriptors arrived; is the limit of open files reached?")
                if not data or not descriptors:
                    raise ConnectionResetError(errno.ECONNRESET, "it closed the connection between us")
        except BaseException:
            _close_all(taken)
            raise
        return taken

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)


def _number(value: object) -> int:
    """Return a count as it came. Raises ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _close_all(descriptors: Iterable[int]) -> None:
    for each in descriptors:
        os.close(each)
