"""Which channels are opened, without sockets: rules, limits, tokens and outcomes."""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client, error_of
from support.joined_hosts import JoinedHosts

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core.channels import Channel, ChannelRefused, Opening, receipt_frame
from brokerd.core.status import CoreLimits
from brokerd_client.wire.envelope import Envelope, Flag, Kind, encode, parse
from brokerd_client.wire.first_frames import MAX_ANSWER
from brokerd_client.wire.framing import frame

LIMITS = CoreLimits(open_timeout=10.0)


class FakeRelay:
    """What the network layer would put into a channel."""

    relayed = 7

    def describe(self) -> dict[str, Any]:
        return {"waiting_bytes": 0}


def net_of(*more: Any, limits: CoreLimits = LIMITS) -> FakeNet:
    return FakeNet(client("ann"), client("bob"), client("cat"), *more, limits=limits)


def listening(net: FakeNet, name: str) -> Peer:
    peer = net.connect(name)
    assert peer.ask("listen") == {}
    return peer


def ask(net: FakeNet, caller: str, to: str, token: int = 5, payload: bytes = b"") -> Opening:
    """Ask for a channel from a connection that is known by the token."""
    caller_client = net.broker.exchange.clients[caller]
    envelope = Envelope(Kind.OPEN, 1, to)
    opening = net.broker.channels.ask(caller_client, envelope, payload, token, token, net.now)
    net.settle()
    return opening


def take(net: FakeNet, name: str, token: int) -> Opening:
    recipient = net.broker.exchange.clients[name]
    return net.broker.channels.take(recipient, Envelope(Kind.JOIN, token), b"")


def open_channel(net: FakeNet, caller: str, to: str, token: int = 5) -> Channel:
    ask(net, caller, to, token)
    opening = take(net, to, token)
    return net.broker.channels.begin(opening, FakeRelay(), net.now)


def refusals(net: FakeNet) -> list[tuple[int, str]]:
    """Return (token, code) of the callers to be told, and forget them."""
    told = []
    for opening, refusal, _, _ in net.broker.channels.refusals:
        envelope = parse(refusal[4:])
        assert (envelope.kind, envelope.id) == (Kind.ERROR, 1)
        told.append((opening.token, error_of(envelope)))
    net.broker.channels.refusals.clear()
    return told


def code_of_refused(net: FakeNet, *what: Any) -> str:
    with pytest.raises(ChannelRefused) as caught:
        ask(net, *what)
    return str(caught.value.code)


def test_open_is_passed_on_with_the_token() -> None:
    net = net_of()
    bob = listening(net, "bob")
    ask(net, "ann", "bob", 7, b"hello")
    (envelope,) = bob.take()
    assert (envelope.kind, envelope.id, envelope.name, envelope.payload) == (
        Kind.OPEN,
        7,
        "ann",
        b"hello",
    )


def test_open_beyond_queue_is_passed_on() -> None:
    """It is the broker's own frame; also to a recipient whose queue is edited."""
    net = net_of(client("dee", queue=1, when_full=WhenFull.DROP_OLDEST))
    for name in ("bob", "dee"):
        recipient = listening(net, name)
        recipient.block()
        for token in (1, 2):
            ask(net, "ann", name, token)
        recipient.read()
        assert [each.id for each in recipient.take()] == [1, 2]
        recipient.leave()


def test_open_expires_at_its_deadline() -> None:
    net = net_of()
    listening(net, "bob")
    ask(net, "ann", "bob", 1)
    net.advance(4)
    ask(net, "cat", "bob", 2)
    assert net.broker.next_deadline == net.now + 6
    net.advance(6)
    assert refusals(net) == [(1, "expired")]
    net.advance(4)
    assert refusals(net) == [(2, "expired")]
    assert net.broker.next_deadline is None


