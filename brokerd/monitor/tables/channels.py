"""The table of channels, and of the OPENs that wait for an answer."""

from __future__ import annotations

import itertools
from typing import Any

from brokerd.core.broker import Broker
from brokerd.core.channels import Channel
from brokerd.core.exchange import Client
from brokerd.monitor.tables.table import SHOWN, Row, Table, in_turns

__all__ = ["ChannelTable", "channels_of"]


class ChannelTable(Table):
    """All channels, with rates since the reading before."""

    COLUMNS = (
        "caller",
        "recipient",
        "state",
        "since",
        "to_recipient",
        "to_caller",
        "bytes_to_recipient",
        "bytes_to_caller",
        "waiting_bytes",
    )
    SEARCHED = ("caller", "recipient", "state")

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self._broker = broker
        self._before: dict[Channel, tuple[int, int]] = {}

    async def _read_rows(self, elapsed: float) -> list[Row]:
        channels = self._broker.channels
        before, counters = self._before, {}
        rows = [_waiting(each.caller, each.recipient) for each in channels.openings()]
        async for channel in in_turns(list(channels.open)):
            if channel.relay is None:
                # It has ended meanwhile.
                continue
            row = _row(channel)
            counters[channel] = sums = row["bytes_to_recipient"], row["bytes_to_caller"]
            then = before.get(channel, sums)
            row["to_recipient"] = round((sums[0] - then[0]) / elapsed, 1)
            row["to_caller"] = round((sums[1] - then[1]) / elapsed, 1)
            rows.append(row)
        self._before = counters
        return rows


def _row(channel: Channel) -> Row:
    return {
        "caller": channel.caller.name,
        "recipient": channel.recipient.name,
        "state": "open",
        "since": channel.since,
        **channel.relay.describe(),
    }


def _waiting(caller: Client, recipient: Client) -> Row:
    """Return the row of an OPEN that its recipient has not answered."""
    numbers = dict.fromkeys(ChannelTable.COLUMNS[4:], 0)
    state = "waits for an answer"
    return {"caller": caller.name, "recipient": recipient.name, "state": state, **numbers} | {
        "since": None
    }


def channels_of(broker: Broker, client: Client) -> list[dict[str, Any]]:
    """Return the first channels of one client."""
    own = (channel for channel in broker.channels.open if client in channel.clients)
    return [_row(channel) for channel in itertools.islice(own, SHOWN)]
