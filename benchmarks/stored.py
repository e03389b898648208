"""Messages that are stored on disk: the bytes of each system, and what answers them.

Setting up is done with sockets that block. Sources: docs/protocol.md, docs/mailboxes.md;
the JetStream API; RESP.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from typing import Final

from benchmarks.dialects import Brokerd, Nats, Redis, read_exactly, read_until
from brokerd_client.wire.envelope import HEADER, CodecId, Flag, Kind
from brokerd_client.wire.framing import frame

__all__ = ["RECEIPT_SIZE", "Consumer", "JetStream", "Mailboxes", "RedisStream", "StoredDialect"]

#: The mailbox, and the prefix of its senders' names, all of one length.
BOX: Final = "box00"
#: Bytes of a receipt of brokerd: length, header, and the name of the broker.
_HEAD: Final = 16
RECEIPT_SIZE: Final = _HEAD + len("$broker")
_STREAM: Final = "S"


class Consumer:
    """Receives stored messages and acknowledges each of them.

    Attributes:
        received: How many it has received.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = 0
        self._data = b""

    def take(self) -> None:
        """Receive some messages, and acknowledge them."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise EOFError("the server closed the connection")
        self._data += data
        answer = self.acknowledge()
        if answer:
            self.sock.sendall(answer)

    def acknowledge(self) -> bytes:
        """Return the acknowledgements of all whole messages."""
        raise NotImplementedError


class StoredDialect:
    """One system's way to store messages."""

    def message(self, sender: str, payload: bytes) -> bytes:
        """Return a message whose receipt says that it is on disk, as it is written."""
        raise NotImplementedError

    def get_ready(self, sock: socket.socket, sender: str) -> None:
        """Prepare the connection of a sender."""

    def receipts(self, data: bytes) -> tuple[int, bytes]:
        """Return the number of receipts in received bytes, and the rest of them.

        Raises RuntimeError for anything else.
        """
        raise NotImplementedError

    def consumer(self, sock: socket.socket, window: int, payload: bytes) -> Consumer:
        """Return the consumer of the mailbox, which begins to receive."""
        raise NotImplementedError


class Mailboxes(StoredDialect):
    """A mailbox of brokerd."""

    def message(self, sender: str, payload: bytes) -> bytes:
        header = HEADER.pack(Kind.MESSAGE, Flag.RECEIPT, CodecId.RAW, len(BOX), 1)
        return frame(header + BOX.encode() + payload)

    def receipts(self, data: bytes) -> tuple[int, bytes]:
        count = len(data) // RECEIPT_SIZE
        if count and set(data[4 : count * RECEIPT_SIZE : RECEIPT_SIZE]) != {Kind.RECEIPT}:
            raise RuntimeError(f"brokerd says {data[:300]!r}")
        return count, data[count * RECEIPT_SIZE :]

    def consumer(self, sock: socket.socket, window: int, payload: bytes) -> Consumer:
        body = json.dumps({"op": "open_mailbox", "window": window}).encode()
        header = HEADER.pack(Kind.REQUEST, 0, CodecId.JSON, 7, 1)
        sock.sendall(frame(header + b"$broker" + body))
        Brokerd().read_reply(sock)
        return _MailboxConsumer(sock, len(BOX), len(payload))


class _MailboxConsumer(Consumer):
    def __init__(self, sock: socket.socket, name: int, payload: int) -> None:
        super().__init__(sock)
        self._delivery = struct.Struct(f"!{_HEAD + name}xQ{2 + payload}x")

    def acknowledge(self) -> bytes:
        size = self._delivery.size
        whole = len(self._data) // size * size
        seqs = [seq for (seq,) in self._delivery.iter_unpack(self._data[:whole])]
        self._data = self._data[whole:]
        self.received += len(seqs)
        return b"".join(frame(HEADER.pack(Kind.ACK, 0, CodecId.RAW, 0, seq)) for seq in seqs)