def test_open_left_in_outbox_of_closed_listener_is_offline() -> None:
    """It is not passed on to another member, and not counted as a lost message."""
    net = FakeNet(client("ann"), client("pool", connections=2))
    first, second = listening(net, "pool"), listening(net, "pool")
    first.block()
    ask(net, "ann", "pool", 1)
    ask(net, "ann", "pool", 2)
    first.leave()
    net.broker.run_deferred(10)
    assert refusals(net) == [(1, "offline")]
    assert [each.id for each in second.take()] == [2]
    assert net.broker.replies.returned.total() == 0


def test_open_to_pool_takes_turns_by_load() -> None:
    """The member with the fewest channels, then the one with the fewest bytes waiting."""
    net = FakeNet(client("ann"), client("pool", connections=2))
    first, second = listening(net, "pool"), listening(net, "pool")
    one = open_channel(net, "ann", "pool", 1)
    two = open_channel(net, "ann", "pool", 2)
    assert (one.listener, two.listener) == (first.session, second.session)
    net.broker.channels.end(one, 10)
    assert ask(net, "ann", "pool", 3).listener is first.session
    first.block()
    net.broker.replies.pass_on(first.session, b"\0\0\0\0")
    net.settle()
    assert ask(net, "ann", "pool", 4).listener is second.session


def test_channel_ended_twice_counts_once() -> None:
    net = net_of()
    listening(net, "bob")
    channel = open_channel(net, "ann", "bob")
    channels = net.broker.channels
    assert channel in channels.open
    for _ in range(2):
        channels.end(channel, 10)
    assert (channels.opened, channels.relayed, channels.open) == (1, 10, {})
    assert not channels._held
    assert not channels._load


def test_channel_keeps_on_when_its_listener_leaves() -> None:
    net = net_of()
    bob, cat = listening(net, "bob"), listening(net, "cat")
    channel, other = open_channel(net, "ann", "bob", 1), open_channel(net, "ann", "cat", 2)
    pending = ask(net, "ann", "cat", 3)
    bob.leave()
    channels = net.broker.channels
    assert (channel.listener, other.listener) == (None, cat.session)
    assert (list(channels.open), channels.openings()) == ([channel, other], [pending])
    assert list(channels._load) == [cat.session]


def test_open_forgotten_twice_counts_once() -> None:
    net = net_of()
    listening(net, "bob")
    opening = ask(net, "ann", "bob")
    for _ in range(2):
        net.broker.channels.forget(opening)
    assert not net.broker.channels._held
    assert (net.broker.channels.openings(), refusals(net)) == ([], [])


def test_open_while_the_listener_is_about_to_go_is_offline() -> None:
    """A member that has its goaway notice, or that the broker closes, gets none."""
    net = net_of()
    bob = listening(net, "bob")
    bob.session.parting = True
    assert code_of_refused(net, "ann", "bob") == "offline"
    bob.session.parting = False
    bob.session.closing = "why"
    assert code_of_refused(net, "ann", "bob") == "offline"


def test_open_beyond_byte_rate_is_full() -> None:
    net = net_of(client("dee", rate=RateConfig(None, 10.0)))
    listening(net, "bob")
    ask(net, "dee", "bob", 1, bytes(8))
    assert code_of_refused(net, "dee", "bob", 2, bytes(5)) == "full"


def test_join_beyond_recipients_limit_refuses_both() -> None:
    net = net_of(client("dee", channels=1))
    listening(net, "dee")
    ask(net, "ann", "dee", 1)
    ask(net, "cat", "dee", 2)
    net.broker.channels.begin(take(net, "dee", 1), FakeRelay(), net.now)
    with pytest.raises(ChannelRefused, match="may have 1 channels"):
        take(net, "dee", 2)
    assert refusals(net) == [(2, "full")]


