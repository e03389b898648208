"""One link: windows, batches, inquiries and the memory of outcomes."""

from __future__ import annotations

import pytest
from support.cluster_net import ClusterNet, FakeRemotes, Host, message

from brokerd.core.cluster import messages
from brokerd.core.cluster import sent as sent_module
from brokerd.core.cluster.hub import Outgoing
from brokerd.core.cluster.messages import Answer, Outcomes
from brokerd.core.cluster.received import ReceivedBatches, as_ranges
from brokerd.core.cluster.seam import Run
from brokerd.core.cluster.sent import SentBatches


def two(**settings: object) -> tuple[ClusterNet, Host, Host]:
    """Return a net with two hosts that have met."""
    net = ClusterNet()
    a, b = net.up("a", "b", **settings)
    return net, a, b


def losing(net: ClusterNet, *kinds: str) -> None:
    """Lose messages of these kinds from now on."""
    net.drop = lambda origin, to, message: message.kind in kinds


def outcomes_of(host: Host) -> dict[int, list[str]]:
    return dict(host.remotes.outcomes)


def test_frames_of_one_turn_leave_in_one_batch() -> None:
    net, a, b = two()
    before = net.counts.copy()
    for number in range(1, 101):
        a.remotes.send("b", "bob", message("alice", number))
    net.settle()
    assert [number for _, _, number in b.remotes.delivered] == list(range(1, 101))
    assert net.counts["data"] - before["data"] == 1
    assert net.counts["outcomes"] - before["outcomes"] == 1
    assert all(each == ["receipt"] for each in a.remotes.outcomes.values())


def test_pull_takes_frames_before_the_turn_ends() -> None:
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1))
    a.cluster.pull("b", net.now)
    assert not a.remotes.queues["b"]
    a.cluster.pull("nowhere", net.now)
    net.settle()
    assert b.remotes.delivered == [("bob", "alice", 1)]


def test_window_bounds_what_is_unanswered() -> None:
    net, a, b = two(unanswered=1000)
    b.remotes.blocks = True
    for number in range(1, 21):
        a.remotes.send("b", "bob", message("alice", number, size=78))
    net.settle()
    waiting = sum(len(frames) for frames in b.remotes.waiting.values())
    assert waiting == 11
    assert a.cluster.hosts(net.now)[0]["in_flight"] == 11 * 99
    net.run(30.0)
    assert sum(len(frames) for frames in b.remotes.waiting.values()) == waiting
    assert not outcomes_of(a)
    b.remotes.unblock()
    net.settle()
    assert [number for _, _, number in b.remotes.delivered] == list(range(1, 21))
    assert a.cluster.hosts(net.now)[0]["in_flight"] == 0


def test_blocked_host_does_not_delay_another() -> None:
    net = ClusterNet()
    a, b, c = net.up("a", "b", "c", unanswered=500)
    b.remotes.blocks = True
    for number in range(1, 21):
        a.remotes.send("b", "bob", message("alice", number))
    for number in range(21, 41):
        a.remotes.send("c", "carol", message("alice", number))
    net.settle()
    assert len(c.remotes.delivered) == 20
    assert not b.remotes.delivered


def test_batches_fit_max_payload() -> None:
    """ClusterNet checks the size of each message."""
    net = ClusterNet()
    hosts = [net.start(name, is_online=False) for name in "ab"]
    for host in hosts:
        host.connect(max_payload=4096)
    net.run(1.0)
    a, b = hosts
    largest = a.cluster.largest_frame
    frames = b"".join(message("alice", number, size=number * 10) for number in range(1, 200))
    a.remotes.send("b", "bob", frames)
    a.remotes.send("b", "bob", message("alice", 200, size=largest - 21))
    a.remotes.send("b", "bob", message("alice", 201, size=4096))
    a.remotes.send("b", "bob", message("alice", 202))
    net.settle()
    assert [number for _, _, number in b.remotes.delivered] == [*range(1, 201), 202]
    assert a.remotes.outcomes.pop(201) == ["too_large"]
    assert all(each == ["receipt"] for each in a.remotes.outcomes.values())
    assert len(message("alice", 200, size=largest - 21)) == largest


