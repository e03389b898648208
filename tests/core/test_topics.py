"""Subscriptions: which patterns match which topics, and which members a search finds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd.core import topics as topics_module
from brokerd.core.topic_search import MatchCounts
from brokerd.core.topics import Topics, covers
from brokerd_client.topics import matches

MATCHING = [
    ("a", "a"),
    ("a.b", "a.b"),
    ("*", "a"),
    ("a.*", "a.b"),
    ("*.b", "a.b"),
    ("a.*.c", "a.b.c"),
    (">", "a"),
    (">", "a.b.c"),
    ("a.>", "a.b"),
    ("a.>", "a.b.c"),
    ("a.*.>", "a.b.c"),
    ("$broker.>", "$broker.online.ann"),
    ("$broker.*.ann", "$broker.online.ann"),
    ("$broker.draining", "$broker.draining"),
    ("a.*", "a.$b"),
]
NOT_MATCHING = [
    ("a", "b"),
    ("a", "a.b"),
    ("a.b", "a"),
    ("*", "a.b"),
    ("a.*", "a"),
    ("a.*", "a.b.c"),
    ("a.>", "a"),
    ("a.*.>", "a.b"),
    ("A", "a"),
    (">", "$broker.draining"),
    ("*.>", "$broker.online.ann"),
    ("*.draining", "$broker.draining"),
]
TOKENS = st.sampled_from(["a", "b", "$x", "*"])
PATTERNS = st.tuples(st.lists(TOKENS, min_size=1, max_size=4), st.booleans()).map(
    lambda drawn: ".".join([*drawn[0], ">"] if drawn[1] else drawn[0])
)
TOPICS = st.lists(st.sampled_from(["a", "b", "c", "$x"]), min_size=1, max_size=5).map(".".join)


@pytest.mark.parametrize(("pattern", "topic"), MATCHING)
def test_topics_pattern_matching_topic_is_found(pattern: str, topic: str) -> None:
    """The tree and the function ``matches`` agree that the topic matches."""
    topics: Topics[str] = Topics()
    topics.add(pattern, "ann")
    assert matches(pattern, topic)
    assert list(topics.find(topic).everyone) == ["ann"]


@pytest.mark.parametrize(("pattern", "topic"), NOT_MATCHING)
def test_topics_pattern_not_matching_topic_is_not_found(pattern: str, topic: str) -> None:
    """The tree and the function ``matches`` agree that the topic does not match. A
    leading wildcard does not match ``$``.
    """
    topics: Topics[str] = Topics()
    topics.add(pattern, "ann")
    assert not matches(pattern, topic)
    assert not topics.find(topic).everyone


@given(patterns=st.lists(PATTERNS, max_size=8), topic=TOPICS)
def test_topics_find_agrees_with_regular_expressions(patterns: list[str], topic: str) -> None:
    """Any set of subscriptions gives the same result as trying each pattern on its own."""
    topics: Topics[int] = Topics()
    for number, pattern in enumerate(patterns):
        topics.add(pattern, number)
    expected = {
        number
        for number, pattern in enumerate(patterns)
        if re.fullmatch(
            r"\.".join(
                {"*": r"[^.]+", ">": r".+"}.get(token, re.escape(token))
                for token in pattern.split(".")
            ),
            topic,
        )
        and not (topic.startswith("$") and pattern[0] in "*>")
    }
    assert set(topics.find(topic).everyone) == expected
    assert {
        number for number, pattern in enumerate(patterns) if matches(pattern, topic)
    } == expected


@given(rule=PATTERNS, pattern=PATTERNS, topic=TOPICS)
def test_topics_rule_covering_pattern_matches_its_topics(
    rule: str, pattern: str, topic: str
) -> None:
    """A rule that covers a pattern matches every topic that the pattern matches."""
    if covers(rule, pattern) and matches(pattern, topic):
        assert matches(rule, topic)


@pytest.mark.parametrize(
    ("rule", "pattern", "covered"),
    [
        (">", ">", True),
        (">", "a.*", True),
        ("a.>", "a.*.c", True),
        ("a.>", "a.>", True),
        ("a.*", "a.*", True),
        ("a.*", "a.b", True),
        ("$broker.>", "$broker.online.*", True),
        ("a.*", "a.>", False),
        ("*", ">", False),
        ("a.b", "a.*", False),
        ("a.>", ">", False),
        ("a.>", "a", False),
        (">", "$broker.>", False),
        ("*.>", "$broker.online.*", False),
    ],
)
def test_topics_rule_covers_only_whole_patterns(rule: str, pattern: str, covered: bool) -> None:
    """A subscription is allowed only if the rule matches every topic that it could
    match.
    """
    assert covers(rule, pattern) is covered


@given(
    before=st.lists(PATTERNS, max_size=6),
    changes=st.lists(st.tuples(st.booleans(), PATTERNS), max_size=6),
    topic=TOPICS,
    pieces=st.integers(1, 3),
)
def test_topic_search_in_pieces_finds_subscribers_at_its_end(
    before: list[str], changes: list[tuple[bool, str]], topic: str, pieces: int
) -> None:
    """A member that subscribes or leaves during the search is treated as if everything
    had been searched at the end.
    """
    topics: Topics[str] = Topics()
    for pattern in before:
        topics.add(pattern, pattern)
    remaining = list(changes)
    while (result := topics.search(topic, "owner", pieces)[0]) is None:
        if remaining:
            joins, pattern = remaining.pop()
            (topics.add if joins else topics.discard)(pattern, pattern)
    topics.forget()
    assert set(result.everyone) == set(topics.find(topic).everyone)
    assert not topics._searches


def test_topic_search_visits_at_most_given_number_of_nodes() -> None:
    """A thousand patterns that differ from the topic in their last token only are not
    all visited at once.
    """
    topics: Topics[int] = Topics()
    topic = ".".join("a" * 12)
    for number in range(1024):
        topics.add(".".join("a*"[number >> bit & 1] for bit in range(10)) + ".a.b", number)
    topics.add(topic, -1)
    visited = []
    while True:
        result, count = topics.search(topic, "owner", 100)
        visited.append(count)
        if result is not None:
            break
    assert max(visited) < 108
    assert sum(visited) > 2048
    assert list(result.everyone) == [-1]
    assert topics.search(topic, "owner", 100) == (result, 0)


def test_topic_search_finds_subscriber_behind_its_position() -> None:
    """A member subscribes where the search has passed and had found no subscriber; one
    found before may have left.
    """
    topics: Topics[str] = Topics()
    for pattern in ("a.>", "a.*.c"):
        topics.add(pattern, "ann")
    assert topics.search("a.b.c", "owner", 2) == (None, 2)
    topics.add(">", "bob")
    topics.add("x.>", "cid")
    topics.discard("a.>", "ann")
    result, _ = topics.search("a.b.c", "owner", 99)
    assert result is not None
    assert set(result.everyone) == {"ann", "bob"}


GROUPS = st.sampled_from([None, "g", "h"])
SUBSCRIPTIONS = st.tuples(st.sampled_from(["a.b", "a.*", ">", "c"]), st.sampled_from("stu"), GROUPS)


@given(
    before=st.sets(SUBSCRIPTIONS, max_size=12),
    changes=st.lists(
        st.tuples(st.sampled_from(["join", "end", "leave", "tidy"]), SUBSCRIPTIONS), max_size=12
    ),
    pieces=st.integers(1, 6),
    start=st.integers(0, 12),
)
def test_topic_search_in_pieces_finds_group_members_at_its_end(
    before: set[tuple[str, str, str | None]],
    changes: list[tuple[str, tuple[str, str, str | None]]],
    pieces: int,
    start: int,
) -> None:
    """Whatever changes during the search, the groups and their members are those at its
    end.
    """
    topics: Topics[str] = Topics()
    present: set[tuple[str, str, str | None]] = set()
    departed: set[str] = set()

    def join(pattern: str, member: str, group: str | None) -> None:
        if member not in departed:
            topics.add(pattern, member, group)
            present.add((pattern, member, group))

    for each in before:
        join(*each)
    remaining = list(changes)
    while (result := topics.search("a.b", "owner", pieces)[0]) is None:
        start -= 1
        if remaining and start < 0:
            change, (pattern, member, group) = remaining.pop()
            if change == "end" and present:
                pattern, member, group = min(
                    present, key=lambda each: (each[0] != pattern, each[1] != member, str(each))
                )
            if change == "join":
                join(pattern, member, group)
            elif change == "end" and member not in departed:
                topics.discard(pattern, member, group)
                present.discard((pattern, member, group))
            elif change == "leave" and member not in departed:
                departed.add(member)
                topics.leave(member, [(each[0], each[2]) for each in present if each[1] == member])
                present = {each for each in present if each[1] != member}
            else:
                topics.tidy(1)
    groups = {
        group: set(members) - (result.left or set()) for group, members in result.groups.items()
    }
    expected: dict[str | None, set[str]] = {}
    for pattern, member, group in present:
        if matches(pattern, "a.b"):
            expected.setdefault(group, set()).add(member)
    assert set(result.everyone) == expected.pop(None, set())
    assert {group: members for group, members in groups.items() if members} == expected
    assert not topics._searches


def test_topic_search_group_changed_at_any_position_is_current() -> None:
    """Groups change behind the search, at its position and before it: the result is
    what is true at its end.
    """
    topics: Topics[str] = Topics()
    for member in ("ann", "bob"):
        for group in ("g", "h"):
            topics.add("a.b", member, group)
            topics.add("a.*", member, group)
    search = None
    while search is None or len(search.matches) < 2:
        assert topics.search("a.b", "owner", 1)[0] is None
        search = topics._searches["owner"]
    behind, before = (search.member, next(iter(search.members)))
    assert behind is not None
    pattern = "a.b" if search.node is topics._root.grow("a").grow("b") else "a.*"
    topics.discard(pattern, behind, "g")
    topics.add(pattern, behind, "i")
    topics.add(pattern, before, "i")
    topics.discard("a.b", before, "h")
    topics.discard("a.*", before, "h")
    for _ in range(99):
        result, _ = topics.search("a.b", "owner", 1)
        if result is not None:
            break
    assert result is not None
    assert result.groups == {
        "g": {behind: 1, before: 2},
        "h": {behind: 2},
        "i": {behind: 1, before: 1},
    }
    topics.search("a.b", "other", 1)
    topics.discard(pattern, behind, "i")
    assert set(topics.find("a.b").groups["i"]) == {before}


def test_topic_search_group_left_by_last_member_is_removed() -> None:
    """The last member of a group leaves it during the search. Another group keeps its
    member through another pattern.
    """
    topics: Topics[str] = Topics()
    for group in ("g", "h"):
        topics.add("a", "ann", group)
        topics.add("*", "ann", group)
    topics.add("a", "bob", "h")
    search = None
    while search is None or len(search.matches) < 4:
        assert topics.search("a", "owner", 1)[0] is None
        search = topics._searches["owner"]
    topics.discard("a", "ann", "g")
    topics.discard("*", "ann", "g")
    topics.discard("*", "ann", "h")
    result, _ = topics.search("a", "owner", 99)
    assert result is not None
    assert result.groups in ({"h": {"ann": 1, "bob": 1}}, {"h": {"bob": 1, "ann": 1}})
    assert result.size == 2


def test_topic_search_member_left_meanwhile_is_not_found() -> None:
    """Its subscriptions are still in the tree."""
    topics: Topics[str] = Topics()
    for member in ("ann", "bob", "cid"):
        topics.add("a", member)
    while topics.search("a", "owner", 1)[0] is None:
        if topics._searches["owner"].matches.everyone and not topics._gone:
            topics.leave("cid", [("a", None)])
    assert set(topics.find("a").everyone) == {"ann", "bob"}


def test_topics_matches_are_counted_by_member_and_group() -> None:
    """They are counted so that one of two patterns may end; a group without members is
    removed.
    """
    result = MatchCounts()
    for member, group in (("ann", "g"), ("ann", "g"), ("bob", "g"), ("ann", None)):
        result.add(member, group)
    for member, group, groups in (
        ("ann", "g", {"g": {"ann": 1, "bob": 1}}),
        ("ann", "g", {"g": {"bob": 1}}),
        ("bob", "g", {}),
        ("ann", None, {}),
    ):
        result.drop(member, group)
        assert result.groups == groups
        assert bool(result.everyone) == (group is not None)
    assert len(result) == 0


def test_topic_search_group_left_meanwhile_is_not_found() -> None:
    """Other groups of the same member had been found already."""
    topics: Topics[str] = Topics()
    for group in "ghi":
        topics.add("a", "ann", group)
    left = []
    while (result := topics.search("a", "owner", 1)[0]) is None:
        search = topics._searches["owner"]
        if search.matches.groups and not left:
            left += search.groups
            assert topics.discard("a", "ann", left[0])
    assert len(left) == 2
    assert set(result.groups) == set("ghi") - {left[0]}


def test_topic_search_looks_up_many_groups_in_pieces() -> None:
    """Three members with a thousand groups each on one topic are not all looked up at
    once.
    """
    topics: Topics[str] = Topics()
    for number in range(3000):
        topics.add("a.b", "abc"[number % 3], f"g{number // 3}")
    visited = []
    while True:
        result, count = topics.search("a.b", "owner", 100)
        visited.append(count)
        if result is not None:
            break
    assert max(visited) < 110
    assert len(visited) >= 100
    assert result.size == 3000
    assert all(set(members) == set("abc") for members in result.groups.values())


def test_topic_search_with_many_matches_continues_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many such searches together hold little more than one of them. Each of them ends,
    even if another owner stops asking.
    """
    monkeypatch.setattr(topics_module, "_FEW", 10)
    topics: Topics[str] = Topics()
    for number in range(100):
        topics.add("a.*", "ann", f"g{number}")
    owners = [f"{number}" for number in range(20)]
    assert all(
        topics.search(f"a.{owner}", owner, 8)[0] is None for owner in owners for _ in range(9)
    )
    held = "0"
    finished: list[str] = []
    turns = 0
    while len(finished) < 19:
        turns += 1
        assert sum(len(search.matches) for search in topics._searches.values()) <= 100 + 20 * 13
        for owner in owners:
            if owner != held and owner not in finished:
                result, _ = topics.search(f"a.{owner}", owner, 8)
                if result is not None:
                    assert result.size == 100
                    finished.append(owner)
    assert turns < 20 * 60
    assert "0" not in topics._searches
    while (result := topics.search("a.0", "0", 8)[0]) is None:
        pass
    assert result.size == 100
    assert not topics._long