def test_disconnect_and_rules_name_the_channels_to_close() -> None:
    net = net_of()
    listening(net, "bob")
    listening(net, "cat")
    one, two = open_channel(net, "ann", "bob", 1), open_channel(net, "bob", "cat", 2)
    channels = net.broker.channels
    assert channels.disconnect(net.broker.exchange.clients["ann"], "why") == 1
    assert channels.closing == [(one, "why")]
    channels.closing.clear()
    ask(net, "ann", "bob", 3)
    ask(net, "bob", "cat", 4)
    clients = {
        "ann": client("ann", send_to=("cat",)),
        "bob": client("bob"),
        "cat": client("cat", open_from=("ann",)),
    }
    net.broker.reconfigure(clients, LIMITS, net.now)
    assert [channel for channel, _ in channels.closing] == [one, two]
    assert refusals(net) == [(3, "denied"), (4, "denied")]


def test_rules_unchanged_close_nothing() -> None:
    net = net_of()
    listening(net, "bob")
    open_channel(net, "ann", "bob", 1)
    ask(net, "ann", "bob", 2)
    entries = {name: each.config for name, each in net.broker.exchange.clients.items()}
    net.broker.reconfigure(entries, LIMITS, net.now)
    assert (net.broker.channels.closing, refusals(net)) == ([], [])


def test_describe_leaves_out_channels_that_end_meanwhile() -> None:
    net = net_of()
    listening(net, "bob")
    channels = net.broker.channels
    open_channel(net, "ann", "bob", 1)
    second = open_channel(net, "ann", "bob", 2)
    described = channels.describe()
    assert next(described) == {
        "caller": "ann",
        "recipient": "bob",
        "since": net.now,
        "waiting_bytes": 0,
    }
    channels.end(second, 0)
    assert list(described) == [None]


def test_open_while_state_is_copied_notes_the_caller() -> None:
    """Its rate may have changed."""
    from brokerd.core.precopy import Copier

    net = net_of()
    listening(net, "bob")
    copier = Copier(net.broker)
    try:
        copier.watch([])
        changes = net.broker.status.changes
        assert changes is not None
        changes.clients.clear()
        ask(net, "ann", "bob")
        assert net.broker.exchange.clients["ann"] in changes.clients
    finally:
        copier.end()


@pytest.mark.parametrize("kind", [Kind.OPEN, Kind.JOIN])
def test_first_frame_of_connection_that_does_not_read_is_unsupported(kind: Kind) -> None:
    """A frame is half written, so that no relayed bytes could follow."""
    net = net_of()
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.block(3)
    bob.message("ann", b"x" * 100)
    ann.send(Envelope(kind, 3, "bob"))
    ann.read()
    assert [each.kind for each in ann.take()] == [Kind.MESSAGE, Kind.ERROR]


def test_numbers_of_channels_are_for_the_metrics() -> None:
    """Bytes of channels that have ended count too."""
    net = net_of()
    listening(net, "bob")
    channels = net.broker.channels
    one, _ = open_channel(net, "ann", "bob", 1), open_channel(net, "ann", "bob", 2)
    ask(net, "ann", "bob", 3)
    assert (channels.pending, channels.all_relayed()) == (1, 14)
    channels.end(one, 7)
    assert (channels.pending, channels.all_relayed(), channels.opened) == (1, 14, 2)


REFUSED_OPENS = [
    ({"to": "not valid"}, "malformed"),
    ({"flags": Flag.RECEIPT}, "unsupported"),
    ({"payload": bytes(1025)}, "too_large"),
    ({"to": "$nobody"}, "no_such_client"),
    ({"to": "nobody"}, "no_such_client"),
    ({"caller": "eve"}, "denied"),
    ({"to": "shy"}, "denied"),
    ({"to": "cat"}, "offline"),
    ({"to": "bob/none"}, "offline"),
]