def test_numbers_far_beyond_the_last_batch_cost_nothing() -> None:
    """Whatever another host says: a number is one of 64 bits."""
    far = 2**64 - 1
    received = ReceivedBatches(1)
    assert received.accept(far - 1, 10)
    received.skip_to(far)
    assert received.accept(far, 10)
    assert received.take_news() == ([], [(1, far - 2)])
    sent = SentBatches(5.0)
    batch = sent.add([Run("bob", message("alice", 1))], 0.0)
    sent.receive(Outcomes(1, 1, [(2, far)], [], []), 10)
    assert list(sent.batches) == [batch.number]
    for number in (2, 3):
        sent.add([Run("bob", message("alice", number))], 0.0)
    sent.receive(Outcomes(1, 2, [(2, 2)], [], []), 10)
    sent.receive(Outcomes(1, 3, [(0, far)], [(0, far)], []), 10)
    assert not sent.batches


def test_lost_batch_is_offline_once_the_next_one_arrives() -> None:
    net, a, b = two()
    losing(net, "data")
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    losing(net)
    a.remotes.send("b", "bob", message("alice", 2))
    net.settle()
    assert outcomes_of(a) == {1: ["offline"], 2: ["receipt"]}
    assert b.remotes.delivered == [("bob", "alice", 2)]
    assert a.cluster.hosts(net.now)[0]["refused"] == 1


def test_lost_batch_is_offline_after_an_inquiry() -> None:
    net, a, _b = two()
    losing(net, "data")
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    losing(net)
    net.run(3.0)
    assert outcomes_of(a) == {1: ["offline"]}
    assert a.state_of("b") == "up"


def test_late_batch_is_not_delivered_after_an_inquiry() -> None:
    net, a, b = two()
    late: list[Outgoing] = []

    def keep(origin: str, to: str, message: Outgoing) -> bool:
        if message.kind == "data":
            late.append(message)
        return message.kind == "data"

    net.drop = keep
    a.remotes.send("b", "bob", message("alice", 1))
    net.run(3.0)
    assert outcomes_of(a) == {1: ["offline"]}
    b.inbox.append(("a", "data", late[0].payload))
    net.settle()
    assert not b.remotes.delivered
    assert outcomes_of(a) == {1: ["offline"]}


def test_batch_that_comes_twice_is_delivered_once() -> None:
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1))
    net.publish(a)
    b.inbox.append(b.inbox[-1])
    net.settle()
    assert b.remotes.delivered == [("bob", "alice", 1)]
    assert outcomes_of(a) == {1: ["receipt"]}


def test_lost_outcomes_are_repeated() -> None:
    net, a, _b = two()
    losing(net, "outcomes")
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    losing(net)
    a.remotes.send("b", "bob", message("alice", 2))
    net.settle()
    assert outcomes_of(a) == {1: ["receipt"], 2: ["receipt"]}


def test_lost_late_error_is_repeated_after_a_pong() -> None:
    """No batch is unanswered, so only the number in the pong shows that it is missing."""
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    losing(net, "outcomes")
    b.remotes.lose_later("a", "alice", 1)
    net.settle()
    losing(net)
    net.run(2.0)
    assert outcomes_of(a) == {1: ["receipt", "offline"]}


def test_silent_owner_leaves_frames_without_outcome_in_doubt() -> None:
    net, a, b = two()
    b.remotes.blocks = True
    a.remotes.send("b", "bob", message("alice", 1) + message("alice", 2))
    net.settle()
    b.is_frozen = True
    a.remotes.send("b", "bob", message("alice", 3))
    net.run(4.9)
    assert outcomes_of(a) == {1: ["in_doubt"], 2: ["in_doubt"], 3: ["in_doubt"]}
    assert a.remotes.calls[-1][:2] == ("down", "b")
    assert a.state_of("b") == "away"
    assert a.cluster.hosts(net.now)[0]["in_doubt"] == 3


