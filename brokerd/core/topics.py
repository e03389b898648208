"""Subscriptions: who gets the event published on a topic.

Patterns hang in a tree, one level a token, so that a look-up walks the topic's own tokens and never
sees a subscription that does not match. Thousands of patterns with many wildcards can make that a long way, and
thousands of groups a long list at its end, so both can be gone in pieces. Found sets are kept for topics published
again, until a subscription changes.
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

#: Topics whose matches are remembered, and how many matches in all of them; above it the memory is emptied.
_REMEMBERED: Final = 10_000
_REMEMBERED_MATCHES: Final = 250_000
#: Nodes of the tree looked at between two chances to stop: some tens of microseconds' work.
_PIECE: Final = 128
#: Nodes that are looked at in the time in which one subscription is put to those found.
_EACH: Final = 4
#: Subscriptions that every search may have found before its end, a megabyte; of those with more, one goes on at a time.
_FEW: Final = 4096


def covers(rule_pattern: str, pattern: str) -> bool:
    """Return whether everything that ``pattern`` can match is matched by ``rule_pattern`` too."""
    rule, tokens = rule_pattern.split("."), pattern.split(".")
    if rule[0] in ("*", ">") and tokens[0].startswith("$"):
        return False
    for position, wanted in enumerate(rule):
        if wanted == ">":
            return position < len(tokens)
        if position >= len(tokens) or tokens[position] == ">":
            return False
        if wanted not in ("*", tokens[position]):
            return False
    return len(rule) == len(tokens)


class Topics(Generic[Member]):
    """All subscriptions. version: changes with every one of them."""

    def __init__(self) -> None:
        self.version = 1
        #: By who began them.
        self._searches: dict[Hashable, TopicSearch[Member]] = {}
        #: Whose searches have found many, the one that goes on first; and how often they wanted to.
        self._long: dict[Hashable, None] = {}
        self._asked = 0
        #: Who has left, and is found no more; and what of them is still in the tree.
        self._gone: set[Member] = set()
        self._remains: deque[tuple[Member, list[tuple[str, str | None]]]] = deque()
        self._root: Node[Member] = Node()
        #: Who is found under some patterns only, and under which.
        self._restricted: dict[Member, Callable[[str], bool]] = {}
        self._remembered: dict[str, Matches[Member]] = {}
        self._remembered_matches = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Subscribe; return False if that very subscription was there already."""
        # Twice as fast as it grows: who comes and goes all the time leaves no more behind than it could have at once.
        self.tidy(2)
        node = self._root
        for token in pattern.split("."):
            node = node.grow(token)
        if node.members is None:
            node.members = Ends(pattern)
        joined = node.members.setdefault(member, set())
        if group in joined:
            return False
        joined.add(group)
        for search in self._searches.values():
            # It may have come past here already.
            if matches(pattern, search.topic):
                if search.has_passed(node, member, group):
                    search.found.add(member, group)
                elif node not in search.seen:
                    search.nodes[node] = None
        self._count += 1
        self._changed()
        return True

    def discard(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Unsubscribe; return False if there was no such subscription. Empty branches are cut."""
        node = self._cut(pattern, member, group)
        if node is None:
            return False
        allowed = self._restricted.get(member)
        if allowed is None or allowed(pattern):
            for search in self._searches.values():
                if search.has_passed(node, member, group):
                    search.found.drop(member, group)
        self._count -= 1
        self._changed()
        return True

    def restrict(self, member: Member, allowed: Callable[[str], bool]) -> None:
        """Find a member, from now on and until ``free``, only under patterns that are allowed.

        allowed: says the same of a pattern until then.
        """
        self._restricted[member] = allowed
        for owner in list(self._searches):
            self.abandon(owner)
        self._changed()

    def prune(self, pattern: str, member: Member, group: str | None) -> None:
        """End a subscription under which its member is not found any more."""
        self._cut(pattern, member, group)
        self._count -= 1

    def free(self, member: Member) -> None:
        """Find a member under all its patterns again."""
        self._restricted.pop(member, None)

    def leave(self, member: Member, subscriptions: Iterable[tuple[str, str | None]]) -> None:
        """Find a member no more, from now on. subscriptions: all that it has; tidy takes them out of the tree."""
        rest = list(subscriptions)
        self.free(member)
        if rest:
            self._gone.add(member)
            self._remains.append((member, rest))
            for search in self._searches.values():
                search.leave(member)
            self._count -= len(rest)
            self._changed()

    @property
    def is_tidy(self) -> bool:
        """Whether nothing is left of those who left."""
        return not self._remains

    def tidy(self, count: int) -> None:
        """Take up to ``count`` subscriptions of those who left out of the tree."""
        while self._remains and count > 0:
            member, rest = self._remains[0]
            pattern, group = rest.pop()
            self._cut(pattern, member, group)
            if not rest:
                self._remains.popleft()
                self._gone.discard(member)
            count -= 1

    def _cut(self, pattern: str, member: Member, group: str | None) -> Node[Member] | None:
        """Take a subscription out of the tree; return the node where it was, or None. Empty branches are cut."""
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
                # One that waits long must not collect all that come and go.
                search.nodes.pop(node, None)
            parent.cut(token)
            node = parent
        return end

    def _changed(self) -> None:
        self.version += 1
        self.forget()

    def forget(self) -> None:
        """Forget what was found: it will be looked for again."""
        self._remembered.clear()
        self._remembered_matches = 0

    def find(self, topic: str) -> Matches[Member]:
        """Return who gets an event on ``topic``. The object is kept, and given again for the same topic."""
        found = self._remembered.get(topic)
        if found is None:
            search = TopicSearch(topic, self._walk(topic.split(".")))
            for _, matching in search.walk:
                search.nodes.update(dict.fromkeys(matching))
            search.look_up(sys.maxsize, self._gone, self._restricted)
            found = self._remember(topic, search.found)
        return found

    def known(self, topic: str) -> Matches[Member] | None:
        """Return what find would return, where that is remembered."""
        return self._remembered.get(topic)

    def search(self, topic: str, owner: Hashable, nodes: int) -> tuple[Matches[Member] | None, int]:
        """Go on to look for who gets an event on ``topic``.

        owner: who searches, one topic at a time; see abandon. nodes: how many of the tree may be looked at now, about;
            a subscription there counts as _EACH.
        Returns (what find returns, or None: there is more to look at; how many nodes were looked at).
        """
        found = self._remembered.get(topic)
        if found is not None:
            self.abandon(owner)
            return found, 0
        search = self._searches.get(owner)
        if search is None or search.topic != topic:
            search = self._searches[owner] = TopicSearch(topic, self._walk(topic.split(".")))
        looked_at = 0
        for count, matching in search.walk:
            search.nodes.update(dict.fromkeys(matching))
            looked_at += count
            if looked_at >= nodes:
                return None, looked_at
        if len(search.found) >= _FEW and not self._has_turn(owner, search):
            return None, looked_at
        wanted = (nodes - looked_at) // _EACH + 1
        looked_up = search.look_up(wanted, self._gone, self._restricted)
        looked_at += looked_up * _EACH
        if looked_up >= wanted:
            return None, looked_at
        self.abandon(owner)
        return self._remember(topic, search.found), looked_at

    @property
    def searches(self) -> int:
        """How many are under way; each of them looks at every new subscription."""
        return len(self._searches)

    def abandon(self, owner: Hashable) -> None:
        """Forget how far the search of ``owner`` has come, if there is one."""
        self._searches.pop(owner, None)
        self._long.pop(owner, None)

    def _has_turn(self, owner: Hashable, search: TopicSearch[Member]) -> bool:
        """Return whether a search that has found many may go on: one at a time, so that they hold no more than that.

        Every owner comes again and again, all of them equally often. One who does not, because it is held or about to
        be closed, keeps nobody waiting: its search begins anew should it come back.
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

    def _remember(self, topic: str, found: Matches[Member]) -> Matches[Member]:
        """Return what was found, kept for the next event on ``topic``."""
        size = len(found)
        if len(self._remembered) >= _REMEMBERED or self._remembered_matches + size > _REMEMBERED_MATCHES:
            self.forget()
        self._remembered[topic] = found
        self._remembered_matches += size
        return found

    def _walk(self, tokens: list[str]) -> Iterator[tuple[int, list[Node[Member]]]]:
        """Yield (how many nodes were looked at, those of them whose pattern matches the topic), piece by piece."""
        recipients = [self._root]
        for depth, token in enumerate(tokens):
            wild = depth > 0 or not token.startswith("$")
            further: list[Node[Member]] = []
            for start in range(0, len(recipients), _PIECE):
                piece = recipients[start : start + _PIECE]
                matching: list[Node[Member]] = []
                for node in piece:
                    if wild and (rest := node.follow(">")) is not None:
                        matching.append(rest)
                    if (exact := node.follow(token)) is not None:
                        further.append(exact)
                    if wild and (star := node.follow("*")) is not None:
                        further.append(star)
                yield len(piece), matching
            recipients = further
        yield len(recipients), recipients
