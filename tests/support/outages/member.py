"""One member of the traffic that faults happen to: a process of its own, so that a test
can kill, stop or disconnect it.

``member.py FACE receive ADDRESS NAME KEY NOTES CA`` notes every message and request
that it receives, and answers requests. ``member.py FACE send ADDRESS NAME KEY NOTES CA
RECIPIENT...`` sends numbered messages with receipts, and requests, to each recipient,
and notes the outcome of each. A note is a line of the file NOTES, written at once, so
it survives the process. FACE is asyncio or blocking. CA is the file with the CA of the
broker's certificate, or "-" without TLS.

Both reconnect as the library does. A line on standard input ends the sending, a second
one the process.
"""

from __future__ import annotations

import asyncio
import sys

import blocking_member
from note_file import MESSAGES, PAUSE_S, REQUESTS, TIMEOUT_S, NoteFile, Outcomes, context_of

from brokerd_client import aio
from brokerd_client.errors import BrokerdError


def receive(client: aio.Client, notes: NoteFile, all_received: asyncio.Event) -> None:
    def take(message: aio.Message) -> None:
        if message.sender == client.name:
            all_received.set()
        else:
            notes.note("message", message.sender, message.payload)

    client.on_message(take)

    def answer(message: aio.Message) -> object:
        notes.note("request", message.sender, message.payload)
        return message.payload

    client.on_request(answer)


class Sender:
    """Sends to all recipients at the same time, to each in order, until it is stopped."""

    def __init__(self, client: aio.Client, notes: NoteFile, recipients: list[str]) -> None:
        self.client = client
        self.notes = notes
        self.stopping = asyncio.Event()
        self._outcomes = Outcomes(notes)
        client.on_undelivered(self._outcomes.undelivered)
        self.tasks = [asyncio.create_task(self._send(each)) for each in recipients]

    async def _send(self, to: str) -> None:
        numbers = {"message": 0, "request": 0}
        while not self.stopping.is_set():
            first = numbers["message"]
            numbers["message"] += MESSAGES
            bulk = [(to, number) for number in range(first, first + MESSAGES)]
            outcomes: list[object]
            try:
                outcomes = await self.client.send_many_confirmed(bulk, timeout=TIMEOUT_S)
            except BrokerdError as error:
                outcomes = [error] * MESSAGES
            self._outcomes.note(to, first, outcomes)
            first = numbers["request"]
            numbers["request"] += REQUESTS
            requests = [self._ask(to, number) for number in range(first, first + REQUESTS)]
            for number, word in enumerate(await asyncio.gather(*requests), first):
                self.notes.note("request", to, number, word)
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, to: str, number: int) -> str:
        try:
            answer = await self.client.request(to, number, timeout=TIMEOUT_S)
        except BrokerdError as error:
            return type(error).__name__
        assert answer.payload == number
        return "Reply"


async def main(
    role: str, address: str, name: str, key: str, note_file: str, ca: str, *recipients: str
) -> None:
    notes = NoteFile(note_file)
    client = await aio.connect(address, name, key, ssl=context_of(ca), timeout=TIMEOUT_S)
    all_received = asyncio.Event()
    sender = None
    if role == "receive":
        receive(client, notes, all_received)
    else:
        sender = Sender(client, notes, list(recipients))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if sender is not None:
        sender.stopping.set()
        await asyncio.gather(*sender.tasks)
    else:
        # Messages accepted for this client earlier arrive before its message to itself.
        await client.send_confirmed(name, "all", timeout=TIMEOUT_S)
        await asyncio.wait_for(all_received.wait(), TIMEOUT_S)
    print("done", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await client.close()


if __name__ == "__main__":
    if sys.argv[1] == "blocking":
        blocking_member.main(*sys.argv[2:])
    else:
        asyncio.run(main(*sys.argv[2:]))