class JetStream(StoredDialect):
    """A work queue of JetStream, in files."""

    def message(self, sender: str, payload: bytes) -> bytes:
        return b"PUB %s.m _INBOX.%s.r %d\r\n%s\r\n" % (
            BOX.encode(),
            sender.encode(),
            len(payload),
            payload,
        )

    def get_ready(self, sock: socket.socket, sender: str) -> None:
        Nats().await_replies(sock, sender)
        stream = {
            "name": _STREAM,
            "subjects": [f"{BOX}.>"],
            "retention": "workqueue",
            "storage": "file",
        }
        self._ask(sock, f"STREAM.CREATE.{_STREAM}", f"_INBOX.{sender}.c", stream)

    @staticmethod
    def _ask(sock: socket.socket, operation: str, inbox: str, what: object) -> None:
        body = json.dumps(what).encode()
        sock.sendall(
            b"PUB $JS.API.%s %s %d\r\n%s\r\n"
            % (operation.encode(), inbox.encode(), len(body), body)
        )
        # The server greets a new client with a PING.
        while (line := read_until(sock, b"\r\n")).startswith(b"PING"):
            pass
        answer = read_exactly(sock, int(line.split()[-1]) + 2)
        if b'"error"' in answer:
            raise RuntimeError(f"JetStream says {answer!r}")

    def receipts(self, data: bytes) -> tuple[int, bytes]:
        if b'"error"' in data:
            raise RuntimeError(f"JetStream says {data[:300]!r}")
        end = data.rfind(b"}") + 1
        return data.count(b'"seq":', 0, end), data[end:]

    def consumer(self, sock: socket.socket, window: int, payload: bytes) -> Consumer:
        Nats().await_replies(sock, BOX)
        config = {"durable_name": "D", "ack_policy": "explicit", "max_ack_pending": window}
        what = {"stream_name": _STREAM, "config": config}
        self._ask(sock, f"CONSUMER.DURABLE.CREATE.{_STREAM}.D", f"_INBOX.{BOX}.c", what)
        return _PullConsumer(sock, window, payload)


class _PullConsumer(Consumer):
    def __init__(self, sock: socket.socket, window: int, payload: bytes) -> None:
        super().__init__(sock)
        self._window = window
        self._asked = 0
        self._payload = payload + b"\r\n"
        sock.sendall(self._ask())

    def _ask(self) -> bytes:
        """Return requests for more messages, so that a window is always asked for."""
        asked = b""
        while self._asked - self.received < self._window:
            self._asked += self._window
            body = b'{"batch":%d,"expires":60000000000}' % self._window
            asked += b"PUB $JS.API.CONSUMER.MSG.NEXT.%s.D _INBOX.%s.n %d\r\n%s\r\n" % (
                _STREAM.encode(),
                BOX.encode(),
                len(body),
                body,
            )
        return asked

    def acknowledge(self) -> bytes:
        end = self._data.rfind(self._payload)
        if end < 0:
            return b""
        end += len(self._payload)
        subjects = re.findall(rb" (\$JS\.ACK\S+) ", self._data[:end])
        self._data = self._data[end:]
        self.received += len(subjects)
        return b"".join(b"PUB %s 0\r\n\r\n" % subject for subject in subjects) + self._ask()


class RedisStream(StoredDialect):
    """A stream of Redis, with the append-only file."""

    def message(self, sender: str, payload: bytes) -> bytes:
        return Redis.command(b"XADD", BOX.encode(), b"*", b"m", payload)

    def receipts(self, data: bytes) -> tuple[int, bytes]:
        if data.startswith(b"-") or b"\r\n-" in data:
            raise RuntimeError(f"redis-server says {data[:300]!r}")
        end = data.rfind(b"\r\n") + 2 if b"\r\n" in data else 0
        # The last line may be the length of an id that has not come.
        count = data.count(b"-", 0, end)
        return count, data[end:]
