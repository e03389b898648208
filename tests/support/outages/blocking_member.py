"""One end of the traffic, as member.py describes it, with the blocking client."""

from __future__ import annotations

import contextlib
import sys
import threading

from ledger import MESSAGES, PATIENCE_S, PAUSE_S, REQUESTS, Ledger, Outcomes, context_of

import brokerd_client
from brokerd_client.errors import BrokerdError
from brokerd_client.wire.envelope import Kind


def receive(client: brokerd_client.Client, ledger: Ledger, all_here: threading.Event) -> None:
    """Note what comes, in its order, until the client is closed."""
    with contextlib.suppress(BrokerdError):
        for message in client:
            if message.kind is Kind.REQUEST:
                ledger.note("request", message.sender, message.payload)
                # Nobody may be there to take it any more.
                with contextlib.suppress(BrokerdError):
                    client.reply(message, message.payload)
            elif message.sender == client.name:
                all_here.set()
            else:
                ledger.note("message", message.sender, message.payload)


def send(
    client: brokerd_client.Client,
    ledger: Ledger,
    outcomes: Outcomes,
    to: str,
    over: threading.Event,
) -> None:
    """Send messages and requests, in order, until it is over."""
    message = request = 0
    while not over.wait(PAUSE_S):
        lot = [(to, number) for number in range(message, message + MESSAGES)]
        found: list[object]
        try:
            found = client.send_many_confirmed(lot, timeout=PATIENCE_S)
        except BrokerdError as error:
            found = [error] * MESSAGES
        outcomes.note(to, message, found)
        message += MESSAGES
        for _ in range(REQUESTS):
            try:
                assert client.request(to, request, timeout=PATIENCE_S).payload == request
                word = "Reply"
            except BrokerdError as error:
                word = type(error).__name__
            ledger.note("request", to, request, word)
            request += 1


def main(
    role: str, address: str, name: str, key: str, ledger_file: str, ca: str, *recipients: str
) -> None:
    ledger = Ledger(ledger_file)
    client = brokerd_client.connect(address, name, key, ssl=context_of(ca), timeout=PATIENCE_S)
    all_here, over = threading.Event(), threading.Event()
    if role == "receive":
        threads = [threading.Thread(target=receive, args=(client, ledger, all_here))]
    else:
        outcomes = Outcomes(ledger)
        client.on_undelivered(outcomes.undelivered)
        threads = [
            threading.Thread(target=send, args=(client, ledger, outcomes, to, over))
            for to in recipients
        ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.readline()
    if role == "receive":
        # All that was accepted for this client before comes before its own message to
        # itself.
        client.send_confirmed(name, "all", timeout=PATIENCE_S)
        assert all_here.wait(PATIENCE_S)
    else:
        over.set()
        for thread in threads:
            thread.join()
    print("done", flush=True)
    sys.stdin.readline()
    client.close()