@pytest.mark.parametrize(("asked", "code"), REFUSED_OPENS)
def test_open_against_rules_is_refused_and_holds_nothing(asked: dict[str, Any], code: str) -> None:
    net = net_of(client("eve", send_to=("cat",)), client("shy", open_from=("bob",)))
    listening(net, "bob")
    listening(net, "shy")
    net.connect("cat")
    fields = {"caller": "ann", "to": "bob", "flags": 0, "payload": b"", **asked}
    envelope = Envelope(Kind.OPEN, 1, fields["to"], flags=fields["flags"])
    caller = net.broker.exchange.clients[fields["caller"]]
    with pytest.raises(ChannelRefused) as caught:
        net.broker.channels.ask(caller, envelope, fields["payload"], 5, 5, net.now)
    assert caught.value.code == code
    assert (net.broker.channels.pending, not net.broker.channels._held) == (0, True)


def test_open_and_join_while_the_broker_drains_are_refused() -> None:
    """So are the OPENs that wait."""
    net = net_of()
    listening(net, "bob")
    ask(net, "ann", "bob", 1)
    net.broker.status.draining = True
    assert code_of_refused(net, "ann", "bob", 2) == "shutting_down"
    with pytest.raises(ChannelRefused) as caught:
        take(net, "bob", 1)
    assert caught.value.code == "shutting_down"
    net.broker.channels.drain()
    assert refusals(net) == [(1, "shutting_down")]


def test_opens_beyond_limit_of_the_broker_are_full() -> None:
    """Channels and OPENs count together."""
    net = net_of(limits=CoreLimits(open_timeout=10.0, channels=2))
    listening(net, "bob")
    open_channel(net, "ann", "bob", 1)
    ask(net, "ann", "bob", 2)
    assert code_of_refused(net, "cat", "bob", 3) == "full"


def test_ninth_unanswered_open_of_one_caller_is_full() -> None:
    net = net_of()
    listening(net, "bob")
    for token in range(8):
        ask(net, "ann", "bob", token)
    assert code_of_refused(net, "ann", "bob", 8) == "full"
    assert ask(net, "cat", "bob", 9)
    take(net, "bob", 0)
    assert ask(net, "ann", "bob", 10)


