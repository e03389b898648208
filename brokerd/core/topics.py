"""Subscriptions: who gets the event published on a topic.

Patterns hang in a tree, one level a token, so that a look-up walks the topic's own tokens and never
sees a subscription that does not match. Thousands of patterns with many wildcards can make that a long way, so
it can be gone in pieces. Found sets are kept for topics published again, until a subscription changes.
Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Final, Generic, TypeVar

from brokerd_client.topics import matches

__all__ = ["Matches", "Topics", "covers"]

Member = TypeVar("Member", bound=Hashable)

#: Topics whose matches are remembered, and how many matches in all of them; above it the memory is emptied.
_REMEMBERED: Final = 10_000
_REMEMBERED_MATCHES: Final = 250_000
#: Nodes of the tree looked at between two chances to stop: some tens of microseconds' work.
_PIECE: Final = 128


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


class _Node(Generic[Member]):
    """The subscriptions whose pattern ends here, and the tokens that may follow.

    Most nodes have one child and no member, and a pattern can have 128 of them: no dict is made before it is needed.
    members: each with the groups it joined under this pattern; None stands for no group.
    """

    __slots__ = ("_child", "_more", "_token", "members")

    def __init__(self) -> None:
        self._token = ""
        self._child: _Node[Member] | None = None
        self._more: dict[str, _Node[Member]] | None = None
        self.members: dict[Member, set[str | None]] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether neither a subscription ends here nor a token follows."""
        return not (self.members or self._child or self._more)

    def follow(self, token: str) -> _Node[Member] | None:
        """Return the node behind a token, or None."""
        if token == self._token:
            return self._child
        return None if self._more is None else self._more.get(token)

    def grow(self, token: str) -> _Node[Member]:
        """Return the node behind a token, made where there is none."""
        child = self.follow(token)
        if child is None:
            child = _Node()
            if self._child is None:
                self._token, self._child = token, child
            else:
                self._more = self._more or {}
                self._more[token] = child
        return child

    def cut(self, token: str) -> None:
        """Forget the node behind a token."""
        if token == self._token:
            self._token, self._child = "", None
        else:
            assert self._more is not None, "only a token that leads on is cut"
            del self._more[token]


class Matches(Generic[Member]):
    """Who gets an event: every one of ``everyone``, and one member of each of ``groups``.

    turn: counts the events of a group, so that its members take turns.
    fan: what whoever sends to everyone made of it, to be used again; None until then.
    """

    __slots__ = ("everyone", "fan", "groups", "turn")

    def __init__(self) -> None:
        self.everyone: dict[Member, None] = {}
        self.groups: dict[str, dict[Member, None]] = {}
        self.turn = 0
        self.fan: object = None

    def __len__(self) -> int:
        return len(self.everyone) + sum(map(len, self.groups.values()))


class _Search(Generic[Member]):
    """One topic's way through the tree, not at its end yet.

    walk: the rest of the way. nodes: those whose pattern matches, so far. Who is subscribed there is looked up at the
    end, so that whoever leaves meanwhile is not found.
    """

    __slots__ = ("nodes", "topic", "walk")

    def __init__(self, topic: str, walk: Iterator[tuple[int, list[_Node[Member]]]]) -> None:
        self.topic = topic
        self.walk = walk
        self.nodes: dict[_Node[Member], None] = {}


