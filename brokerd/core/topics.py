"""Subscriptions: which members receive an event that is published on a topic.

Patterns are kept in a tree with one level per token. A look-up follows the topic's
own tokens and never visits a subscription that does not match. Thousands of patterns
with many wildcards can make the walk long, and thousands of groups can make its result
long. So both can be processed in pieces. The matches of a topic are cached until a
subscription changes.
Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Final, Generic, TypeVar

from brokerd.core.topic_search import Ends, Matches, Node, TopicSearch
from brokerd_client.topics import matches

__all__ = ["Matches", "Topics", "covers"]

Member = TypeVar("Member", bound=Hashable)

#: Most topics in the cache of matches, and most matches in all of them together. Above
#: either limit the cache is emptied.
_REMEMBERED: Final = 10_000
_REMEMBERED_MATCHES: Final = 250_000
#: Nodes of the tree that are visited between two points at which a search can stop.
#: They take some tens of microseconds.
_PIECE: Final = 128
#: Cost of adding one subscription to the matches, in visited nodes that take as long.
_EACH: Final = 4
#: Matches per search, about a megabyte, up to which all searches may continue side by
#: side. Of the unfinished searches with more matches, only one continues at a time.
_FEW: Final = 4096


def covers(rule_pattern: str, pattern: str) -> bool:
    """Return whether everything that ``pattern`` can match is matched by
    ``rule_pattern`` too.
    """
    rule, tokens = rule_pattern.split("."), pattern.split(".")
    if rule[0] in ("*", ">") and tokens[0].startswith("$"):
        return False
    for position, expected in enumerate(rule):
        if expected == ">":
            return position < len(tokens)
        if position >= len(tokens) or tokens[position] == ">":
            return False
        if expected not in ("*", tokens[position]):
            return False
    return len(rule) == len(tokens)


class Topics(Generic[Member]):
    """All subscriptions.

    version: a number that changes with every change of the subscriptions.
    """

    def __init__(self) -> None:
        self.version = 1
        #: The unfinished searches by owner.
        self._searches: dict[Hashable, TopicSearch[Member]] = {}
        #: The owners of searches with many matches; the first one's search is the one
        #: that continues. And how many times such searches have asked to continue.
        self._long: dict[Hashable, None] = {}
        self._asked = 0
        #: Members that have left and are not found any more, and their subscriptions
        #: that are still in the tree.
        self._gone: set[Member] = set()
        self._remains: deque[tuple[Member, list[tuple[str, str | None]]]] = deque()
        self._root: Node[Member] = Node()
        #: Members that are found only under some patterns, each with the test for a
        #: pattern.
        self._restricted: dict[Member, Callable[[str], bool]] = {}
        self._remembered: dict[str, Matches[Member]] = {}
        self._remembered_matches = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Subscribe; return False if the same subscription exists already."""
        # The tree is tidied twice as fast as it grows. A client that keeps connecting
        # and disconnecting leaves no more behind than it may have at once.
        self.tidy(2)
        node = self._root
        for token in pattern.split("."):
            node = node.grow(token)
        if node.members is None:
            node.members = Ends(pattern)
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
        self._changed()
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
        self._changed()
        return True

    def restrict(self, member: Member, allowed: Callable[[str], bool]) -> None:
        """Restrict a member to the allowed patterns, from now on and until ``free``.

        allowed: returns the same result for a pattern until then.
        """
        self._restricted[member] = allowed
        for owner in list(self._searches):
            self.abandon(owner)
        self._changed()

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
            self._changed()

    @property
    def is_tidy(self) -> bool:
        """Whether no subscription of a member that has left is still in the tree."""
        return not self._remains

    def tidy(self, count: int) -> None:
        """Remove up to ``count`` subscriptions of members that have left from the tree."""
        while self._remains and count > 0:
            member, remaining = self._remains[0]
            pattern, group = remaining.pop()
            self._cut(pattern, member, group)
            if not remaining:
                self._remains.popleft()
                self._gone.discard(member)
            count -= 1

    def _cut(self, pattern: str, member: Member, group: str | None) -> Node[Member] | None:
        """Remove a subscription and the branches left empty; return its node, or None."""
        path: list[tuple[Node[Member], str]] = []
        node = self._root
        for token in pattern.split("."):
            child = node.follow(token)
            if child is None:
                return None
            path.append((node, token))
            node = child
        joined = None if node.members is None else node.members.get(member)
        if node.members is None or joined is None or group not in joined:
            return None
        joined.discard(group)
        if not joined:
            del node.members[member]
        end = node
        for parent, token in reversed(path):
            if not node.is_empty:
                break
            for search in self._searches.values():
                # A search that waits long must not collect all nodes that come and go.
                search.nodes.pop(node, None)
            parent.cut(token)
            node = parent
        return end

    def _changed(self) -> None:
        self.version += 1
        self.forget()

    def forget(self) -> None:
        """Empty the cache of matches."""
        self._remembered.clear()
        self._remembered_matches = 0

    def find(self, topic: str) -> Matches[Member]:
        """Return the members that receive an event on ``topic``, as a cached object."""
        matches = self._remembered.get(topic)
        if matches is None:
            search = TopicSearch(topic, self._walk(topic.split(".")))
            for _, matching in search.walk:
                search.nodes.update(dict.fromkeys(matching))
            search.look_up(sys.maxsize, self._gone, self._restricted)
            matches = self._remember(topic, search.matches)
        return matches

    def known(self, topic: str) -> Matches[Member] | None:
        """Return the cached matches of a topic, or None if they are not cached."""
        return self._remembered.get(topic)

    def search(self, topic: str, owner: Hashable, nodes: int) -> tuple[Matches[Member] | None, int]:
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
        matches = self._remembered.get(topic)
        if matches is not None:
            self.abandon(owner)
            return matches, 0
        search = self._searches.get(owner)
        if search is None or search.topic != topic:
            search = self._searches[owner] = TopicSearch(topic, self._walk(topic.split(".")))
        visited = 0
        for count, matching in search.walk:
            search.nodes.update(dict.fromkeys(matching))
            visited += count
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
        return self._remember(topic, search.matches), visited

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

    def _has_turn(self, owner: Hashable, search: TopicSearch[Member]) -> bool:
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

    def _remember(self, topic: str, matches: Matches[Member]) -> Matches[Member]:
        """Cache the matches for the next event on ``topic``, and return them."""
        size = len(matches)
        if (
            len(self._remembered) >= _REMEMBERED
            or self._remembered_matches + size > _REMEMBERED_MATCHES
        ):
            self.forget()
        self._remembered[topic] = matches
        self._remembered_matches += size
        return matches

    def _walk(self, tokens: list[str]) -> Iterator[tuple[int, list[Node[Member]]]]:
        """Yield, piece by piece, the number of nodes visited and the nodes that match.

        A node matches when its pattern matches the whole topic.
        """
        recipients = [self._root]
        for depth, token in enumerate(tokens):
            wildcards_match = depth > 0 or not token.startswith("$")
            next_nodes: list[Node[Member]] = []
            for start in range(0, len(recipients), _PIECE):
                piece = recipients[start : start + _PIECE]
                matching: list[Node[Member]] = []
                for node in piece:
                    if wildcards_match and (remainder := node.follow(">")) is not None:
                        matching.append(remainder)
                    if (exact := node.follow(token)) is not None:
                        next_nodes.append(exact)
                    if wildcards_match and (star := node.follow("*")) is not None:
                        next_nodes.append(star)
                yield len(piece), matching
            recipients = next_nodes
        yield len(recipients), recipients
