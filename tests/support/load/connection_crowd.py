"""Clients that connect all at once, in a process of their own, with the default
timeout.

python connection_crowd.py ADDRESS FACE CA FIRST COUNT prints ready, waits for a line,
and prints the outcomes, counted, as JSON. FACE is aio or threads. CA is a file with the
issuer of the listener's certificate, or empty. The clients are cFIRST and so on; each
has the key that support.keys gives it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import sys
import threading
from collections import Counter

from support.keys import key_of

import brokerd_client
from brokerd_client import aio


async def connect_tasks(
    address: str, names: list[str], context: ssl.SSLContext | None
) -> Counter[str]:
    async def connect(name: str) -> aio.Client | str:
        try:
            return await aio.connect(address, name, key_of(name), ssl=context)
        except brokerd_client.BrokerdError as error:
            return f"{type(error).__name__}: {error}"

    clients = await asyncio.gather(*map(connect, names))
    for client in clients:
        if isinstance(client, aio.Client):
            await client.close()
    return Counter(client if isinstance(client, str) else "in" for client in clients)


def connect_threads(address: str, names: list[str], context: ssl.SSLContext | None) -> Counter[str]:
    outcomes: list[str] = []
    clients = []
    barrier = threading.Barrier(len(names))

    def connect(name: str) -> None:
        barrier.wait()
        try:
            clients.append(brokerd_client.connect(address, name, key_of(name), ssl=context))
            outcomes.append("in")
        except brokerd_client.BrokerdError as error:
            outcomes.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=connect, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    return Counter(outcomes)


def main(address: str, face: str, ca: str, first: int, count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    names = [f"c{number}" for number in range(first, first + count)]
    context = ssl.create_default_context(cafile=ca) if ca else None
    print("ready", flush=True)
    sys.stdin.readline()
    if face == "aio":
        outcomes = asyncio.run(connect_tasks(address, names, context))
    else:
        outcomes = connect_threads(address, names, context)
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
