"""Subscriptions: which members receive an event that is published on a topic.

Patterns are kept in a tree with one level per token. A look-up follows the topic's
own tokens and never visits a subscription that does not match. Thousands of patterns
with many wildcards can make the walk long, and thousands of groups can make its result
long. So both can be processed in pieces. The matches of a topic are cached until a
subscription to it changes.
Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

from brokerd.config.topic_rules import covers
from brokerd.core.topic_cache import TopicCache
from brokerd.core.topic_search import Matches, Node, TopicSearch
from brokerd_client.topics import matches

__all__ = ["Matches", "Topics", "covers"]

Member = TypeVar("Member", bound=Hashable)

#: Cost of adding one subscription to the matches, in visited nodes that take as long.
_EACH: Final = 4
#: Objects of an emptied cache freed in the time of one subscription's removal.
_FREED: Final = 8
#: Matches per search, about a megabyte, up to which all searches may continue side by
#: side. Of the unfinished searches with more matches, only one continues at a time.
_FEW: Final = 4096


class Topics(Generic[Member]):
    """All subscriptions.

    cache: the matches of topics published lately.
    """

    def __init__(self) -> None:
        self.cache = TopicCache()
        #: The unfinished searches by owner.
        self._searches: dict[Hashable, TopicSearch] = {}
        #: The owners of searches with many matches; the first one's search is the one
        #: that continues. And how many times such searches have asked to continue.
        self._long: dict[Hashable, None] = {}
        self._asked = 0
        #: Members that have left and are not found any more, and their subscriptions
        #: that are still in the tree.
        self._gone: set[Member] = set()
        self._remains: deque[tuple[Member, list[tuple[str, str | None]]]] = deque()
        self._root: Node = Node()
        #: Members that are found only under some patterns, each with the test for a
        #: pattern.
        self._restricted: dict[Member, Callable[[str], bool]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Subscribe; return False if the same subscription exists already."""
        # The tree is tidied twice as fast as it grows. A client that keeps connecting
        # and disconnecting leaves no more behind than it may have at once.
        if self._remains or not self.cache.is_freed:
            self.tidy(2)
        node = self._root.grow_to(pattern)
        assert node.members is not None
        groups = node.members.setdefault(member, set())
        if group in groups:
            return False
        groups.add(group)
        for search in self._searches.values():
            # The search may have passed this node already.
            if matches(pattern, search.topic):
                if search.has_passed(node, member, group):
                    search.matches.add(member, group)
                elif node not in search.seen:
                    search.nodes[node] = None
        self._count += 1
        self.cache.drop((pattern,))
        return True

    def discard(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Unsubscribe and cut empty branches; return False if not subscribed."""
        node = self._cut(pattern, member, group)
        if node is None:
            return False
        allowed = self._restricted.get(member)
        if allowed is None or allowed(pattern):
            for search in self._searches.values():
                if search.has_passed(node, member, group):
                    search.matches.drop(member, group)
        self._count -= 1
        self.cache.drop((pattern,))
        return True

    def restrict(self, member: Member, allowed: Callable[[str], bool]) -> None:
        """Restrict a member to the allowed patterns, from now on and until ``free``.

        allowed: returns the same result for a pattern until then.
        """
        self._restricted[member] = allowed
        for owner in list(self._searches):
            self.abandon(owner)
        self.forget()

    def prune(self, pattern: str, member: Member, group: str | None) -> None:
        """Remove a subscription under which its member is not found any more."""
        self._cut(pattern, member, group)
        self._count -= 1

    def free(self, member: Member) -> None:
        """Lift the restriction of a member: it is found under all its patterns again."""
        self._restricted.pop(member, None)

    def leave(self, member: Member, subscriptions: Iterable[tuple[str, str | None]]) -> None:
        """Exclude a member from all matches from now on.

        subscriptions: all subscriptions of the member; ``tidy`` removes them from the
        tree.
        """
        remaining = list(subscriptions)
        self.free(member)
        if remaining:
            self._gone.add(member)
            self._remains.append((member, remaining))
            for search in self._searches.values():
                search.leave(member)
            self._count -= len(remaining)
            self.cache.drop(pattern for pattern, _ in remaining)

    @property
    def is_tidy(self) -> bool:
        """Whether :meth:`tidy` has nothing left to do."""
        return not self._remains and self.cache.is_freed

    def tidy(self, count: int) -> None:
        """Remove up to ``count`` subscriptions of members that have left from the tree.

        Free a part of an emptied cache, too.
        """
        self.cache.free(_FREED * count)
        while self._remains and count > 0:
            member, remaining = self._remains[0]
            pattern, group = remaining.pop()
            self._cut(pattern, member, group)
            if not remaining:
                self._remains.popleft()
                self._gone.discard(member)
            count -= 1

    def _cut(self, pattern: str, member: Member, group: str | None) -> Node | None:
        """Remove a subscription and the branches left empty; return its node, or None."""
        node, emptied = self._root.remove(pattern, member, group)
        for search in self._searches.values():
            # A search that waits long must not collect all nodes that come and go.
            for each in emptied:
                search.nodes.pop(each, None)
        return node

    def forget(self) -> None:
        """Empty the cache of matches."""
        self.cache.clear()

    def find(self, topic: str) -> Matches:
        """Return the members that receive an event on ``topic``, as a cached object."""
        matches = self.known(topic)
        if matches is None:
            search = TopicSearch(topic, self._root)
            search.walk(sys.maxsize)
            search.look_up(sys.maxsize, self._gone, self._restricted)
            matches = search.matches.finish()
            self.cache.put(topic, matches)
        return matches

    def known(self, topic: str) -> Matches | None:
        """Return the cached matches of a topic, or None if they are not cached."""
        return self.cache.topics.get(topic.encode())

    def search(self, topic: str, owner: Hashable, nodes: int) -> tuple[Matches | None, int]:
        """Continue the search for the members that receive an event on ``topic``.

        Args:
            topic: The topic of the event.
            owner: The owner of the search, which searches one topic at a time; see
                abandon.
            nodes: About how many nodes may be visited now; a subscription counts as
                _EACH.

        Returns:
            The matches as from ``find``, or None if the search is not over; and the
            number of nodes visited.
        """
        matches = self.known(topic)
        if matches is not None:
            self.abandon(owner)
            return matches, 0
        search = self._searches.get(owner)
        if search is None or search.topic != topic:
            search = self._searches[owner] = TopicSearch(topic, self._root)
        visited = search.walk(nodes)
        if visited >= nodes:
            return None, visited
        if len(search.matches) >= _FEW and not self._has_turn(owner, search):
            return None, visited
        quota = (nodes - visited) // _EACH + 1
        examined = search.look_up(quota, self._gone, self._restricted)
        visited += examined * _EACH
        if examined >= quota:
            return None, visited
        self.abandon(owner)
        matches = search.matches.finish()
        self.cache.put(topic, matches)
        return matches, visited

    @property
    def searches(self) -> int:
        """The number of unfinished searches; each of them checks every new
        subscription.
        """
        return len(self._searches)

    def abandon(self, owner: Hashable) -> None:
        """Discard the unfinished search of ``owner``, if there is one."""
        self._searches.pop(owner, None)
        self._long.pop(owner, None)

    def _has_turn(self, owner: Hashable, search: TopicSearch) -> bool:
        """Return whether a search with many matches may continue.

        Only one such search continues at a time, which bounds the memory of them all.
        All owners ask repeatedly and equally often. An owner stops asking when it is
        held or about to be closed. Its search is then discarded, so that it delays no
        other owner. The search starts from the beginning if the owner returns.
        """
        self._asked += 1
        search.asked_at = self._asked
        self._long.setdefault(owner)
        first = next(iter(self._long))
        if first == owner:
            return True
        if self._asked - self._searches[first].asked_at > 4 * len(self._long):
            self.abandon(first)
        return False
