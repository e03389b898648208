"""One member of a pool, as a process: it answers requests until it is killed.
Arguments: address, name, key.
"""

from __future__ import annotations

import asyncio
import sys

from brokerd_client import aio


async def main(address: str, name: str, key: str) -> None:
    client = await aio.connect(address, name=name, key=key)
    client.on_request(lambda message: message.payload)
    print(client.address, flush=True)
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:4]))