class Topics(Generic[Member]):
    """All subscriptions. version: changes with every one of them."""

    def __init__(self) -> None:
        self.version = 1
        #: By who began them.
        self._searches: dict[Hashable, _Search[Member]] = {}
        #: Who has left, and is found no more; and what of them is still in the tree.
        self._gone: set[Member] = set()
        self._remains: deque[tuple[Member, list[tuple[str, str | None]]]] = deque()
        self._root: _Node[Member] = _Node()
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
            node.members = {}
        joined = node.members.setdefault(member, set())
        if group in joined:
            return False
        joined.add(group)
        for search in self._searches.values():
            # Its way may have led past here already.
            if matches(pattern, search.topic):
                search.nodes[node] = None
        self._count += 1
        self._changed()
        return True

    def discard(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Unsubscribe; return False if there was no such subscription. Empty branches are cut."""
        if not self._cut(pattern, member, group):
            return False
        self._count -= 1
        self._changed()
        return True

    def leave(self, member: Member, subscriptions: Iterable[tuple[str, str | None]]) -> None:
        """Find a member no more, from now on. subscriptions: all that it has; tidy takes them out of the tree."""
        rest = list(subscriptions)
        if rest:
            self._gone.add(member)
            self._remains.append((member, rest))
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

    def _cut(self, pattern: str, member: Member, group: str | None) -> bool:
        path: list[tuple[_Node[Member], str]] = []
        node = self._root
        for token in pattern.split("."):
            child = node.follow(token)
            if child is None:
                return False
            path.append((node, token))
            node = child
        joined = None if node.members is None else node.members.get(member)
        if node.members is None or joined is None or group not in joined:
            return False
        joined.discard(group)
        if not joined:
            del node.members[member]
        for parent, token in reversed(path):
            if not node.is_empty:
                break
            for search in self._searches.values():
                # One that waits long must not collect all that come and go.
                search.nodes.pop(node, None)
            parent.cut(token)
            node = parent
        return True

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
            nodes = (node for _, nodes in self._walk(topic.split(".")) for node in nodes)
            found = self._remember(topic, nodes)
        return found

    def search(self, topic: str, owner: Hashable, nodes: int) -> tuple[Matches[Member] | None, int]:
        """Go on to look for who gets an event on ``topic``.

        owner: who searches, one topic at a time; see abandon. nodes: how many of the tree may be looked at now, about.
        Returns (what find returns, or None: there is more to look at; how many nodes were looked at).
        """
        found = self._remembered.get(topic)
        if found is not None:
            self.abandon(owner)
            return found, 0
        search = self._searches.get(owner)
        if search is None or search.topic != topic:
            search = self._searches[owner] = _Search(topic, self._walk(topic.split(".")))
        looked_at = 0
        for count, matching in search.walk:
            search.nodes.update(dict.fromkeys(matching))
            looked_at += count
            if looked_at >= nodes:
                return None, looked_at
        self.abandon(owner)
        return self._remember(topic, search.nodes), looked_at

    @property
    def searches(self) -> int:
        """How many are under way; each of them looks at every new subscription."""
        return len(self._searches)

    def abandon(self, owner: Hashable) -> None:
        """Forget how far the search of ``owner`` has come, if there is one."""
        self._searches.pop(owner, None)

    def _remember(self, topic: str, nodes: Iterable[_Node[Member]]) -> Matches[Member]:
        """Return who is subscribed at the nodes, kept for the next event on ``topic``."""
        found: Matches[Member] = Matches()
        for node in nodes:
            for member, joined in (node.members or {}).items():
                if member in self._gone:
                    continue
                for group in joined:
                    if group is None:
                        found.everyone[member] = None
                    else:
                        found.groups.setdefault(group, {})[member] = None
        size = len(found)
        if len(self._remembered) >= _REMEMBERED or self._remembered_matches + size > _REMEMBERED_MATCHES:
            self.forget()
        self._remembered[topic] = found
        self._remembered_matches += size
        return found

    def _walk(self, tokens: list[str]) -> Iterator[tuple[int, list[_Node[Member]]]]:
        """Yield (how many nodes were looked at, those of them whose pattern matches the topic), piece by piece."""
        reached = [self._root]
        for depth, token in enumerate(tokens):
            wild = depth > 0 or not token.startswith("$")
            further: list[_Node[Member]] = []
            for start in range(0, len(reached), _PIECE):
                piece = reached[start : start + _PIECE]
                matching: list[_Node[Member]] = []
                for node in piece:
                    if wild and (rest := node.follow(">")) is not None:
                        matching.append(rest)
                    if (exact := node.follow(token)) is not None:
                        further.append(exact)
                    if wild and (star := node.follow("*")) is not None:
                        further.append(star)
                yield len(piece), matching
            reached = further
        yield len(reached), reached
