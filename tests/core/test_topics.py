"""Subscriptions: which patterns fit which topics, and who is found for one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd.core import topics as topics_module
from brokerd.core.topics import Matches, Topics, covers
from brokerd_client.topics import matches

FITTING = [
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
UNFITTING = [
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


@pytest.mark.parametrize(("pattern", "topic"), FITTING)
def test_a_topic_that_fits_is_found(pattern: str, topic: str) -> None:
    """Both ways of asking agree that the topic fits."""
    topics: Topics[str] = Topics()
    topics.add(pattern, "ann")
    assert matches(pattern, topic)
    assert list(topics.find(topic).everyone) == ["ann"]


@pytest.mark.parametrize(("pattern", "topic"), UNFITTING)
def test_a_topic_that_does_not_fit_is_not_found(pattern: str, topic: str) -> None:
    """Both ways of asking agree that the topic does not fit; wildcards at the front
    stay outside of ``$``.
    """
    topics: Topics[str] = Topics()
    topics.add(pattern, "ann")
    assert not matches(pattern, topic)
    assert not topics.find(topic).everyone


@given(patterns=st.lists(PATTERNS, max_size=8), topic=TOPICS)
def test_the_tree_finds_what_a_regular_expression_does(patterns: list[str], topic: str) -> None:
    """Any set of subscriptions gives the same as trying each pattern by itself."""
    topics: Topics[int] = Topics()
    for number, pattern in enumerate(patterns):
        topics.add(pattern, number)
    found = {
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
    assert set(topics.find(topic).everyone) == found
    assert {number for number, pattern in enumerate(patterns) if matches(pattern, topic)} == found


@given(rule=PATTERNS, pattern=PATTERNS, topic=TOPICS)
def test_what_a_rule_covers_it_matches(rule: str, pattern: str, topic: str) -> None:
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
def test_a_rule_covers_a_whole_pattern_or_does_not(rule: str, pattern: str, covered: bool) -> None:
    """A subscription is allowed only if no topic it could match lies outside of the
    rule.
    """
    assert covers(rule, pattern) is covered


@given(
    before=st.lists(PATTERNS, max_size=6),
    changes=st.lists(st.tuples(st.booleans(), PATTERNS), max_size=6),
    topic=TOPICS,
    pieces=st.integers(1, 3),
)
def test_a_search_in_pieces_finds_who_is_subscribed_at_its_end(
    before: list[str], changes: list[tuple[bool, str]], topic: str, pieces: int
) -> None:
    """Whoever subscribes or leaves while somebody searches is found or not as if all
    had been searched at the end.
    """
    topics: Topics[str] = Topics()
    for pattern in before:
        topics.add(pattern, pattern)
    rest = list(changes)
    while (found := topics.search(topic, "owner", pieces)[0]) is None:
        if rest:
            joins, pattern = rest.pop()
            (topics.add if joins else topics.discard)(pattern, pattern)
    topics.forget()
    assert found.everyone.keys() == topics.find(topic).everyone.keys()
    assert not topics._searches


def test_a_search_goes_no_further_than_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand patterns that agree with the topic in all but their last token are not
    looked at all at once.
    """
    monkeypatch.setattr(topics_module, "_PIECE", 8)
    topics: Topics[int] = Topics()
    topic = ".".join("a" * 12)
    for number in range(1024):
        topics.add(".".join("a*"[number >> bit & 1] for bit in range(10)) + ".a.b", number)
    topics.add(topic, -1)
    looked_at = []
    while True:
        found, count = topics.search(topic, "owner", 100)
        looked_at.append(count)
        if found is not None:
            break
    assert max(looked_at) < 108
    assert sum(looked_at) > 2048
    assert list(found.everyone) == [-1]
    assert topics.search(topic, "owner", 100) == (found, 0)


def test_who_subscribes_where_a_search_has_passed_is_found() -> None:
    """Behind the search, where nobody was subscribed, somebody is now; and who was
    found already may have left.
    """
    topics: Topics[str] = Topics()
    for pattern in ("a.>", "a.*.c"):
        topics.add(pattern, "ann")
    assert topics.search("a.b.c", "owner", 2) == (None, 2)
    topics.add(">", "bob")
    topics.add("x.>", "cid")
    topics.discard("a.>", "ann")
    found, _ = topics.search("a.b.c", "owner", 99)
    assert found is not None
    assert set(found.everyone) == {"ann", "bob"}


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
def test_who_joins_or_leaves_a_group_during_a_search_is_taken_into_account(
    before: set[tuple[str, str, str | None]],
    changes: list[tuple[str, tuple[str, str, str | None]]],
    pieces: int,
    start: int,
) -> None:
    """Whatever happens while somebody searches, the groups and their members are those
    of its end.
    """
    topics: Topics[str] = Topics()
    there: set[tuple[str, str, str | None]] = set()
    gone: set[str] = set()

    def join(pattern: str, member: str, group: str | None) -> None:
        if member not in gone:
            topics.add(pattern, member, group)
            there.add((pattern, member, group))

    for each in before:
        join(*each)
    rest = list(changes)
    while (found := topics.search("a.b", "owner", pieces)[0]) is None:
        start -= 1
        if rest and start < 0:
            what, (pattern, member, group) = rest.pop()
            if what == "end" and there:
                pattern, member, group = min(
                    there, key=lambda each: (each[0] != pattern, each[1] != member, str(each))
                )
            if what == "join":
                join(pattern, member, group)
            elif what == "end" and member not in gone:
                topics.discard(pattern, member, group)
                there.discard((pattern, member, group))
            elif what == "leave" and member not in gone:
                gone.add(member)
                topics.leave(member, [(one, in_) for one, who, in_ in there if who == member])
                there = {each for each in there if each[1] != member}
            else:
                topics.tidy(1)
    groups = {group: set(members) - found.left for group, members in found.groups.items()}
    right: dict[str | None, set[str]] = {}
    for pattern, member, group in there:
        if matches(pattern, "a.b"):
            right.setdefault(group, set()).add(member)
    assert set(found.everyone) == right.pop(None, set())
    assert {group: members for group, members in groups.items() if members} == right
    assert not topics._searches