def test_sixty_fifth_unanswered_open_is_full() -> None:
    callers = [f"caller{number}" for number in range(9)]
    net = FakeNet(client("bob"), *map(client, callers), limits=LIMITS)
    listening(net, "bob")
    for token in range(64):
        ask(net, callers[token // 8], "bob", token)
    assert code_of_refused(net, callers[8], "bob", 64) == "full"


@pytest.mark.parametrize("limited", ["caller", "recipient"])
def test_open_beyond_limit_of_either_client_is_full(limited: str) -> None:
    """A pending OPEN counts for its caller, an open channel for both."""
    net = FakeNet(
        client("caller", channels=1 if limited == "caller" else 64),
        client("recipient", channels=1 if limited == "recipient" else 64),
        limits=LIMITS,
    )
    listening(net, "recipient")
    open_channel(net, "caller", "recipient", 1)
    assert code_of_refused(net, "caller", "recipient", 2) == "full"


@pytest.mark.parametrize(
    "join",
    [Envelope(Kind.JOIN, 1, "ann"), Envelope(Kind.JOIN, 1, flags=Flag.RECEIPT)],
    ids=["name", "flags"],
)
def test_join_with_more_than_a_token_is_malformed(join: Envelope) -> None:
    """The token stays valid."""
    net = net_of()
    listening(net, "bob")
    ask(net, "ann", "bob", 1)
    bob = net.broker.exchange.clients["bob"]
    with pytest.raises(ChannelRefused) as caught:
        net.broker.channels.take(bob, join, b"")
    assert caught.value.code == "malformed"
    assert take(net, "bob", 1).caller.name == "ann"


def test_token_is_valid_once_and_for_its_recipient() -> None:
    net = net_of()
    listening(net, "bob")
    ask(net, "ann", "bob", 1)
    with pytest.raises(ChannelRefused) as caught:
        take(net, "cat", 1)
    assert caught.value.code == "expired"
    take(net, "bob", 1)
    with pytest.raises(ChannelRefused, match="the token is not valid"):
        take(net, "bob", 1)


def test_refusal_of_a_recipient_reaches_the_caller_unchanged() -> None:
    net = net_of()
    bob = listening(net, "bob")
    ask(net, "ann", "bob", 7)
    bob.take()
    bob.send(Envelope(Kind.ERROR, 7, "", b"not now", codec=200))
    ((opening, refusal, code, _),) = net.broker.channels.refusals
    answer = parse(refusal[4:])
    assert (opening.token, code) == (7, "refused")
    assert (answer.kind, answer.id, answer.name, answer.codec, answer.payload) == (
        Kind.ERROR,
        1,
        "bob",
        200,
        b"not now",
    )
    bob.send(Envelope(Kind.ERROR, 7, "", b"again"))
    assert bob.error() == (7, "expired")


def test_refusal_that_is_too_long_is_too_large_and_the_open_waits_on() -> None:
    net = net_of()
    bob = listening(net, "bob")
    ask(net, "ann", "bob", 7)
    bob.take()
    bob.send(Envelope(Kind.ERROR, 7, "", bytes(MAX_ANSWER)))
    assert bob.error() == (7, "too_large")
    assert take(net, "bob", 7).caller.name == "ann"


def test_channel_of_a_removed_client_is_closed() -> None:
    net = net_of()
    listening(net, "bob")
    channel = open_channel(net, "ann", "bob")
    net.broker.reconfigure({"bob": client("bob"), "cat": client("cat")}, LIMITS, net.now)
    assert net.broker.channels.closing == [(channel, "name removed from the configuration")]


def test_channel_of_a_listener_that_left_ends_without_a_load() -> None:
    net = net_of()
    bob = listening(net, "bob")
    channel = open_channel(net, "ann", "bob")
    bob.leave()
    net.broker.channels.end(channel, 0)
    assert not net.broker.channels._held
    assert not net.broker.channels._load


def test_open_to_a_client_at_another_host_names_the_host() -> None:
    """An address of a connection names one host; the plain name any that has it."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=4), names="abc")
    member = hosts["b"].net.connect("pool")
    hosts["c"].net.connect("pool")
    hosts.settle()
    net = hosts["a"].net
    for to, host in (("pool", "b"), (member.address, "b")):
        with pytest.raises(ChannelRefused) as caught:
            ask(net, "ann", to)
        refusal = caught.value
        assert (refusal.code, refusal.host) == ("elsewhere", host)
        assert refusal.addresses == (f"{host}:6000",)
    assert code_of_refused(net, "ann", "pool/none") == "offline"


def test_first_frame_open_waits_for_what_the_broker_has_to_write() -> None:
    """Then the network layer gets the connection."""
    net = net_of()
    ann, bob = net.connect("ann"), net.connect("bob")
    # In one turn: the first message is not written yet.
    first = memoryview(frame(encode(Envelope(Kind.MESSAGE, 1, "ann", b"first"))))
    net.feed(net.broker, bob.session, first, 0, len(first), net.now)
    ann.send(Envelope(Kind.OPEN, 3, "bob"))
    assert ann.payloads() == [b"first"]
    assert ann.gone == "the connection becomes a channel"


def test_listener_without_opens_leaves_nothing_behind() -> None:
    net = net_of()
    bob = listening(net, "bob")
    listening(net, "cat")
    pending = ask(net, "ann", "cat", 1)
    bob.leave()
    assert (net.broker.channels.openings(), refusals(net)) == ([pending], [])


def test_receipt_frame_names_the_other_client() -> None:
    receipt = parse(receipt_frame(7, "bob")[4:])
    assert (receipt.kind, receipt.id, receipt.name, receipt.payload) == (
        Kind.RECEIPT,
        7,
        "bob",
        b"",
    )