def test_topic_search_for_another_topic_starts_again() -> None:
    """An owner searches for one topic at a time; matches found for another topic are
    discarded.
    """
    topics: Topics[str] = Topics()
    topics.add("a.b", "ann")
    topics.add("c.d", "cid")
    assert topics.search("a.b", "owner", 1) == (None, 1)
    while (result := topics.search("c.d", "owner", 1)[0]) is None:
        pass
    assert list(result.everyone) == ["cid"]
    topics.search("a.b", "owner", 1)
    topics.abandon("owner")
    topics.abandon("owner")
    assert not topics._searches


def test_topic_search_waiting_forgets_ended_subscriptions() -> None:
    """Its owner may be held for a long time, while another client keeps subscribing and
    unsubscribing.
    """
    topics: Topics[str] = Topics()
    topics.add("a.>", "ann")
    assert topics.search("a.b.c", "owner", 1) == (None, 1)
    for _ in range(100):
        topics.add("a.*.c", "bob")
        topics.discard("a.*.c", "bob")
    assert len(topics._searches["owner"].nodes) <= 1
    assert topics.searches == 1
    result, _ = topics.search("a.b.c", "owner", 99)
    assert result is not None
    assert list(result.everyone) == ["ann"]
    assert topics.searches == 0


def test_topics_departed_member_is_hidden_and_removed_in_steps() -> None:
    """An unfinished search does not find it either. Other members stay, and in the end
    only they are left in the tree.
    """
    topics: Topics[str] = Topics()
    patterns = [("a.>", None), ("a.*.c", "g"), ("a.b.c", None), ("x", None)]
    for pattern, group in patterns:
        topics.add(pattern, "ann", group)
    topics.add("a.b.c", "bob")
    assert set(topics.find("a.b.c").everyone) == {"ann", "bob"}
    assert topics.search("a.b.z", "owner", 2) == (None, 2)
    topics.leave("ann", patterns)
    assert (len(topics), topics.is_tidy) == (1, False)
    result, _ = topics.search("a.b.z", "owner", 99)
    assert result is not None
    for left in (result, topics.find("x")):
        assert left.size == 0
    for _ in range(3):
        topics.tidy(1)
        assert list(topics.find("a.b.c").everyone) == ["bob"]
        assert not topics.find("a.b.c").groups
        topics.forget()
        assert not topics.is_tidy
    topics.tidy(1)
    assert topics.is_tidy
    assert topics.discard("a.b.c", "bob")
    assert topics._root.is_empty
    topics.leave("cid", [])
    assert topics.is_tidy


