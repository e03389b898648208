"""The tables of the monitor's page, without sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.fake_network import FakeNet, client
from support.joined_brokers import JoinedBrokers
from support.mailbox_net import MailboxNet, ack, open_mailbox, with_mailbox

from brokerd.config.values import WhenFull
from brokerd.core.channels import Channel
from brokerd.monitor.tables import mailboxes as mailboxes_module
from brokerd.monitor.tables import table as table_module
from brokerd.monitor.tables.channels import ChannelTable
from brokerd.monitor.tables.clients import ClientTable, details_of
from brokerd.monitor.tables.hosts import HostTable
from brokerd.monitor.tables.mailboxes import DeadLetters, MailboxTable
from brokerd.monitor.tables.table import Table
from brokerd.monitor.tables.topics import TopicTable
from brokerd_client.wire.envelope import Envelope, Kind


def read(table: Table) -> Table:
    """Return a table that has been read."""
    asyncio.run(table.read())
    return table


def page_of(table: Table, query: dict[str, str]) -> dict[str, Any]:
    """Return a page of a table."""
    return asyncio.run(table.page(query))


def names_in(page: dict[str, Any]) -> list[str]:
    """Return the names of the rows."""
    return [row["name"] for row in page["rows"]]


@pytest.mark.parametrize("rows_a_turn", [2000, 7])
def test_client_table_is_sorted_filtered_and_cut_to_a_page(
    monkeypatch: pytest.MonkeyPatch, rows_a_turn: int
) -> None:
    """A table of very many clients is sent in pages of a hundred rows. These are the same
    when they are selected in several turns.
    """
    monkeypatch.setattr(table_module, "_SORTED", rows_a_turn)
    net = FakeNet(*(client(f"c{number:04}") for number in range(1000)))
    for number in (5, 500):
        net.connect(f"c{number:04}")
    table = read(ClientTable(net.broker))

    first = page_of(table, {})
    assert (first["total"], first["found"], len(first["rows"])) == (1000, 1000, 100)
    assert names_in(first)[0] == "c0000"
    assert names_in(page_of(table, {"from": "950"}))[0] == "c0950"
    assert names_in(page_of(table, {"from": "5000"})) == ["c0999"]
    assert names_in(page_of(table, {"from": "x", "sort": "?"}))[0] == "c0000"
    assert names_in(page_of(table, {"sort": "connections", "reverse": "1"}))[:2] == [
        "c0500",
        "c0005",
    ]
    assert names_in(page_of(table, {"filter": "C009"})) == [f"c009{digit}" for digit in range(10)]
    assert names_in(page_of(table, {"filter": "online"})) == ["c0005", "c0500"]
    assert page_of(table, {"filter": "nothing"})["rows"] == []


def test_client_table_names_slow_client_and_what_a_held_one_waits_for() -> None:
    """The state tells the cause, as `brokerctl top` does."""
    net = FakeNet(client("alice"), client("bob", queue=1000, when_full=WhenFull.WAIT))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for _ in range(3):
        alice.message("bob", bytes(400))

    rows = {row["name"]: row for row in page_of(read(ClientTable(net.broker)), {})["rows"]}

    assert rows["alice"]["state"] == "held by bob"
    assert rows["bob"]["state"] == "slow, holds 1"
    assert rows["bob"]["fill"] > 0.8
    details = details_of(net.broker, "bob")
    assert details is not None
    assert details["connections"][0]["holds"] == 1


def test_client_table_rates_are_those_since_the_last_reading() -> None:
    """A connection that ended meanwhile makes no negative rate."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")

    async def rates() -> list[float]:
        table = ClientTable(net.broker)
        await table.read()
        alice.message("bob", b"x")
        await table.read()
        during = table.rows[0]["in"]
        alice.leave()
        await table.read()
        return [during, table.rows[0]["in"]]

    during, after = asyncio.run(rates())
    assert during > 0
    assert after == 0
    bob.leave()


def test_client_table_sorts_clients_without_mailbox_behind_those_with_one() -> None:
    """An empty mailbox is not the same as none."""
    net = MailboxNet(client("alice"), with_mailbox("bob"), with_mailbox("carol"))
    net.connect("alice").message("carol", b"x")

    page = page_of(read(ClientTable(net.broker)), {"sort": "stored", "reverse": "1"})

    assert [(row["name"], row["stored"]) for row in page["rows"]] == [
        ("carol", 1),
        ("bob", 0),
        ("alice", None),
    ]


def test_topic_table_counts_subscriptions_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of different connections to one pattern are added up."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    for peer, topic in ((alice, "a.*"), (alice, "b"), (bob, "a.*")):
        peer.ask("subscribe", topic=topic)

    rows = page_of(read(TopicTable(net.broker)), {"sort": "subscriptions", "reverse": "1"})["rows"]

    assert [(row["pattern"], row["subscriptions"]) for row in rows] == [("a.*", 2), ("b", 1)]
    monkeypatch.setattr("brokerd.monitor.tables.topics._COUNTED", 1)
    assert len(read(TopicTable(net.broker)).rows) == 2


class FakeRelay:
    """What the network layer would put into a channel."""

    def __init__(self) -> None:
        self.moved = 0

    def describe(self) -> dict[str, Any]:
        """Return what a relay tells of itself."""
        return {
            "caller_peer": "",
            "recipient_peer": "",
            "bytes_to_recipient": self.moved,
            "bytes_to_caller": 0,
            "waiting_bytes": 0,
        }


def opened(net: FakeNet, caller: str, to: str) -> Channel:
    """Open a channel."""
    channels, clients = net.broker.channels, net.broker.exchange.clients
    channels.ask(clients[caller], Envelope(Kind.OPEN, 1, to), b"", None, 5, net.now)
    opening = channels.take(clients[to], Envelope(Kind.JOIN, 5), b"")
    return channels.begin(opening, FakeRelay(), net.now)


