"""A member of the traffic, as member.py describes it, with the blocking client."""

from __future__ import annotations

import contextlib
import sys
import threading

from note_file import MESSAGES, PAUSE_S, REQUESTS, TIMEOUT_S, NoteFile, Outcomes, context_of

import brokerd_client
from brokerd_client.errors import BrokerdError
from brokerd_client.wire.envelope import Kind


def receive(client: brokerd_client.Client, notes: NoteFile, all_received: threading.Event) -> None:
    """Note received messages, in order, until the client is closed."""
    with contextlib.suppress(BrokerdError):
        for message in client:
            if message.kind is Kind.REQUEST:
                notes.note("request", message.sender, message.payload)
                # The requester may have left.
                with contextlib.suppress(BrokerdError):
                    client.reply(message, message.payload)
            elif message.sender == client.name:
                all_received.set()
            else:
                notes.note("message", message.sender, message.payload)


def send(
    client: brokerd_client.Client,
    notes: NoteFile,
    outcomes: Outcomes,
    to: str,
    stopping: threading.Event,
) -> None:
    """Send messages and requests, in order, until ``stopping`` is set."""
    message = request = 0
    while not stopping.wait(PAUSE_S):
        bulk = [(to, number) for number in range(message, message + MESSAGES)]
        found: list[object]
        try:
            found = client.send_many_confirmed(bulk, timeout=TIMEOUT_S)
        except BrokerdError as error:
            found = [error] * MESSAGES
        outcomes.note(to, message, found)
        message += MESSAGES
        for _ in range(REQUESTS):
            try:
                assert client.request(to, request, timeout=TIMEOUT_S).payload == request
                word = "Reply"
            except BrokerdError as error:
                word = type(error).__name__
            notes.note("request", to, request, word)
            request += 1


def main(
    role: str, address: str, name: str, key: str, note_file: str, ca: str, *recipients: str
) -> None:
    notes = NoteFile(note_file)
    client = brokerd_client.connect(address, name, key, ssl=context_of(ca), timeout=TIMEOUT_S)
    all_received, stopping = threading.Event(), threading.Event()
    if role == "receive":
        threads = [threading.Thread(target=receive, args=(client, notes, all_received))]
    else:
        outcomes = Outcomes(notes)
        client.on_undelivered(outcomes.undelivered)
        threads = [
            threading.Thread(target=send, args=(client, notes, outcomes, to, stopping))
            for to in recipients
        ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.readline()
    if role == "receive":
        # Messages accepted for this client earlier arrive before its message to itself.
        client.send_confirmed(name, "all", timeout=TIMEOUT_S)
        assert all_received.wait(TIMEOUT_S)
    else:
        stopping.set()
        for thread in threads:
            thread.join()
    print("done", flush=True)
    sys.stdin.readline()
    client.close()