def test_topics_reconnecting_members_leave_bounded_remains() -> None:
    """Each new subscription removes two of the remaining old ones, so that these never
    accumulate.
    """
    topics: Topics[int] = Topics()
    for number in range(20):
        patterns = [(f"{number}.{each}", None) for each in range(10)]
        for pattern, _ in patterns:
            topics.add(pattern, number)
        topics.leave(number, patterns)
        assert sum(len(rest) for _, rest in topics._remains) <= 10


def test_topics_group_is_found_by_name_across_patterns() -> None:
    """A group is one group, whatever patterns its members used; a member without a
    group stands for itself.
    """
    topics: Topics[str] = Topics()
    topics.add("a.*", "ann", "g")
    topics.add("a.b", "bob", "g")
    topics.add("a.>", "cid", "h")
    topics.add("a.b", "ann")
    result = topics.find("a.b")
    assert list(result.everyone) == ["ann"]
    assert {group: list(members) for group, members in result.groups.items()} == {
        "g": ["bob", "ann"],
        "h": ["cid"],
    } or {group: set(members) for group, members in result.groups.items()} == {
        "g": {"ann", "bob"},
        "h": {"cid"},
    }


def test_topics_same_subscription_twice_counts_once() -> None:
    """The same subscription twice is one, and ends at once; a subscription that does
    not exist can't end.
    """
    topics: Topics[str] = Topics()
    assert topics.add("a.b", "ann")
    assert not topics.add("a.b", "ann")
    assert topics.add("a.b", "ann", "g")
    assert len(topics) == 2
    assert topics.discard("a.b", "ann")
    assert not topics.discard("a.b", "ann")
    assert not topics.discard("a.b", "bob")
    assert not topics.discard("a.b.c", "ann")
    assert not topics.discard("a", "ann")
    assert topics.discard("a.b", "ann", "g")
    assert len(topics) == 0


def test_topics_empty_branches_are_removed() -> None:
    """Ended subscriptions leave nothing in the tree, and their neighbours stay."""
    topics: Topics[str] = Topics()
    for pattern in ("a", "a.b.c", "a.b.d"):
        topics.add(pattern, "ann")
    topics.discard("a.b.c", "ann")
    assert list(topics.find("a.b.d").everyone) == ["ann"]
    topics.discard("a.b.d", "ann")
    assert list(topics.find("a").everyone) == ["ann"]
    topics.discard("a", "ann")
    assert topics._root.is_empty