def test_channel_table_has_open_channels_and_those_that_wait() -> None:
    """The rates are those since the last reading; a channel that ended has no row."""
    net = FakeNet(client("alice"), client("bob"))
    net.connect("bob").ask("listen")
    channel = opened(net, "alice", "bob")
    clients = net.broker.exchange.clients
    net.broker.channels.ask(clients["bob"], Envelope(Kind.OPEN, 1, "bob"), b"", None, 6, net.now)

    async def rows() -> list[list[dict[str, Any]]]:
        table = ChannelTable(net.broker)
        await table.read()
        channel.relay.moved += 1000
        await table.read()
        pages = [(await table.page({"sort": "state"}))["rows"]]
        net.broker.channels.end(channel, 1000)
        await table.read()
        return [*pages, (await table.page({"filter": "open"}))["rows"]]

    before, after = asyncio.run(rows())

    assert [(row["caller"], row["state"]) for row in before] == [
        ("alice", "open"),
        ("bob", "waits for an answer"),
    ]
    assert before[0]["to_recipient"] > 0
    assert after == []


def test_mailbox_table_names_full_orphaned_and_unread_mailboxes() -> None:
    """An orphaned mailbox is shown as long as it has messages."""
    net = MailboxNet(client("alice"), with_mailbox("bob", messages=1), with_mailbox("carol"))
    alice, carol = net.connect("alice"), net.connect("carol")
    for name in ("bob", "carol"):
        alice.message(name, b"x")
    open_mailbox(carol)

    rows = {row["name"]: row for row in page_of(read(MailboxTable(net.broker)), {})["rows"]}

    assert (rows["bob"]["state"], rows["bob"]["ready"], rows["bob"]["fill"]) == ("full", 1, 1)
    assert (rows["carol"]["state"], rows["carol"]["held"]) == ("open", 1)
    carol.leave()
    net.broker.mailboxes.remove("bob")
    page = page_of(read(MailboxTable(net.broker)), {})
    assert [row["state"] for row in page["rows"]] == ["orphaned", "not open"]


def dead_letters(net: MailboxNet) -> DeadLetters:
    """Return the details of mailboxes; bob's has two dead letters."""
    alice, bob = net.connect("alice"), net.connect("bob")
    open_mailbox(bob)
    for seq in (1, 2):
        alice.message("bob", b"x")
        ack(bob, seq, "dead", reason=f"reason {seq}")
    return DeadLetters(net.broker)


async def details(letters: DeadLetters, net: MailboxNet) -> dict[str, Any]:
    """Return bob's details; the store answers at once."""
    task = asyncio.get_running_loop().create_task(letters.details_of("bob"))
    await asyncio.sleep(0)
    net.settle()
    found = await task
    assert found is not None
    return found


def test_dead_letters_are_read_from_disk_once_in_some_seconds() -> None:
    """However many pages show them, and however many dead letters come."""
    net = MailboxNet(client("alice"), with_mailbox("bob"))
    letters = dead_letters(net)

    async def both() -> list[dict[str, Any]]:
        first = await details(letters, net)
        net.store.queue.clear()
        second = await details(letters, net)
        return [first, second]

    first, second = asyncio.run(both())

    assert [each["error"] for each in first["letters"]] == ["reason 1", "reason 2"]
    assert second["letters"] == first["letters"]
    assert first["limits"]["attempts"] == 10
    assert [each["address"] for each in first["connections"]] == ["bob"]


def test_dead_letters_of_store_that_does_not_answer_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page says so, and an answer that comes late harms nothing."""
    monkeypatch.setattr(mailboxes_module, "_ANSWER_S", 0.01)
    net = MailboxNet(client("alice"), with_mailbox("bob"))
    letters = dead_letters(net)
    net.is_prompt = False

    async def late() -> dict[str, Any] | None:
        found = await letters.details_of("bob")
        net.answer()
        return found

    found = asyncio.run(late())

    assert found is not None
    assert (found["dead"], found["letters"]) == (2, None)


@pytest.mark.parametrize("trouble", ["failed", "paused"])
def test_dead_letters_are_not_asked_of_store_that_has_failed_or_moves(trouble: str) -> None:
    """An upgrade waits until nothing is on its way to the store."""
    net = MailboxNet(client("alice"), with_mailbox("bob"))
    letters = dead_letters(net)
    if trouble == "failed":
        net.broker.mailboxes.fail("disk full")
    else:
        net.broker.mailboxes.pause()

    found = asyncio.run(letters.details_of("bob"))

    assert found is not None
    assert found["letters"] is None
    assert net.broker.mailboxes.is_quiet


def test_host_table_shows_other_hosts_and_why_one_is_away() -> None:
    """A broker without a cluster has no rows."""
    net = JoinedBrokers(client("alice"))
    a, b, c = net.up("a", "b", "c")
    b.connect_client("alice")
    net.settle()
    c.is_frozen = True
    net.run(8.0)
    rows = page_of(read(HostTable(a.broker_net.broker)), {"sort": "host"})["rows"]

    assert [(row["host"], row["state"], row["names"]) for row in rows] == [
        ("b", "up", 1),
        ("c", "away", 0),
    ]
    assert rows[0]["round_trip_ms"] is not None
    assert rows[1]["last_error"] == "not heard for 5 s"
    away = page_of(read(HostTable(a.broker_net.broker)), {"filter": "away"})
    assert [row["host"] for row in away["rows"]] == ["c"]
    assert page_of(read(HostTable(FakeNet(client("alice")).broker)), {})["rows"] == []