def test_frame_with_receipt_is_not_in_doubt_when_its_batch_is() -> None:
    net, a, b = two()
    b.remotes.blocks = True
    a.remotes.send("b", "bob", message("alice", 1) + message("alice", 2))
    net.settle()
    (frames,) = b.remotes.waiting.values()
    b.remotes.accept_now("a", frames[0][1])
    net.settle()
    b.is_frozen = True
    net.run(6.0)
    assert outcomes_of(a) == {1: ["receipt"], 2: ["in_doubt"]}


def test_idle_host_that_is_silent_goes_away_and_comes_back() -> None:
    net, a, b = two()
    b.is_frozen = True
    net.run(7.0)
    assert a.state_of("b") == "away"
    assert a.cluster.hosts(net.now)[0]["last_error"] == "not heard for 5 s"
    b.is_frozen = False
    net.run(3.0)
    assert a.state_of("b") == b.state_of("a") == "up"
    a.remotes.send("b", "bob", message("alice", 1))
    b.remotes.send("a", "alice", message("bob", 2))
    net.settle()
    assert outcomes_of(a) == {1: ["receipt"]}
    assert outcomes_of(b) == {2: ["receipt"]}


def test_origin_that_was_stopped_asks_before_it_doubts() -> None:
    """The owner had given the origin up; it still knows what became of its frames."""
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1))
    net.publish(a)
    a.is_frozen = True
    net.run(20.0)
    assert b.state_of("a") == "away"
    assert b.remotes.delivered == [("bob", "alice", 1)]
    a.is_frozen = False
    net.run(3.0)
    assert outcomes_of(a) == {1: ["receipt"]}
    assert a.state_of("b") == b.state_of("a") == "up"


def test_origin_that_lost_its_owner_begins_a_new_generation() -> None:
    """The answers to batches that were given up come too late, and change nothing."""
    net, a, b = two()
    b.remotes.blocks = True
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    b.is_frozen = True
    net.run(7.0)
    assert outcomes_of(a) == {1: ["in_doubt"]}
    b.is_frozen = False
    b.remotes.unblock()
    net.run(3.0)
    assert b.remotes.delivered == [("bob", "alice", 1)]
    assert outcomes_of(a) == {1: ["in_doubt"]}
    a.remotes.send("b", "bob", message("alice", 2))
    net.settle()
    assert outcomes_of(a)[2] == ["receipt"]


def test_outcomes_are_forgotten_after_two_minutes() -> None:
    net, a, _b = two()
    losing(net, "outcomes")
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    losing(net)
    a.is_frozen = True
    net.run(121.0, 1.0)
    a.is_frozen = False
    a.inbox.clear()
    net.run(8.0)
    assert outcomes_of(a) == {1: ["in_doubt"]}
    assert a.state_of("b") == "up"


def test_outcomes_beyond_the_limit_are_in_doubt() -> None:
    """The owner keeps ``unanswered`` bytes of outcomes that the origin has not confirmed."""
    net, a, _b = two(unanswered=400)
    losing(net, "outcomes")
    for number in range(1, 11):
        a.remotes.send("b", "bob", message("alice", number))
        net.settle()
    losing(net)
    net.run(4.0)
    assert outcomes_of(a) == {number: ["in_doubt"] for number in range(1, 11)}
    assert a.state_of("b") == "up"
    a.remotes.send("b", "bob", message("alice", 11))
    net.settle()
    assert outcomes_of(a)[11] == ["receipt"]


def test_many_outcomes_are_confirmed_at_once() -> None:
    net, a, _b = two(unanswered=4000)
    before = net.counts["ping"]
    frames = b"".join(message("alice", number) for number in range(1, 91))
    a.remotes.send("b", "bob", frames)
    net.settle()
    assert net.counts["ping"] == before + 1


