"""The table of clients, and the details of one client."""

from __future__ import annotations

import itertools
from typing import Any, Final

from brokerd.core.broker import Broker
from brokerd.core.exchange import Client
from brokerd.core.incidents import place_of
from brokerd.core.session import Session
from brokerd.monitor.tables.channels import channels_of
from brokerd.monitor.tables.table import SHOWN, Row, Table, in_turns

__all__ = ["ClientTable", "details_of"]

#: The columns whose values are differences to the reading before, by the second.
_RATES: Final = ("in", "out", "bytes_in", "bytes_out")


class ClientTable(Table):
    """All clients, with rates since the reading before.

    ``stored`` and ``dead`` are the messages and the dead letters in a client's mailbox,
    None without one.
    """

    COLUMNS = (
        "name",
        "connections",
        *_RATES,
        "waiting",
        "fill",
        "stored",
        "dead",
        "errors",
        "state",
    )
    SEARCHED = ("name", "state")

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self._broker = broker
        self._before: dict[str, tuple[int, ...]] = {}

    async def _read_rows(self, elapsed: float) -> list[Row]:
        before, counters = self._before, {}
        rows = []
        async for client in in_turns(list(self._broker.exchange.clients.values())):
            row, sums = _row(client)
            name = client.name
            counters[name] = sums
            then = before.get(name, sums)
            for rate, old, new in zip(_RATES, then, sums, strict=True):
                row[rate] = round(max(0, new - old) / elapsed, 1)
            rows.append(row)
        self._before = counters
        return rows


def _row(client: Client) -> tuple[Row, tuple[int, ...]]:
    """Return a client's row without its rates, and the counters that they come from."""
    messages_in = messages_out = bytes_in = bytes_out = waiting = errors = 0
    fill = 0.0
    for session in client.sessions.values():
        outbox = session.outbox
        messages_in += session.messages_in
        messages_out += outbox.frames
        bytes_in += session.bytes_in
        bytes_out += outbox.size
        errors += session.errors_in
        if outbox.waiting:
            waiting += outbox.waiting
            fill = max(fill, outbox.waiting / outbox.limit)
    flight = client.flight
    if flight:
        waiting += flight.size
        fill = max(fill, flight.size / client.config.queue)
    mailbox = client.mailbox
    row = {
        "name": client.name,
        "connections": len(client.sessions),
        "waiting": waiting,
        "fill": round(fill, 3),
        "stored": None if mailbox is None else mailbox.messages - mailbox.dead,
        "dead": None if mailbox is None else mailbox.dead,
        "errors": errors,
        "state": _state_of(client),
    }
    return row, (messages_in, messages_out, bytes_in, bytes_out)


def _state_of(client: Client) -> str:
    """Return the state of a client in words, with the cause."""
    if not client.sessions:
        return "expected, offline" if client.config.expected else "offline"
    state = "online"
    for session in client.sessions.values():
        if session.outbox.blocked:
            holds = sum(len(each.waiters) for each in client.sessions.values())
            return f"slow, holds {holds}" if holds else "slow"
        if session.held_by is not None:
            state = f"held by {session.held_by.address}"
    return state


def details_of(broker: Broker, name: str) -> dict[str, Any] | None:
    """Return all that the page shows of one client, or None if there is none."""
    client = broker.exchange.resolve(name)
    if client is None:
        return None
    config = client.config
    sessions = list(itertools.islice(client.sessions.values(), SHOWN))
    subscriptions = itertools.chain.from_iterable(each.subscriptions for each in sessions)
    incidents = broker.incidents.newest(name)[:SHOWN]
    return {
        "name": name,
        "state": _state_of(client),
        "since": client.changed_at,
        "place": str(config.source),
        "admin": config.admin,
        "queue": config.queue,
        "when_full": str(config.when_full),
        "rules": {
            field: {
                "patterns": [rule.pattern for rule in rules[:SHOWN]],
                "where": place_of(rules),
            }
            for field, rules in (
                ("send_to", config.send_to),
                ("publish", config.publish),
                ("subscribe", config.subscribe),
                ("open_from", config.open_from),
            )
        },
        "connections": [_connection(session) for session in sessions],
        "subscriptions": [
            topic if group is None else f"{topic} (group {group})"
            for topic, group in itertools.islice(subscriptions, SHOWN)
        ],
        "channels": channels_of(broker, client),
        "mailbox": None if client.mailbox is None else client.mailbox.counts(),
        "incidents": [incident.as_object() for incident in incidents],
    }


def _connection(session: Session) -> dict[str, Any]:
    return {
        "address": session.address,
        "peer": session.peer,
        "since": session.since,
        "in": session.messages_in,
        "out": session.messages_out,
        "waiting": session.outbox.waiting,
        "queue": session.outbox.limit,
        "slow": session.outbox.blocked,
        "held_by": None if session.held_by is None else session.held_by.address,
        "holds": len(session.waiters),
        "unanswered": len(session.incoming_requests),
        "subscriptions": len(session.subscriptions),
    }
