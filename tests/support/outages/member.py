"""One end of the traffic that faults happen to, a process by itself, so that it can be
killed, stopped and cut off.

``member.py FACE receive ADDRESS NAME KEY LEDGER CA`` notes every message and request it
is given, and answers requests. ``member.py FACE send ADDRESS NAME KEY LEDGER CA
RECIPIENT...`` sends numbered messages with receipts, and requests, to each recipient,
and notes what became of each. A note is a line of the file LEDGER, written at once: it
outlives the process. FACE is asyncio or blocking. CA is the file of who vouches for the
broker, where it speaks TLS, else "-".

Both reconnect as the library does. A line on standard input ends the sending, a second
one the process.
"""

from __future__ import annotations

import asyncio
import sys

import blocking_member
from ledger import MESSAGES, PATIENCE_S, PAUSE_S, REQUESTS, Ledger, Outcomes, context_of

from brokerd_client import aio
from brokerd_client.errors import BrokerdError


def receive(client: aio.Client, ledger: Ledger, all_here: asyncio.Event) -> None:
    def take(message: aio.Message) -> None:
        if message.sender == client.name:
            all_here.set()
        else:
            ledger.note("message", message.sender, message.payload)

    client.on_message(take)

    def answer(message: aio.Message) -> object:
        ledger.note("request", message.sender, message.payload)
        return message.payload

    client.on_request(answer)


class Sender:
    """Sends to one recipient after the other, in order, until told to stop."""

    def __init__(self, client: aio.Client, ledger: Ledger, recipients: list[str]) -> None:
        self.client = client
        self.ledger = ledger
        self.over = asyncio.Event()
        self._outcomes = Outcomes(ledger)
        client.on_undelivered(self._outcomes.undelivered)
        self.tasks = [asyncio.create_task(self._send(each)) for each in recipients]

    async def _send(self, to: str) -> None:
        numbers = {"message": 0, "request": 0}
        while not self.over.is_set():
            first = numbers["message"]
            numbers["message"] += MESSAGES
            lot = [(to, number) for number in range(first, first + MESSAGES)]
            outcomes: list[object]
            try:
                outcomes = await self.client.send_many_confirmed(lot, timeout=PATIENCE_S)
            except BrokerdError as error:
                outcomes = [error] * MESSAGES
            self._outcomes.note(to, first, outcomes)
            first = numbers["request"]
            numbers["request"] += REQUESTS
            outgoing_requests = [self._ask(to, number) for number in range(first, first + REQUESTS)]
            for number, word in enumerate(await asyncio.gather(*outgoing_requests), first):
                self.ledger.note("request", to, number, word)
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, to: str, number: int) -> str:
        try:
            answer = await self.client.request(to, number, timeout=PATIENCE_S)
        except BrokerdError as error:
            return type(error).__name__
        assert answer.payload == number
        return "Reply"


async def main(
    role: str, address: str, name: str, key: str, ledger_file: str, ca: str, *recipients: str
) -> None:
    ledger = Ledger(ledger_file)
    client = await aio.connect(address, name, key, ssl=context_of(ca), timeout=PATIENCE_S)
    all_here = asyncio.Event()
    sender = None
    if role == "receive":
        receive(client, ledger, all_here)
    else:
        sender = Sender(client, ledger, list(recipients))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if sender is not None:
        sender.over.set()
        await asyncio.gather(*sender.tasks)
    else:
        # All that was accepted for this client before comes before its own message to
        # itself.
        await client.send_confirmed(name, "all", timeout=PATIENCE_S)
        await asyncio.wait_for(all_here.wait(), PATIENCE_S)
    print("done", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await client.close()


if __name__ == "__main__":
    if sys.argv[1] == "blocking":
        blocking_member.main(*sys.argv[2:])
    else:
        asyncio.run(main(*sys.argv[2:]))