def test_remembered_outcomes_do_not_grow_beside_a_blocked_batch() -> None:
    net, a, b = two(unanswered=1 << 20)
    b.remotes.blocks = True
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    b.remotes.blocks = False
    for number in range(2, 6000):
        a.remotes.send("b", "bob", message("alice", number))
        if number % 100 == 0:
            net.settle()
    net.settle()
    sent = a.cluster.links["b"].sent
    assert sent._answered_size < 70_000
    b.remotes.unblock()
    net.settle()
    assert sent._answered_size == 0
    assert all(each == ["receipt"] for each in a.remotes.outcomes.values())


@pytest.mark.parametrize("steps", [3, 1024])
def test_outcomes_are_forgotten_in_turns_and_none_that_counts(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A batch waits while many others pass; some of its frames have their outcomes."""
    looked_at = 0

    def key_of(frame: memoryview, sender: bytes | None = None) -> tuple[bytes, int, bool]:
        nonlocal looked_at
        looked_at += 1
        return messages.key_of(frame, sender)

    monkeypatch.setattr(sent_module, "_STEPS", steps)
    monkeypatch.setattr(sent_module, "key_of", key_of)
    net, a, b = two(unanswered=1 << 20)
    b.remotes.blocks = True
    waiting = [message("alice", number) for number in range(1, 501)]
    a.remotes.send("b", "bob", b"".join(waiting))
    net.settle()
    for each in waiting[::2]:
        b.remotes.accept_now("a", each)
    b.remotes.blocks = False
    for number in range(501, 8000):
        a.remotes.send("b", "bob", message("alice", number))
        if number % 50 == 0:
            before = looked_at
            net.settle()
            # Two messages of outcomes at most, of 50 frames with 21 bytes each.
            assert looked_at - before <= 2 * (steps + 50 * 21 // 8)
    assert looked_at
    sent = a.cluster.links["b"].sent
    assert sent._answered_size < 2 * sent.in_flight + 2 * 65536
    net.settle()
    a.cluster.links["b"].lose("a test ends it")
    net.run(1.0)
    for number in range(1, 8000):
        expected = "in_doubt" if number in range(2, 501, 2) else "receipt"
        assert a.remotes.outcomes[number] == [expected]


def test_nats_that_is_away_shortly_loses_nothing_that_had_left() -> None:
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1))
    net.publish(a)
    net.receive(b)
    a.disconnect()
    net.settle()
    a.remotes.send("b", "bob", message("alice", 2))
    net.run(2.0)
    assert outcomes_of(a) == {2: ["offline"]}
    a.connect()
    net.settle()
    assert outcomes_of(a) == {1: ["receipt"], 2: ["offline"]}
    assert a.remotes.up == {"b"}


def test_frames_in_outbox_are_offline_when_nats_is_away() -> None:
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1))
    a.disconnect()
    assert outcomes_of(a) == {1: ["offline"]}
    net.run(7.0)
    assert not b.remotes.delivered
    assert a.state_of("b") == "away"


def test_window_of_batches_is_bounded_too() -> None:
    batches = SentBatches(5.0)
    for _ in range(10_000):
        batches.add([], 0.0)
    assert batches.room(1 << 20) == 0


def test_ranges_join_numbers_that_follow() -> None:
    assert as_ranges([5, 1, 2, 3, 9]) == [(1, 3), (5, 5), (9, 9)]


def test_done_of_unknown_batch_changes_nothing() -> None:
    received = ReceivedBatches(1)
    assert not received.finish(3, 0.0)
    _net, a, _b = two()
    a.cluster.done("b", 77)
    a.cluster.done("nowhere", 1)
    assert not a.cluster.has_outgoing
    assert isinstance(a.remotes, FakeRemotes)


def test_many_gaps_are_reported_in_several_messages() -> None:
    net, a, b = two()
    for number in range(1, 301):
        losing(net, *(["data"] if number % 2 else []))
        a.remotes.send("b", "bob", message("alice", number))
        net.publish(a)
    net.receive(b)
    net.settle()
    for number, outcome in a.remotes.outcomes.items():
        assert outcome == (["offline"] if number % 2 else ["receipt"])
    assert len(a.remotes.outcomes) == 300


def test_repeated_outcomes_that_are_lost_again_are_asked_for_again() -> None:
    """The answer names the last outcomes, so a lost repetition is no unknown batch."""
    net, a, _b = two()
    losing(net, "outcomes")
    a.remotes.send("b", "bob", message("alice", 1))
    net.run(2.5)
    assert not outcomes_of(a)
    losing(net)
    net.run(1.5)
    assert outcomes_of(a) == {1: ["receipt"]}


def test_remembered_receipt_outlives_the_outcomes_that_are_forgotten() -> None:
    net, a, b = two(unanswered=1 << 20)
    b.remotes.blocks = True
    a.remotes.send("b", "bob", message("alice", 1) + message("alice", 2))
    net.settle()
    (frames,) = b.remotes.waiting.values()
    b.remotes.accept_now("a", frames[1][1])
    b.remotes.blocks = False
    for number in range(3, 4000):
        a.remotes.send("b", "bob", message("alice", number))
        if number % 100 == 0:
            net.settle()
    net.settle()
    b.is_frozen = True
    net.run(6.0)
    assert outcomes_of(a)[1] == ["in_doubt"]
    assert all(a.remotes.outcomes[number] == ["receipt"] for number in range(2, 4000))


def test_batch_that_was_given_up_may_be_done_later() -> None:
    batches = SentBatches(5.0)
    batches.add([], 0.0)
    inquiry = batches.inquiry(1, 2.0)
    assert inquiry is not None
    assert batches.answered(Answer(1, 99, 1, 0, []), 2.0) == []
    unknown = batches.answered(Answer(1, inquiry.number, 1, 0, []), 2.0)
    assert [batch.number for batch in unknown] == [1]
    assert batches.receive(Outcomes(1, 1, [(1, 1)], [], []), 10) == []
    assert batches.answered(Answer(1, inquiry.number, 2, 1, []), 2.0) == []


def test_names_of_large_host_come_in_parts() -> None:
    net = ClusterNet()
    a = net.start("a")
    for number in range(1500):
        a.announce(f"c{number}")
    net.run(1.0)
    b = net.start("b")
    net.run(1.0)
    assert len(b.remotes.names["a"]) == 1500


def test_late_batch_of_an_older_generation_is_not_delivered() -> None:
    net, a, b = two()
    late: list[Outgoing] = []

    def keep(origin: str, to: str, message: Outgoing) -> bool:
        if message.kind == "data":
            late.append(message)
        return message.kind != "hello"

    net.drop = keep
    a.remotes.send("b", "bob", message("alice", 1))
    net.run(6.0)
    assert outcomes_of(a) == {1: ["in_doubt"]}
    losing(net)
    net.run(3.0)
    assert a.state_of("b") == b.state_of("a") == "up"
    b.inbox.append(("a", "data", late[0].payload))
    net.settle()
    assert not b.remotes.delivered


def many(net: ClusterNet, a: Host, b: Host) -> None:
    """Leave 3000 frames without an outcome, beside as many remembered outcomes."""
    b.remotes.blocks = True
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    b.remotes.blocks = False
    for number in range(2, 1000):
        a.remotes.send("b", "bob", message("alice", number))
    net.settle()
    b.remotes.blocks = True
    a.remotes.send("b", "bob", b"".join(message("alice", number) for number in range(1000, 4001)))
    net.settle()


def test_many_frames_of_lost_host_are_reported_in_turns() -> None:
    net, a, b = two(unanswered=1 << 20)
    many(net, a, b)
    a.cluster.links["b"].lose("a test")
    assert a.cluster.has_work
    assert a.remotes.up == {"b"}
    assert len(a.remotes.outcomes) < 3000
    a.cluster.links["b"].lose("another test")
    a.remotes.send("b", "bob", message("alice", 5000))
    b.remotes.send("a", "alice", message("bob", 6000))
    for host in (a, b):
        net.publish(host)
    net.receive(a)
    assert not a.remotes.delivered
    net.settle()
    assert a.remotes.calls[-1] == ("down", "b", "a test")
    net.run(2.0)
    assert a.state_of("b") == b.state_of("a") == "up"
    outcomes = outcomes_of(a)
    assert outcomes.pop(5000) == ["offline"]
    assert len(outcomes) == 4000
    assert all(outcomes[number] == ["in_doubt"] for number in (1, *range(1000, 4001)))
    assert all(outcomes[number] == ["receipt"] for number in range(2, 1000))


def test_many_frames_of_restarted_host_are_reported_before_it_is_up_again() -> None:
    net, a, b = two(unanswered=1 << 20)
    many(net, a, b)
    b = net.start("b")
    net.run(3.0)
    assert [call[:2] for call in a.remotes.calls] == [("up", "b"), ("down", "b"), ("up", "b")]
    assert len(a.remotes.outcomes) == 4000
    a.remotes.send("b", "bob", message("alice", 5000))
    net.settle()
    assert outcomes_of(a)[5000] == ["receipt"]
    assert b.remotes.delivered == [("bob", "alice", 5000)]


def test_many_frames_of_host_that_stops_are_reported() -> None:
    net, a, b = two(unanswered=1 << 20)
    many(net, a, b)
    losing(net, "outcomes")
    b.cluster.leave(net.now, net.now_wall)
    net.settle()
    losing(net)
    assert len(a.remotes.outcomes) == 4000
    assert a.remotes.up == set()
    net.run(2.0)
    net.start("b")
    net.run(2.0)
    assert a.state_of("b") == "up"


def test_host_that_leaves_reports_everything_at_once() -> None:
    net, a, b = two(unanswered=1 << 20)
    many(net, a, b)
    a.cluster.leave(net.now, net.now_wall)
    assert len(a.remotes.outcomes) == 4000
    assert not a.cluster.has_work


def test_batch_for_a_host_that_is_given_up_is_not_delivered() -> None:
    """Its origin does not know that yet. It hears that the message was not delivered."""
    net, a, b = two()
    kept: list[Outgoing] = []

    def keep(origin: str, to: str, message: Outgoing) -> bool:
        if origin == "a" and message.kind == "data":
            kept.append(message)
        return origin == "a"

    net.drop = keep
    a.remotes.send("b", "bob", message("alice", 1))
    net.run(3.0)
    # Host b hears nothing for as long as it takes; a hears b.
    a.cluster.links["b"].excuse(60.0)
    net.run(4.0)
    assert b.state_of("a") == "away"
    losing(net)
    b.inbox.append(("a", "data", kept[0].payload))
    net.run(3.0)
    assert not b.remotes.delivered
    assert outcomes_of(a)[1] in (["offline"], ["in_doubt"])


def test_ping_of_an_earlier_generation_is_not_answered() -> None:
    net, a, b = two()
    late: list[Outgoing] = []

    def keep(origin: str, to: str, message: Outgoing) -> bool:
        late.extend([message] if origin == "a" and message.kind == "ping" else [])
        return False

    net.drop = keep
    net.run(1.5)
    net.drop = lambda origin, to, message: True
    net.run(10.0)
    losing(net)
    net.run(3.0)
    assert a.state_of("b") == "up"
    b.inbox.append(("a", "ping", late[0].payload))
    net.run(1.0)
    assert a.remotes.calls.count(("up", "b")) == 2


def test_news_without_outcomes_wait_for_frames_to_go_with() -> None:
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1, receipt=False))
    net.settle()
    before = net.counts.copy()
    assert a.cluster.hosts(net.now)[0]["batches"] == 1
    net.now += 0.006
    b.remotes.send("a", "alice", message("bob", 2, receipt=False))
    net.settle()
    assert a.cluster.hosts(net.now)[0]["batches"] == 0
    assert net.counts - before == {"bundle": 1}


def test_news_of_several_batches_leave_together() -> None:
    net, a, b = two()
    before = net.counts.copy()
    for number in range(5):
        a.remotes.send("b", "bob", message("alice", number, receipt=False))
        net.settle()
        b.remotes.send("a", "alice", message("bob", number, receipt=False))
        net.settle()
        net.now += 0.0015
    assert net.counts - before == {"data": 8, "bundle": 2}
    assert a.cluster.hosts(net.now)[0]["batches"] == 0


def test_news_without_frames_to_go_with_leave_a_little_later() -> None:
    net, a, b = two()
    before = net.counts.copy()
    a.remotes.send("b", "bob", message("alice", 1, receipt=False))
    net.settle()
    assert net.counts - before == {"data": 1}
    due = b.cluster.next_deadline
    assert due is not None
    assert net.now < due <= net.now + 0.01
    net.now = due
    b.cluster.tick(net.now, net.now_wall)
    net.settle()
    assert a.cluster.hosts(net.now)[0]["batches"] == 0
    assert net.counts - before == {"data": 1, "outcomes": 1}


def test_news_younger_than_those_that_have_left_wait_their_own_time() -> None:
    net, a, b = two()
    a.remotes.send("b", "bob", message("alice", 1, receipt=False))
    net.settle()
    due = b.cluster.next_deadline
    assert due is not None
    net.now = due - 0.002
    b.remotes.send("a", "alice", message("bob", 2, receipt=False))
    net.settle()
    net.now = due - 0.001
    a.remotes.send("b", "bob", message("alice", 3, receipt=False))
    net.settle()
    before = net.counts.copy()
    for _ in range(2):
        assert net.counts == before
        net.now = due
        b.cluster.tick(net.now, net.now_wall)
        net.settle()
        due = b.cluster.next_deadline
        assert due is not None
    assert net.counts - before == {"outcomes": 1}
    assert a.cluster.hosts(net.now)[0]["batches"] == 0


def test_news_of_many_bytes_leave_at_once() -> None:
    net, a, _b = two(unanswered=8000)
    a.remotes.send("b", "bob", message("alice", 1, size=1000, receipt=False))
    net.settle()
    assert a.cluster.hosts(net.now)[0]["in_flight"] == 0


def test_host_that_was_frozen_delivers_a_doubtful_batch_once() -> None:
    """It does not know that it was given up; the outcome stays the one that was reported."""
    net, a, b = two()
    b.is_frozen = True
    a.remotes.send("b", "bob", message("alice", 1))
    net.run(8.0)
    assert outcomes_of(a) == {1: ["in_doubt"]}
    b.is_frozen = False
    net.run(10.0)
    assert outcomes_of(a) == {1: ["in_doubt"]}
    assert b.remotes.delivered == [("bob", "alice", 1)]
    assert a.state_of("b") == b.state_of("a") == "up"


def test_message_that_alone_does_not_fit_max_payload_is_too_large() -> None:
    net = ClusterNet()
    a, b = (net.start(name, is_online=False) for name in "ab")
    for host in (a, b):
        host.connect(max_payload=4096)
    net.run(1.0)
    before = net.counts["data"]
    a.remotes.send("b", "bob", message("alice", 1, size=5000))
    net.settle()
    assert a.remotes.outcomes == {1: ["too_large"]}
    assert net.counts["data"] == before


def test_outcomes_from_before_the_oldest_batch_are_forgotten() -> None:
    batches = SentBatches(5.0)
    for number in (1, 2):
        batches.add([Run("bob", message("alice", number))], 0.0)
    batches.receive(Outcomes(1, 1, (), (), [Run("alice", message("$broker", 1))]), 10)
    batches.add([Run("bob", message("alice", 3))], 0.0)
    late = message("$broker", 2, size=100)
    batches.receive(Outcomes(1, 2, ((1, 2),), (), [Run("alice", late)]), 10)
    assert batches._answered_size == len(late)