def test_a_group_is_joined_and_left_where_a_search_is_and_where_it_has_been() -> None:
    """Behind the search, just there and before it: what is found is what is true at its
    end.
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
        found, _ = topics.search("a.b", "owner", 1)
        if found is not None:
            break
    assert found is not None
    assert found.groups == {
        "g": {behind: 1, before: 2},
        "h": {behind: 2},
        "i": {behind: 1, before: 1},
    }
    topics.search("a.b", "other", 1)
    topics.discard(pattern, behind, "i")
    assert set(topics.find("a.b").groups["i"]) == {before}


def test_a_group_that_was_found_and_has_ended_is_none() -> None:
    """The last member of a group leaves it while the rest is looked up; another is
    still in it by another pattern.
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
    found, _ = topics.search("a", "owner", 99)
    assert found is not None
    assert found.groups in ({"h": {"ann": 1, "bob": 1}}, {"h": {"bob": 1, "ann": 1}})
    assert len(found) == 2


def test_who_leaves_before_a_search_comes_to_him_is_not_found() -> None:
    """Though what he was subscribed to is still in the tree."""
    topics: Topics[str] = Topics()
    for member in ("ann", "bob", "cid"):
        topics.add("a", member)
    while topics.search("a", "owner", 1)[0] is None:
        if topics._searches["owner"].matches.everyone and not topics._gone:
            topics.leave("cid", [("a", None)])
    assert set(topics.find("a").everyone) == {"ann", "bob"}


def test_matches_are_counted() -> None:
    """By member and group, so that one of two patterns may end; a group without members
    is none.
    """
    found: Matches[str] = Matches()
    for member, group in (("ann", "g"), ("ann", "g"), ("bob", "g"), ("ann", None)):
        found.add(member, group)
    for member, group, groups in (
        ("ann", "g", {"g": {"ann": 1, "bob": 1}}),
        ("ann", "g", {"g": {"bob": 1}}),
        ("bob", "g", {}),
        ("ann", None, {}),
    ):
        found.drop(member, group)
        assert found.groups == groups
        assert bool(found.everyone) == (group is not None)
    assert len(found) == 0


def test_a_group_that_is_left_before_a_search_comes_to_it_is_not_found() -> None:
    """Though the others of the same member were found already."""
    topics: Topics[str] = Topics()
    for group in "ghi":
        topics.add("a", "ann", group)
    left = []
    while (found := topics.search("a", "owner", 1)[0]) is None:
        search = topics._searches["owner"]
        if search.matches.groups and not left:
            left += search.groups
            assert topics.discard("a", "ann", left[0])
    assert len(left) == 2
    assert set(found.groups) == set("ghi") - {left[0]}


def test_the_groups_at_the_end_of_a_search_are_looked_up_in_pieces() -> None:
    """Three members of a thousand groups each on one topic are not looked at all at
    once.
    """
    topics: Topics[str] = Topics()
    for number in range(3000):
        topics.add("a.b", "abc"[number % 3], f"g{number // 3}")
    looked_at = []
    while True:
        found, count = topics.search("a.b", "owner", 100)
        looked_at.append(count)
        if found is not None:
            break
    assert max(looked_at) < 110
    assert len(looked_at) >= 100
    assert len(found) == 3000
    assert all(set(members) == set("abc") for members in found.groups.values())


def test_of_searches_that_have_found_many_one_goes_on_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred of them hold no more than one of them and a little; each comes to its
    end, whoever does not go on.
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
    done: list[str] = []
    turns = 0
    while len(done) < 19:
        turns += 1
        assert sum(len(search.matches) for search in topics._searches.values()) <= 100 + 20 * 13
        for owner in owners:
            if owner != held and owner not in done:
                found, _ = topics.search(f"a.{owner}", owner, 8)
                if found is not None:
                    assert len(found) == 100
                    done.append(owner)
    assert turns < 20 * 60
    assert "0" not in topics._searches
    while (found := topics.search("a.0", "0", 8)[0]) is None:
        pass
    assert len(found) == 100
    assert not topics._long


