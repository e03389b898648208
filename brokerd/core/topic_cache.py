"""The matches of topics published lately, until a subscription changes them.

The routing loop looks topics up here for every event, and all publishers share what it
finds. A change of a subscription removes the topics that its pattern matches, and no
others. For a pattern with wildcards, they are found in a tree with one level per token.
Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

from brokerd.core.topic_search import Matches

__all__ = ["TopicCache"]

#: Most bytes of memory that the cache takes: some 120,000 topics with few matches.
_LIMIT: Final = 96 * 1024 * 1024
#: Bytes of memory per topic, branch and dict of branches.
_TOPIC: Final = 400
_BRANCH: Final = 60
_DICT: Final = 250
#: Bytes of memory per match, and per match in a group and set of publishing rules.
_MATCH: Final = 16
_IN_GROUP: Final = 100
#: Topics used lately that are spared before one of them is removed all the same.
_SPARED: Final = 8
#: Steps through the tree for changed subscriptions before the whole cache is emptied: a
#: millisecond's work.
_STEPS: Final = 8192
#: Topics that may be freed at once; more are freed a few at a time.
_FEW: Final = 256


def _size_of(key: bytes, matches: Matches) -> int:
    """Return the bytes of memory that a topic takes, without its branches."""
    alone = len(matches.everyone)
    # The name is also in its tokens.
    return _TOPIC + 2 * len(key) + _MATCH * alone + _IN_GROUP * (matches.size - alone)


class Branch:
    """The cached topics that begin with the same tokens.

    Attributes:
        key: The topic that consists of these tokens, if it is cached.
        more: The branches behind each next token, or None.
    """

    __slots__ = ("key", "more")

    def __init__(self) -> None:
        self.key: bytes | None = None
        self.more: dict[str, Branch] | None = None


class TopicCache:
    """The matches of the topics published lately.

    Attributes:
        topics: The matches by topic. The object is replaced when the cache is emptied.
    """

    __slots__ = ("_old", "_root", "_size", "topics")

    def __init__(self) -> None:
        self.topics: OrderedDict[bytes, Matches] = OrderedDict()
        #: Bytes of memory that it takes.
        self._size = 0
        self._root = Branch()
        #: Dicts of the emptied cache that are to be freed.
        self._old: list[dict[Any, Any]] = []

    def put(self, topic: str, matches: Matches) -> None:
        """Add the matches of a topic; remove topics that were not used for long."""
        key = topic.encode()
        if key in self.topics:
            self._remove(key)
        self._make_room(_size_of(key, matches))
        branch = self._root
        for token in topic.split("."):
            if branch.more is None:
                branch.more = {}
                self._size += _DICT
            child = branch.more.get(token)
            if child is None:
                child = branch.more[token] = Branch()
                self._size += _BRANCH
            branch = child
        branch.key = key
        self.topics[key] = matches

    def permit(self, matches: Matches, rules: str) -> None:
        """Note that clients with these rules may publish on the topic of the matches."""
        before = matches.size
        matches.permit(rules)
        self._size += _IN_GROUP * (matches.size - before)

    def drop(self, patterns: Iterable[str]) -> None:
        """Remove the topics that one of the patterns matches.

        If they are not found in a moment, all topics are removed.
        """
        left = _STEPS
        for pattern in patterns:
            keys: list[bytes] = []
            if "*" not in pattern and ">" not in pattern:
                left -= 1
                key = pattern.encode()
                if key in self.topics:
                    keys.append(key)
            else:
                left -= self._find(pattern, left, keys)
            left -= len(keys)
            if left <= 0:
                self.clear()
                return
            for key in keys:
                self._remove(key)

    def clear(self) -> None:
        """Remove all topics."""
        if len(self.topics) > _FEW:
            self._old += (self.topics, self._root.more or {})
        self.topics = OrderedDict()
        self._root = Branch()
        self._size = 0

    @property
    def is_freed(self) -> bool:
        """Whether nothing of an emptied cache is left to be freed."""
        return not self._old

    def free(self, count: int) -> None:
        """Free up to ``count`` objects of an emptied cache."""
        while self._old and count > 0:
            rest = self._old[-1]
            if rest:
                value = rest.popitem()[1]
                if isinstance(value, Branch):
                    branch = value
                    if branch.more is not None:
                        self._old.append(branch.more)
            else:
                self._old.pop()
            count -= 1

    def _make_room(self, size: int) -> None:
        """Count ``size`` bytes, and remove topics that make room for them."""
        removed = 0
        while self.topics and self._size + size > _LIMIT:
            for _ in range(_SPARED):
                key, matches = next(iter(self.topics.items()))
                if not matches.used:
                    break
                matches.used = False
                self.topics.move_to_end(key)
            self._remove(next(iter(self.topics)))
            removed += 1
            if removed == _FEW:
                # A topic with very many matches is added: one by one takes too long.
                self.clear()
        self._size += size

    def _remove(self, key: bytes) -> None:
        """Remove a topic, and the branches left empty."""
        matches = self.topics.pop(key)
        self._size -= _size_of(key, matches)
        tokens = key.decode().split(".")
        branch = self._root
        path = [branch]
        for token in tokens:
            assert branch.more is not None, "a cached topic has all its branches"
            branch = branch.more[token]
            path.append(branch)
        branch.key = None
        while tokens and branch.key is None and not branch.more:
            path.pop()
            branch = path[-1]
            assert branch.more is not None
            del branch.more[tokens.pop()]
            self._size -= _BRANCH
            if not branch.more:
                branch.more = None
                self._size -= _DICT

    def _find(self, pattern: str, limit: int, keys: list[bytes]) -> int:
        """Add the cached topics that a pattern matches to ``keys``; return the steps.

        Of more than ``limit`` steps none is taken.
        """
        tokens = pattern.split(".")
        level = [self._root]
        steps = 0
        for depth, expected in enumerate(tokens):
            next_level: list[Branch] = []
            is_last = depth == len(tokens) - 1
            for branch in level:
                if branch.more is None:
                    continue
                if expected != "*" and not (expected == ">" and is_last):
                    steps += 1
                    child = branch.more.get(expected)
                    if child is not None:
                        next_level.append(child)
                    continue
                steps += len(branch.more)
                if steps > limit:
                    return steps
                if depth:
                    next_level += branch.more.values()
                else:
                    # A leading wildcard does not match the broker's own topics.
                    next_level += [
                        child for each, child in branch.more.items() if not each.startswith("$")
                    ]
            level = next_level
        if tokens[-1] == ">":
            # It stands for one token or more.
            while level:
                branch = level.pop()
                if branch.key is not None:
                    keys.append(branch.key)
                if branch.more is not None:
                    steps += len(branch.more)
                    if steps > limit:
                        return steps
                    level += branch.more.values()
        for branch in level:
            if branch.key is not None:
                # In a comprehension, its variable would have no C type.
                keys.append(branch.key)  # noqa: PERF401
        return steps
