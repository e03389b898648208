"""The cache of topics: what it finds is what a new search would find, and it is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd.core import topic_cache
from brokerd.core.topic_cache import TopicCache
from brokerd.core.topic_search import Matches
from brokerd.core.topics import Topics
from brokerd_client.topics import matches

PATTERNS = st.sampled_from(
    ["a", "a.b", "a.*", "*", "*.b", ">", "a.>", "a.b.c", "*.*", "*.*.c", "$x.*", "$x.>", "a*b"]
)
TOPICS = ["a", "b", "a.b", "b.b", "a.c", "a.b.c", "b.b.c", "$x.b", "$x", "a*b"]
GROUPS = st.sampled_from([None, "g", "h"])
CHANGES = st.tuples(
    st.sampled_from(["join", "join", "end", "leave"]), PATTERNS, st.sampled_from("stu"), GROUPS
)


def cached(*topics: str, size: int = 1) -> TopicCache:
    """Return a cache with these topics, each with ``size`` matches."""
    cache = TopicCache()
    for topic in topics:
        cache.put(topic, Matches(tuple(range(size)), {}, None, size))
    return cache


def names(cache: TopicCache) -> set[str]:
    return {key.decode() for key in cache.topics}


@given(changes=st.lists(CHANGES, max_size=12))
def test_topic_cache_after_changes_agrees_with_search(
    changes: list[tuple[str, str, str, str | None]],
) -> None:
    """A change removes exactly the topics that its pattern matches. All topics have the
    recipients that a search would find.
    """
    topics: Topics[str] = Topics()
    present: dict[tuple[str, str, str | None], None] = {}
    departed: set[str] = set()
    for change, pattern, member, group in changes:
        before = {topic: topics.find(topic) for topic in TOPICS}
        changed: list[str] = []
        if change == "leave":
            theirs = [each for each in present if each[1] == member]
            topics.leave(member, [(each[0], each[2]) for each in theirs])
            changed = [each[0] for each in theirs]
            departed.add(member)
            for each in theirs:
                del present[each]
        elif member in departed:
            continue
        elif change == "join" and topics.add(pattern, member, group):
            changed, present[pattern, member, group] = [pattern], None
        elif change == "end" and topics.discard(pattern, member, group):
            changed = [pattern]
            del present[pattern, member, group]
        for topic in TOPICS:
            is_concerned = any(matches(each, topic) for each in changed)
            assert (topics.known(topic) is before[topic]) is not is_concerned
            result = topics.find(topic)
            found = {(each, None) for each in result.everyone}
            found |= {(each, name) for name, members in result.groups.items() for each in members}
            assert found == {(each[1], each[2]) for each in present if matches(each[0], topic)}
    topics.cache.drop(TOPICS)
    assert not topics.cache.topics
    assert topics.cache.is_freed


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("*", {"a.b", "a.b.c", "b.c.d"}),
        ("*.*", {"a", "a.b.c", "b.c.d"}),
        ("a.>", {"a", "b.c.d"}),
        ("*.*.d", {"a", "a.b", "a.b.c"}),
        (">", set()),
        ("x.*", {"a", "a.b", "a.b.c", "b.c.d"}),
    ],
)
def test_topic_cache_pattern_removes_topics_that_it_matches(pattern: str, left: set[str]) -> None:
    """Topics with fewer or more tokens stay, and so do those that begin otherwise."""
    cache = cached("a", "a.b", "a.b.c", "b.c.d")
    cache.drop([pattern])
    assert names(cache) == left


def limit(monkeypatch: pytest.MonkeyPatch, topics: int) -> None:
    """Limit the number of topics in a cache, whatever the lengths of their names."""
    monkeypatch.setattr(topic_cache, "_LIMIT", topics * 10_000 + 5000)
    monkeypatch.setattr(topic_cache, "_TOPIC", 10_000)


def test_topic_cache_full_removes_topics_not_used_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Topics that are published once do not replace those that are published often."""
    limit(monkeypatch, 4)
    cache = cached("warm.a", "warm.b")
    for number in range(20):
        for topic in (b"warm.a", b"warm.b"):
            cache.topics[topic].used = True
        cache.put(f"once.{number}", Matches((), {}, None, 0))
        assert len(cache.topics) <= 4
        assert {"warm.a", "warm.b", f"once.{number}"} <= names(cache)


