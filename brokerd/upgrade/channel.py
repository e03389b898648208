"""The messages between two processes of the daemon during an upgrade: facts, bytes,
descriptors.

A message begins with MAGIC and the length of a JSON object, 32 bits in network byte
order. Then the object follows:

    {"say": WORD, ...facts, "bytes": N, "descriptors": M}

N bytes and M descriptors follow. Descriptors are sent in groups of up to 253
(SCM_MAX_FD of Linux), each group beside one byte. The words, in the order in which they
are sent:

    old offer     format, version, listening: the format of its state, and where it
                  listens; handed: the names and addresses of the sockets from the
                  service manager; monitor: where the monitor listens; the descriptors
                  of the sockets of both, handed and monitor, go with the message
    new hello     version, formats; keeper: the path of the PID holder's program; its
                  configuration is valid, and it listens at all configured addresses
                  where the old process did not
    old copy      queued frames and subscriptions, in blocks as in brokerd.core.precopy;
                  idle connections with their descriptors, and the counters of copied
                  ones, as in brokerd.net.handover; clients, as in brokerd.core.snapshot;
                  incidents; sent any number of times
    old copied    asks whether all copies have been processed
    new copied    confirms it
    old state     format, frozen_at, asked_by; reloads: how many reloads ended in which
                  way; and all that brokerd.net.handover captures; the old process is
                  idle now. From format 4 on, sessions and clients that are as copied are
                  not in it. Before, it lists the number of each such session
    new ready     everything is set up; no socket has been touched
    old commit    the sockets belong to the new process
    new serving   confirms it; sent before the first socket is touched, so that the old
                  process may continue if this message never comes

Either process may send ``failed`` with a reason instead. Then the old process
continues. The format of a state is a number. A newer process reads the formats in
READS. Facts that a format does not have are left out or ignored. No data is ever
unpickled.
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

#: The format of the state that this version writes, and the formats that it can read.
FORMAT: Final = 7
READS: Final = (2, 3, 4, 5, 6, 7)

#: Environment variables of the new process: the descriptors of its end of the channel,
#: and of the pipe to the PID holder. The second name is the one that versions before the
#: PID holder's present name set and read.
HANDOVER_FD: Final = "BROKERD_UPGRADE_FD"
PID_HOLDER_FD: Final = "BROKERD_KEEPER_FD"
#: Signals that both processes handle. During the upgrade only the old process handles
#: them.
SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR2")
    if hasattr(signal, name)
)

_MAGIC: Final = b"bkUP"
_HEAD: Final = struct.Struct("!4sI")
#: Largest JSON object of a message, in bytes.
_LARGEST_FACTS: Final = 1 << 30
#: Most descriptors per group (SCM_MAX_FD of Linux).
_DESCRIPTORS: Final = 253
#: Most pieces of bytes per call of sendmsg.
_PIECES: Final = 512
#: Bytes per message for which memory is allocated before any of them has arrived.
_ROOM: Final = 1 << 20
#: Seconds before a group of descriptors is sent again after ETOOMANYREFS. The kernel
#: limits the descriptors that are sent and not received yet.
_TRY_AGAIN_S: Final = 0.002


class UpgradeChannelError(Exception):
    """The other process is gone, too slow, or sent an invalid message; the text says
    which.
    """


class UpgradeMessage:
    """One message, whose descriptors belong to the reader.

    Attributes:
        say: The word.
        facts: The rest of the JSON object.
    """

    def __init__(
        self, say: str, facts: dict[str, Any], body: bytearray, descriptors: list[int]
    ) -> None:
        self.say = say
        self.facts = facts
        self.body = body
        self.descriptors = descriptors


class UpgradeChannel:
    """One end of the channel between two processes.

    sock: one of a pair of connected AF_UNIX stream sockets. It blocks for at most as
    long as each call allows.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        #: Size of the last JSON object sent, in bytes.
        self.json_size = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close this end, which the other process notices."""
        self._sock.close()

    def wake(self) -> None:
        """Interrupt a receive that another thread waits in."""
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
        """Send one message. Raises UpgradeChannelError."""
        deadline = time.monotonic() + within_s
        size = sum(map(len, pieces))
        header = json.dumps(
            {**(facts or {}), "say": say, "bytes": size, "descriptors": len(descriptors)}
        ).encode()
        self.json_size = len(header)
        try:
            self._write([_HEAD.pack(_MAGIC, len(header)), header], deadline)
            self._write(pieces, deadline)
            for start in range(0, len(descriptors), _DESCRIPTORS):
                self._pass(descriptors[start : start + _DESCRIPTORS], deadline)
        except TimeoutError as error:
            raise UpgradeChannelError(
                f"the other process did not read {say!r} within {round(within_s, 2):g} s"
            ) from error
        except OSError as error:
            raise UpgradeChannelError(
                f"the other process ended before it read {say!r} ({error.strerror or error})"
            ) from error

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
        """Return the next message. Raises UpgradeChannelError."""
        deadline = time.monotonic() + within_s
        try:
            magic, size = _HEAD.unpack(self._read(_HEAD.size, deadline))
            if magic != _MAGIC or size > _LARGEST_FACTS:
                raise UpgradeChannelError("the other process sent a malformed message")
            facts = json.loads(self._read(size, deadline))
            say, body_size, count = (
                facts.pop("say"),
                _number(facts.pop("bytes")),
                _number(facts.pop("descriptors")),
            )
            return UpgradeMessage(
                say, facts, self._read(body_size, deadline), self._take(count, deadline)
            )
        except TimeoutError as error:
            raise UpgradeChannelError(
                f"the other process sent nothing for {round(within_s, 2):g} s"
            ) from error
        except OSError as error:
            raise UpgradeChannelError(
                f"the other process ended ({error.strerror or error})"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UpgradeChannelError(
                f"the other process sent a malformed message: {in_words(error)}"
            ) from error

    def expect(self, *words: str, within_s: float) -> UpgradeMessage:
        """Return the next message, which has to have one of these words.

        Raises UpgradeChannelError; for ``failed`` with the reason that it contains.
        """
        message = self.receive(within_s=within_s)
        if message.say not in words:
            _close_all(message.descriptors)
        if message.say == "failed":
            raise UpgradeChannelError(
                str(message.facts.get("reason", "the other process gave no reason"))
            )
        if message.say not in words:
            raise UpgradeChannelError(
                f"the other process sent {message.say!r} where {' or '.join(map(repr, words))} was"
                " expected"
            )
        return message

    def _read(self, size: int, deadline: float) -> bytearray:
        """Return the next ``size`` bytes.

        However large the announced size is, the buffer is at most twice as large as the
        bytes received, or _ROOM.
        """
        body = bytearray()
        got = 0
        while got < size:
            if got == len(body):
                body += bytes(min(max(got, _ROOM), size - got))
            self._wait_until(deadline)
            with memoryview(body) as view:
                count = self._sock.recv_into(view[got:])
            if not count:
                raise ConnectionResetError(
                    errno.ECONNRESET, "the other process closed the connection"
                )
            got += count
        return body

    def _take(self, count: int, deadline: float) -> list[int]:
        """Return the next ``count`` descriptors; on any error, close those received."""
        received: list[int] = []
        try:
            while len(received) < count:
                self._wait_until(deadline)
                data, descriptors, flags, _ = socket.recv_fds(self._sock, 1, _DESCRIPTORS)
                received += descriptors
                if flags & socket.MSG_CTRUNC or len(received) > count:
                    raise OSError(
                        errno.EMFILE,
                        "not all descriptors arrived; is the limit of open files reached?",
                    )
                if not data or not descriptors:
                    raise ConnectionResetError(
                        errno.ECONNRESET, "the other process closed the connection"
                    )
        except BaseException:
            _close_all(received)
            raise
        return received

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)


def _number(value: object) -> int:
    """Return the value if it is a valid count. Raises ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a valid count")
    return value


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
