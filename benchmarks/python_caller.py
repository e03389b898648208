"""One end of a measurement of requests, or of confirmed sends, in Python: ``python -m
benchmarks.python_caller MANNER ROLE ADDRESS FILE``.

ROLE is send (as c0000) or receive (as c0001), FILE as in python_peer.py. MANNER is the
name of an entrant with the number of calls that may be under way. The sender compares
each reply with its request. ``received`` on the board counts replies, or with confirmed
sends what the receiver got.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from benchmarks.dialects import key_of
from benchmarks.python_peer import PAYLOAD, RECEIVER, SENDER, Board, brokerd_receive
from brokerd_client.wire.envelope import HEADER, CodecId, Kind

#: Confirmed sends that begin at once.
AT_ONCE = 1000


def run(loop: str, main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on asyncio's own event loop, or on uvloop."""
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


async def keep_calling(
    board: Board, under_way: int, call: Callable[[bytes], Awaitable[bytes]]
) -> None:
    """Call in some tasks, each of which waits for its reply before its next call."""
    count = 0

    async def caller(number: int) -> None:
        nonlocal count
        payload = b"%016d" % number
        while not board[Board.STOP]:
            if await call(payload) != payload:
                raise RuntimeError("a reply belongs to another request")
            count += 1
            board[Board.RECEIVED] = count

    await asyncio.gather(*map(caller, range(under_way)))
    board[Board.SENT] = count


def pumped(board: Board, call: Callable[[], None]) -> None:
    """Call, one call at a time, until told to stop."""
    count = 0
    while not board[Board.STOP]:
        call()
        count += 1
        board[Board.RECEIVED] = count
    board[Board.SENT] = count


# brokerd_client, asyncio


async def aio_call(address: str, board: Board, under_way: int) -> None:
    from brokerd_client import aio

    async with aio.connect(address, SENDER, key_of(SENDER)) as client:

        async def call(payload: bytes) -> bytes:
            return (await client.request(RECEIVER, payload)).body

        await keep_calling(board, under_way, call)


async def aio_answer(address: str, board: Board) -> None:
    from brokerd_client import aio

    async with aio.connect(address, RECEIVER, key_of(RECEIVER)) as client:
        client.on_request(lambda message: message.payload)
        board[Board.RECEIVER_READY] = 1
        await asyncio.Event().wait()


async def aio_confirm(address: str, board: Board, *, many: bool) -> None:
    """Send with receipts: one call for each message, or one call for many."""
    from brokerd_client import Receipt, aio

    async with aio.connect(address, SENDER, key_of(SENDER)) as client:
        count = 0
        while not board[Board.STOP]:
            if many:
                results = await client.send_many_confirmed([(RECEIVER, PAYLOAD)] * AT_ONCE)
            else:
                calls = [client.send_confirmed(RECEIVER, PAYLOAD) for _ in range(AT_ONCE)]
                results = await asyncio.gather(*calls)
            if not all(isinstance(result, Receipt) for result in results):
                raise RuntimeError("a message was not confirmed")
            count += AT_ONCE
        board[Board.SENT] = count


# nats-py


async def nats_call(address: str, board: Board, under_way: int) -> None:
    import nats

    client = await nats.connect(f"nats://{address}", user=SENDER, password=key_of(SENDER))

    async def call(payload: bytes) -> bytes:
        return bytes((await client.request(RECEIVER, payload, timeout=30)).data)

    await keep_calling(board, under_way, call)
    await client.close()


async def nats_answer(address: str, board: Board) -> None:
    import nats

    client = await nats.connect(f"nats://{address}", user=RECEIVER, password=key_of(RECEIVER))

    async def answer(message: Any) -> None:
        await message.respond(message.data)

    await client.subscribe(RECEIVER, cb=answer)
    await client.flush()
    board[Board.RECEIVER_READY] = 1
    await asyncio.Event().wait()


# The blocking client, and the standard library's connections with brokerd's frames


def blocking_call(address: str, board: Board) -> None:
    import brokerd_client

    with brokerd_client.connect(address, SENDER, key_of(SENDER)) as client:

        def call() -> None:
            if client.request(RECEIVER, PAYLOAD).body != PAYLOAD:
                raise RuntimeError("a reply belongs to another request")

        pumped(board, call)


def blocking_answer(address: str, board: Board) -> None:
    import brokerd_client

    with brokerd_client.connect(address, RECEIVER, key_of(RECEIVER)) as client:
        client.on_request(lambda message: message.payload)
        board[Board.RECEIVER_READY] = 1
        threading.Event().wait()


def _stock(address: str, name: str) -> Connection:
    host, _, port = address.rpartition(":")
    return Client((host, int(port)), authkey=key_of(name).encode())


def stock_call(address: str, board: Board) -> None:
    with _stock(address, SENDER) as conn:
        head = HEADER.pack(Kind.REQUEST, 0, CodecId.RAW, len(RECEIVER), 7) + RECEIVER.encode()

        def call() -> None:
            conn.send_bytes(head + PAYLOAD)
            reply = conn.recv_bytes()
            kind, _, _, size, message_id = HEADER.unpack_from(reply)
            if (kind, message_id, reply[HEADER.size + size :]) != (Kind.REPLY, 7, PAYLOAD):
                raise RuntimeError("a reply belongs to another request")

        pumped(board, call)


def stock_answer(address: str, board: Board) -> None:
    with _stock(address, RECEIVER) as conn:
        board[Board.RECEIVER_READY] = 1
        while True:
            request = conn.recv_bytes()
            _, _, codec, size, message_id = HEADER.unpack_from(request)
            conn.send_bytes(
                HEADER.pack(Kind.REPLY, 0, codec, size, message_id) + request[HEADER.size :]
            )


def main(manner: str, under_way: int, role: str, address: str, board: Board) -> None:
    """Play one end, until told to stop or ended."""
    calls = role == "send"
    library, _, variant = manner.partition("/")
    match library, variant:
        case "brokerd-client", "asyncio" | "uvloop":
            run(
                variant,
                (aio_call(address, board, under_way) if calls else aio_answer(address, board)),
            )
        case "nats-py", _:
            run(
                variant,
                (nats_call(address, board, under_way) if calls else nats_answer(address, board)),
            )
        case "brokerd-client", "blocking":
            (blocking_call if calls else blocking_answer)(address, board)
        case "stock-client", _:
            (stock_call if calls else stock_answer)(address, board)
        case "brokerd-client", _:
            if calls:
                run("asyncio", aio_confirm(address, board, many="many" in variant))
            else:
                brokerd_receive(address, board)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], Board(Path(sys.argv[5])))