def test_topic_cache_full_of_used_topics_removes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """To add a topic, the cache looks at a limited number of others."""
    limit(monkeypatch, 20)
    cache = cached(*(f"t.{number}" for number in range(20)))
    for each in cache.topics.values():
        each.used = True
    cache.put("new", Matches((), {}, None, 0))
    assert names(cache) == {f"t.{number}" for number in range(20) if number != 8} | {"new"}
    assert [each.used for each in cache.topics.values()].count(True) == 11


def test_topic_cache_counts_matches_and_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few topics with many subscribers count as much as many topics with few, and so do
    the rules of publishers.
    """
    limit(monkeypatch, 4)
    cache = cached("a", "b", "c", size=750)
    assert names(cache) == {"b", "c"}
    for number in range(200):
        cache.permit(cache.topics[b"b"], f"{number // 2}")
    assert cache.topics[b"b"].permits("0")
    assert cache.topics[b"b"].permits("99")
    assert not cache.topics[b"c"].permits("0")
    cache.put("d", Matches((), {}, None, 0))
    assert names(cache) == {"c", "d"}
    cache.put("e", Matches((), {}, None, 9999))
    assert names(cache) == {"e"}
    cache.put("e", Matches((), {}, None, 1))
    cache.put("f", Matches((), {}, None, 1))
    assert names(cache) == {"e", "f"}


def test_topic_cache_counts_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Topics with very many tokens take much memory, and fewer of them are cached."""
    monkeypatch.setattr(topic_cache, "_LIMIT", 200_000)
    cache = TopicCache()
    for number in range(20):
        cache.put(f"{number}" + ".a" * 120, Matches((), {}, None, 0))
    assert len(cache.topics) <= 6
    cache.drop([">"])
    for number in range(1000):
        cache.put(f"t.{number}", Matches((), {}, None, 0))
    assert 350 < len(cache.topics) < 450


def test_topic_cache_very_large_topic_replaces_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand topics are not removed one by one to make room."""
    limit(monkeypatch, 300)
    cache = cached(*(f"t.{number}" for number in range(300)))
    cache.put("large", Matches(tuple(range(170_000)), {}, None, 170_000))
    assert names(cache) == {"large"}
    cache.drop(["large"])
    cache.put("a", Matches((), {}, None, 0))
    assert names(cache) == {"a"}


@pytest.mark.parametrize("pattern", ["*.y", "a.>", ">", "*.*.y", "deep.>"])
def test_topic_cache_long_way_to_changed_topics_removes_all(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searching for the topics that a pattern matches must not take long."""
    monkeypatch.setattr(topic_cache, "_STEPS", 5)
    cache = cached("b", *(f"a.{number}" for number in range(9)))
    cache.drop(["c.*", "c", "b"])
    assert len(cache.topics) == 9
    cache.put("deep.a.b", Matches((), {}, None, 0))
    for number in range(9):
        cache.put(f"deep.a.{number}", Matches((), {}, None, 0))
    for number in range(9):
        cache.put(f"{number}.x", Matches((), {}, None, 0))
    cache.drop([pattern])
    assert not cache.topics


def test_topic_cache_emptied_is_freed_in_steps() -> None:
    """A hundred thousand topics take too long to be freed at once."""
    topics: Topics[str] = Topics()
    for number in range(300):
        topics.find(f"a.{number}.b")
    assert topics.is_tidy
    topics.forget()
    assert not topics.cache.topics
    steps = 0
    while not topics.is_tidy:
        topics.tidy(1)
        steps += 1
    assert 300 * 3 / 8 <= steps <= 300
    topics.forget()
    assert topics.is_tidy