def test_a_search_for_something_else_begins_anew() -> None:
    """An owner searches for one topic at a time; what it has found for another is
    nothing to this one.
    """
    topics: Topics[str] = Topics()
    topics.add("a.b", "ann")
    topics.add("c.d", "cid")
    assert topics.search("a.b", "owner", 1) == (None, 1)
    while (found := topics.search("c.d", "owner", 1)[0]) is None:
        pass
    assert list(found.everyone) == ["cid"]
    topics.search("a.b", "owner", 1)
    topics.abandon("owner")
    topics.abandon("owner")
    assert not topics._searches


def test_a_search_that_waits_keeps_nothing_of_who_came_and_went() -> None:
    """Its owner may be held for long, while somebody subscribes and unsubscribes all
    the time.
    """
    topics: Topics[str] = Topics()
    topics.add("a.>", "ann")
    assert topics.search("a.b.c", "owner", 1) == (None, 1)
    for _ in range(100):
        topics.add("a.*.c", "bob")
        topics.discard("a.*.c", "bob")
    assert len(topics._searches["owner"].nodes) <= 1
    assert topics.searches == 1
    found, _ = topics.search("a.b.c", "owner", 99)
    assert found is not None
    assert list(found.everyone) == ["ann"]
    assert topics.searches == 0


def test_who_has_left_is_found_no_more_and_put_away_little_by_little() -> None:
    """Also by a search that is under way; the others stay, and at last nothing is left
    but them.
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
    found, _ = topics.search("a.b.z", "owner", 99)
    assert found is not None
    for left in (found, topics.find("x")):
        assert not len(left)
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


def test_who_comes_and_goes_leaves_no_more_behind_than_it_had() -> None:
    """Each new subscription puts away two of those that are left, so that they never
    pile up.
    """
    topics: Topics[int] = Topics()
    for number in range(20):
        patterns = [(f"{number}.{each}", None) for each in range(10)]
        for pattern, _ in patterns:
            topics.add(pattern, number)
        topics.leave(number, patterns)
        assert sum(len(rest) for _, rest in topics._remains) <= 10


def test_groups_are_found_by_name_across_patterns() -> None:
    """A group is one group, whatever patterns its members used; without one a member
    stands for itself.
    """
    topics: Topics[str] = Topics()
    topics.add("a.*", "ann", "g")
    topics.add("a.b", "bob", "g")
    topics.add("a.>", "cid", "h")
    topics.add("a.b", "ann")
    found = topics.find("a.b")
    assert list(found.everyone) == ["ann"]
    assert {group: list(members) for group, members in found.groups.items()} == {
        "g": ["bob", "ann"],
        "h": ["cid"],
    } or {group: set(members) for group, members in found.groups.items()} == {
        "g": {"ann", "bob"},
        "h": {"cid"},
    }


def test_a_subscription_counts_once() -> None:
    """The same subscription twice is one, and ends at once; what is not there can't
    end.
    """
    topics: Topics[str] = Topics()
    version = topics.version
    assert topics.add("a.b", "ann")
    assert topics.version != version
    version = topics.version
    assert not topics.add("a.b", "ann")
    assert topics.add("a.b", "ann", "g")
    assert len(topics) == 2
    assert topics.discard("a.b", "ann")
    assert not topics.discard("a.b", "ann")
    assert not topics.discard("a.b", "bob")
    assert not topics.discard("a.b.c", "ann")
    assert not topics.discard("a", "ann")
    assert topics.version != version
    assert topics.discard("a.b", "ann", "g")
    assert len(topics) == 0


def test_empty_branches_are_cut() -> None:
    """Of subscriptions that ended nothing is left, and their neighbours stay."""
    topics: Topics[str] = Topics()
    for pattern in ("a", "a.b.c", "a.b.d"):
        topics.add(pattern, "ann")
    topics.discard("a.b.c", "ann")
    assert list(topics.find("a.b.d").everyone) == ["ann"]
    topics.discard("a.b.d", "ann")
    assert list(topics.find("a").everyone) == ["ann"]
    topics.discard("a", "ann")
    assert topics._root.is_empty


def test_what_was_found_is_remembered_until_a_subscription_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same topic is looked up once; a change or too many topics empty the memory."""
    monkeypatch.setattr(topics_module, "_REMEMBERED", 2)
    topics: Topics[str] = Topics()
    topics.add("*", "ann")
    first = topics.find("a")
    assert topics.find("a") is first
    topics.add("a", "bob")
    second = topics.find("a")
    assert second is not first
    assert list(second.everyone) == ["bob", "ann"] or set(second.everyone) == {"ann", "bob"}
    topics.find("b")
    topics.find("c")
    assert topics.find("a") is not second


def test_what_is_remembered_is_bounded_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few topics with many subscribers count as much as many topics with few."""
    monkeypatch.setattr(topics_module, "_REMEMBERED_MATCHES", 5)
    topics: Topics[str] = Topics()
    for name in ("ann", "bob"):
        topics.add(">", name)
    topics.add(">", "carol", "g")
    first = topics.find("a")
    assert topics.find("a") is first
    topics.find("b")
    assert topics.find("a") is not first
