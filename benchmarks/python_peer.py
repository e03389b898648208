"""One end of a measurement of a client library: ``python -m benchmarks.python_peer
LIBRARY ROLE ADDRESS FILE``.

ROLE is send (as c0000) or receive (as c0001). FILE is shared by both ends and by the
measuring process: five unsigned 64-bit numbers, see Board. The sender waits while too
many messages are in flight, in the same way for every library. So no library is
measured by the size of its buffers. Each library is used in its fastest way.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.dialects import key_of

PAYLOAD = b"x" * 16
BATCH = 1000
#: Messages that may be under way.
WINDOW = 50_000
SENDER, RECEIVER = "c0000", "c0001"
#: Messages between two updates of a receiver's count. Every batch is a multiple of it, so
#: the last message is counted too.
STEP = 250


class Board:
    """Numbers that several processes see: received, sent, stop, receiver ready, sender
    ready.
    """

    SIZE = 40
    RECEIVED, SENT, STOP, RECEIVER_READY, SENDER_READY = range(5)

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)

    def __getitem__(self, index: int) -> int:
        return int(struct.unpack_from("=Q", self._map, 8 * index)[0])

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("=Q", self._map, 8 * index, value)

    def close(self) -> None:
        self._map.close()


def pump(board: Board, send_batch: Callable[[], object]) -> None:
    """Send batches until told to stop, never more than WINDOW messages ahead."""
    sent = 0
    board[Board.SENDER_READY] = 1
    while not board[Board.STOP]:
        if sent - board[Board.RECEIVED] > WINDOW:
            time.sleep(0.0005)
            continue
        send_batch()
        sent += BATCH
    board[Board.SENT] = sent


# brokerd_client


def brokerd_send(address: str, board: Board) -> None:
    import brokerd_client

    with brokerd_client.connect(address, SENDER, key_of(SENDER)) as client:
        batch = [(RECEIVER, PAYLOAD)] * BATCH
        pump(board, lambda: client.send_many(batch))


def brokerd_receive(address: str, board: Board) -> None:
    import brokerd_client

    with brokerd_client.connect(address, RECEIVER, key_of(RECEIVER)) as client:
        board[Board.RECEIVER_READY] = 1
        for count, _ in enumerate(client, 1):
            if not count % STEP:
                board[Board.RECEIVED] = count


# nats-py


async def _nats(address: str, name: str) -> object:
    import nats

    return await nats.connect(f"nats://{address}", user=name, password=key_of(name))


def nats_send(address: str, board: Board) -> None:
    async def main() -> None:
        client = await _nats(address, SENDER)
        publish = client.publish  # type: ignore[attr-defined]
        sent = 0
        board[Board.SENDER_READY] = 1
        while not board[Board.STOP]:
            if sent - board[Board.RECEIVED] > WINDOW:
                await asyncio.sleep(0.0005)
                continue
            for _ in range(BATCH):
                await publish(RECEIVER, PAYLOAD)
            sent += BATCH
            await asyncio.sleep(0)
        await client.flush()  # type: ignore[attr-defined]
        board[Board.SENT] = sent
        await client.close()  # type: ignore[attr-defined]

    asyncio.run(main())


def nats_receive(address: str, board: Board) -> None:
    async def main() -> None:
        client = await _nats(address, RECEIVER)
        count = 0

        async def on_message(message: object) -> None:
            nonlocal count
            count += 1
            if not count % STEP:
                board[Board.RECEIVED] = count

        await client.subscribe(  # type: ignore[attr-defined]
            RECEIVER, cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        await client.flush()  # type: ignore[attr-defined]
        board[Board.RECEIVER_READY] = 1
        await asyncio.Event().wait()

    asyncio.run(main())


# zenoh


def _zenoh(address: str) -> object:
    import json

    import zenoh

    config = zenoh.Config()
    config.insert_json5("mode", '"client"')
    config.insert_json5("connect/endpoints", json.dumps([f"tcp/{address}"]))
    config.insert_json5("scouting/multicast/enabled", "false")
    return zenoh.open(config)


def zenoh_send(address: str, board: Board) -> None:
    import zenoh

    with _zenoh(address) as session:  # type: ignore[attr-defined]
        publisher = session.declare_publisher(
            RECEIVER, congestion_control=zenoh.CongestionControl.BLOCK
        )
        put = publisher.put

        def send_batch() -> None:
            for _ in range(BATCH):
                put(PAYLOAD)

        pump(board, send_batch)
        # What it still holds is given up with the session.
        while board[Board.RECEIVED] < board[Board.SENT]:
            time.sleep(0.01)


def zenoh_receive(address: str, board: Board) -> None:
    with _zenoh(address) as session:  # type: ignore[attr-defined]
        count = 0

        def on_sample(sample: object) -> None:
            nonlocal count
            count += 1
            if not count % STEP:
                board[Board.RECEIVED] = count

        session.declare_subscriber(RECEIVER, on_sample)
        # A declaration takes its way through the router; there is nothing that tells
        # when it has.
        time.sleep(0.5)
        board[Board.RECEIVER_READY] = 1
        threading.Event().wait()


# pyzmq


def pyzmq_send(address: str, board: Board) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set_hwm(0)
        dealer.setsockopt(zmq.IDENTITY, SENDER.encode())
        dealer.connect(f"tcp://{address}")
        send, message = dealer.send_multipart, (RECEIVER.encode(), PAYLOAD)

        def send_batch() -> None:
            for _ in range(BATCH):
                send(message)

        pump(board, send_batch)


def pyzmq_receive(address: str, board: Board) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set_hwm(0)
        dealer.setsockopt(zmq.IDENTITY, RECEIVER.encode())
        dealer.connect(f"tcp://{address}")
        # The router knows it when a message to itself has come back.
        dealer.send_multipart((RECEIVER.encode(), b""))
        receive = dealer.recv_multipart
        receive()
        board[Board.RECEIVER_READY] = 1
        count = 0
        while True:
            receive()
            count += 1
            if not count % STEP:
                board[Board.RECEIVED] = count


# redis-py


def _redis(address: str, name: str) -> object:
    import redis

    host, _, port = address.rpartition(":")
    return redis.Redis(host, int(port), username=name, password=key_of(name))


def redis_send(address: str, board: Board) -> None:
    client = _redis(address, SENDER)

    def send_batch() -> None:
        pipeline = client.pipeline(transaction=False)  # type: ignore[attr-defined]
        for _ in range(BATCH):
            pipeline.publish(RECEIVER, PAYLOAD)
        pipeline.execute()

    pump(board, send_batch)


def redis_receive(address: str, board: Board) -> None:
    feed = _redis(address, RECEIVER).pubsub()  # type: ignore[attr-defined]
    feed.subscribe(RECEIVER)
    feed.parse_response()
    board[Board.RECEIVER_READY] = 1
    for count, _ in enumerate(feed.listen(), 1):
        if not count % STEP:
            board[Board.RECEIVED] = count


ENDS: dict[str, tuple[Callable[[str, Board], None], Callable[[str, Board], None]]] = {
    "brokerd-client": (brokerd_send, brokerd_receive),
    "brokerd-client-unix": (brokerd_send, brokerd_receive),
    "nats-py": (nats_send, nats_receive),
    "zenoh": (zenoh_send, zenoh_receive),
    "pyzmq": (pyzmq_send, pyzmq_receive),
    "redis-py": (redis_send, redis_receive),
}

if __name__ == "__main__":
    library, role, where, file = sys.argv[1:]
    ENDS[library][role == "receive"](where, Board(Path(file)))
