"""The search for subscribers: the nodes of the tree, the search itself, and its
matches.

A search can stop anywhere and continue later. It is notified of subscriptions that
begin or end in between. :mod:`brokerd.core.topics` grows and cuts the tree, and decides
which search continues. Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from typing import Final, Generic, TypeVar

__all__ = ["Ends", "Matches", "Node", "TopicSearch"]

Member = TypeVar("Member", bound=Hashable)

#: Cost of checking a pattern against the rules, in subscriptions that take as long to
#: look up.
_JUDGED: Final = 8


class Ends(dict[Member, "set[str | None]"]):
    """The subscriptions that end at a node: each member with the groups it joined
    there.

    None stands for a subscription without a group.

    Attributes:
        pattern: The pattern of the node.
    """

    __slots__ = ("pattern",)

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern


class Node(Generic[Member]):
    """The subscriptions whose pattern ends here, and the tokens that may follow.

    Most nodes have one child and no member, and a pattern can have 128 nodes. So a dict
    is created only when it is needed.

    Attributes:
        members: The members whose subscriptions end here.
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
        """Return the node behind a token; create it if it does not exist."""
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
        """Remove the node behind a token."""
        if token == self._token:
            self._token, self._child = "", None
        else:
            assert self._more is not None, "only a token that leads on is cut"
            del self._more[token]


class Matches(Generic[Member]):
    """The recipients of an event: all of ``everyone``, and one member of each of
    ``groups``.

    Each member is stored with the number of its patterns that match.

    Attributes:
        left: Members that have left since, and may still be in groups.
        turn: Counts the events of a group, so that its members take turns.
        fanout: The fan-out that the delivery prepared for everyone, for reuse; None
            until then.
    """

    __slots__ = ("_count", "_ordered", "everyone", "fanout", "groups", "left", "turn")

    def __init__(self) -> None:
        self.everyone: dict[Member, int] = {}
        self.groups: dict[str, dict[Member, int]] = {}
        self.left: set[Member] = set()
        self.turn = 0
        self.fanout: object = None
        self._count = 0
        #: The members, in a fixed order, of each group from which a member has been
        #: chosen.
        self._ordered: dict[str, list[Member]] = {}

    def __len__(self) -> int:
        """Return the number of subscriptions."""
        return self._count

    def add(self, member: Member, group: str | None) -> None:
        """Count a subscription."""
        members = self.everyone if group is None else self.groups.get(group)
        if members is None:
            members = self.groups[group or ""] = {}
        members[member] = members.get(member, 0) + 1
        self._count += 1

    def drop(self, member: Member, group: str | None) -> None:
        """Remove a subscription that was counted."""
        members = self.everyone if group is None else self.groups[group]
        members[member] -= 1
        if not members[member]:
            del members[member]
            if group is not None and not members:
                del self.groups[group]
        self._count -= 1

    def leave(self, member: Member) -> None:
        """Exclude a member from now on."""
        self.everyone.pop(member, None)
        self.left.add(member)

    def members_of(self, group: str) -> list[Member]:
        """Return the members of a group in a fixed order, once the search is over."""
        ordered = self._ordered.get(group)
        if ordered is None:
            ordered = self._ordered[group] = list(self.groups[group])
        return ordered


class TopicSearch(Generic[Member]):
    """An unfinished search for one topic: through the tree, then through the
    subscriptions found.

    walk: the rest of the way through the tree.
    nodes: matching nodes whose subscriptions have not been started.
    seen: matching nodes whose subscriptions have been started.
    node: the matching node whose subscriptions are being looked up.
    members: the members at that node that have not been started.
    member: the member at that node that is being looked up.
    groups: the groups that it joined there and that have not been looked up.
    matches: the matches so far, kept correct while subscriptions change.
    asked_at: see Topics._has_turn.
    """

    __slots__ = (
        "asked_at",
        "groups",
        "matches",
        "member",
        "members",
        "node",
        "nodes",
        "seen",
        "topic",
        "walk",
    )

    def __init__(self, topic: str, walk: Iterator[tuple[int, list[Node[Member]]]]) -> None:
        self.topic = topic
        self.walk = walk
        self.nodes: dict[Node[Member], None] = {}
        self.seen: set[Node[Member]] = set()
        self.node: Node[Member] | None = None
        self.members: dict[Member, None] = {}
        self.member: Member | None = None
        self.groups: dict[str | None, None] = {}
        self.matches: Matches[Member] = Matches()
        self.asked_at = 0

    def has_passed(self, node: Node[Member], member: Member, group: str | None) -> bool:
        """Return whether the search has passed the place of that subscription."""
        if node is not self.node:
            return node in self.seen
        return member not in self.members and (member != self.member or group not in self.groups)

    def leave(self, member: Member) -> None:
        """Exclude a member from now on."""
        self.matches.leave(member)
        if member == self.member:
            self.groups.clear()

    def look_up(
        self,
        count: int,
        departed: Container[Member],
        restricted: Mapping[Member, Callable[[str], bool]],
    ) -> int:
        """Look up about ``count`` subscriptions; return about how many were looked up.

        The result is less than ``count`` only if no more are left.

        Args:
            departed: Members that are skipped.
            restricted: Members that are skipped where their pattern is not allowed.
        """
        visited = 0
        while visited < count:
            if self.groups:
                assert self.node is not None
                assert self.node.members is not None
                assert self.member is not None
                member_groups = self.node.members.get(self.member) or ()
                while self.groups and visited < count:
                    group, _ = self.groups.popitem()
                    visited += 1
                    if group in member_groups:
                        self.matches.add(self.member, group)
            elif self.members:
                self.member, _ = self.members.popitem()
                visited += 1
                assert self.node is not None
                assert self.node.members is not None
                ends = self.node.members
                if self.member in ends and self.member not in departed:
                    allowed = restricted.get(self.member)
                    visited += 0 if allowed is None else _JUDGED
                    if allowed is None or allowed(ends.pattern):
                        self.groups = dict.fromkeys(ends[self.member])
            elif self.nodes:
                self.node, _ = self.nodes.popitem()
                visited += 1
                self.seen.add(self.node)
                self.members = dict.fromkeys(reversed(self.node.members or {}))
            else:
                break
        return visited
