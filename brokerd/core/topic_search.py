"""What a search for subscribers goes through, and what it finds: the tree's nodes, the search, the matches.

A search can stop anywhere and go on later; what is subscribed and ended meanwhile it is told. How the tree grows and is
cut, and whose turn it is, is :mod:`brokerd.core.topics`. Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from typing import Final, Generic, TypeVar

__all__ = ["Ends", "Matches", "Node", "TopicSearch"]

Member = TypeVar("Member", bound=Hashable)

#: Subscriptions that are looked at in the time in which a pattern is held against the rules.
_JUDGED: Final = 8


class Ends(dict[Member, "set[str | None]"]):
    """Whose subscriptions end at a node: each member with the groups it joined there; None stands for no group.

    pattern: what leads to the node.
    """

    __slots__ = ("pattern",)

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern


class Node(Generic[Member]):
    """The subscriptions whose pattern ends here, and the tokens that may follow.

    Most nodes have one child and no member, and a pattern can have 128 of them: no dict is made before it is needed.
    members: whose subscriptions end here.
    """

    __slots__ = ("_child", "_more", "_token", "members")

    def __init__(self) -> None:
        self._token = ""
        self._child: Node[Member] | None = None
        self._more: dict[str, Node[Member]] | None = None
        self.members: Ends[Member] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether neither a subscription ends here nor a token follows."""
        return not (self.members or self._child or self._more)

    def follow(self, token: str) -> Node[Member] | None:
        """Return the node behind a token, or None."""
        if token == self._token:
            return self._child
        return None if self._more is None else self._more.get(token)

    def grow(self, token: str) -> Node[Member]:
        """Return the node behind a token, made where there is none."""
        child = self.follow(token)
        if child is None:
            child = Node()
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

    Each member stands there with how many patterns say so. left: who has left since, and may still stand in groups.
    turn: counts the events of a group, so that its members take turns.
    fan: what whoever sends to everyone made of it, to be used again; None until then.
    """

    __slots__ = ("_count", "_ordered", "everyone", "fanout", "groups", "left", "turn")

    def __init__(self) -> None:
        self.everyone: dict[Member, int] = {}
        self.groups: dict[str, dict[Member, int]] = {}
        self.left: set[Member] = set()
        self.turn = 0
        self.fanout: object = None
        self._count = 0
        #: The members of groups that have been chosen from.
        self._ordered: dict[str, list[Member]] = {}

    def __len__(self) -> int:
        """How many subscriptions these are."""
        return self._count

    def add(self, member: Member, group: str | None) -> None:
        """Count a subscription."""
        members = self.everyone if group is None else self.groups.get(group)
        if members is None:
            members = self.groups[group or ""] = {}
        members[member] = members.get(member, 0) + 1
        self._count += 1

    def drop(self, member: Member, group: str | None) -> None:
        """Count one less that was counted."""
        members = self.everyone if group is None else self.groups[group]
        members[member] -= 1
        if not members[member]:
            del members[member]
            if group is not None and not members:
                del self.groups[group]
        self._count -= 1

    def leave(self, member: Member) -> None:
        """Leave a member out from now on."""
        self.everyone.pop(member, None)
        self.left.add(member)

    def members_of(self, group: str) -> list[Member]:
        """Return the members of a group in a fixed order, once the search is over."""
        ordered = self._ordered.get(group)
        if ordered is None:
            ordered = self._ordered[group] = list(self.groups[group])
        return ordered


class TopicSearch(Generic[Member]):
    """One topic's way through the tree, and then through the subscriptions at its ends; not done yet.

    walk: the rest of the way. nodes: those whose pattern matches, and whose subscriptions were not begun with.
    node: the one where that goes on; members: those there who were not begun with; member: the one with whom it goes
    on; groups: those it joined there that were not looked at. found: all that was looked at, kept true meanwhile.
    asked_at: see Topics._has_turn.
    """

    __slots__ = ("asked_at", "found", "groups", "member", "members", "node", "nodes", "seen", "topic", "walk")

    def __init__(self, topic: str, walk: Iterator[tuple[int, list[Node[Member]]]]) -> None:
        self.topic = topic
        self.walk = walk
        self.nodes: dict[Node[Member], None] = {}
        self.seen: set[Node[Member]] = set()
        self.node: Node[Member] | None = None
        self.members: dict[Member, None] = {}
        self.member: Member | None = None
        self.groups: dict[str | None, None] = {}
        self.found: Matches[Member] = Matches()
        self.asked_at = 0

    def has_passed(self, node: Node[Member], member: Member, group: str | None) -> bool:
        """Return whether it does not come to that subscription any more."""
        if node is not self.node:
            return node in self.seen
        return member not in self.members and (member != self.member or group not in self.groups)

    def leave(self, member: Member) -> None:
        """Leave a member out from now on."""
        self.found.leave(member)
        if member == self.member:
            self.groups.clear()

    def look_up(self, count: int, gone: Container[Member], restricted: Mapping[Member, Callable[[str], bool]]) -> int:
        """Look at some ``count`` subscriptions; return how many it were, about, fewer where there are no more.

        gone: members that are passed over. restricted: members that are passed over where their pattern is not allowed.
        """
        looked_at = 0
        while looked_at < count:
            if self.groups:
                assert self.node is not None
                assert self.node.members is not None
                assert self.member is not None
                joined = self.node.members.get(self.member) or ()
                while self.groups and looked_at < count:
                    group, _ = self.groups.popitem()
                    looked_at += 1
                    if group in joined:
                        self.found.add(self.member, group)
            elif self.members:
                self.member, _ = self.members.popitem()
                looked_at += 1
                assert self.node is not None
                assert self.node.members is not None
                ends = self.node.members
                if self.member in ends and self.member not in gone:
                    allowed = restricted.get(self.member)
                    looked_at += 0 if allowed is None else _JUDGED
                    if allowed is None or allowed(ends.pattern):
                        self.groups = dict.fromkeys(ends[self.member])
            elif self.nodes:
                self.node, _ = self.nodes.popitem()
                looked_at += 1
                self.seen.add(self.node)
                self.members = dict.fromkeys(reversed(self.node.members or {}))
            else:
                break
        return looked_at
