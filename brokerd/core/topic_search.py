"""The search for subscribers: the nodes of the tree, the search itself, and its
matches.

A search can stop anywhere and continue later. It is notified of subscriptions that
begin or end in between. :mod:`brokerd.core.topics` grows and cuts the tree, and decides
which search continues. Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from brokerd.core.write_buffer import WriteBuffer

__all__ = ["MatchCounts", "Matches", "Node", "TopicSearch"]

#: A subscriber: a session, or in tests any other object.
Member: TypeAlias = Hashable

#: Cost of checking a pattern against the rules, in subscriptions that take as long to
#: look up.
_JUDGED: Final = 8
#: The groups of an event without any.
_NO_GROUPS: Final[dict[str, dict[Any, int]]] = {}


class Node:
    """The subscriptions whose pattern ends here, and the tokens that may follow.

    Most nodes have one child and no member, and a pattern can have 128 nodes. So a dict
    is created only when it is needed.

    Attributes:
        members: The members whose subscriptions end here, each with the groups that it
            joined by them. None stands for a subscription without a group.
        pattern: The pattern of these subscriptions.
    """

    __slots__ = ("_child", "_more", "_token", "members", "pattern")

    def __init__(self) -> None:
        self._token = ""
        self._child: Node | None = None
        self._more: dict[str, Node] | None = None
        self.members: dict[Any, set[str | None]] | None = None
        self.pattern = ""

    @property
    def is_empty(self) -> bool:
        """Whether neither a subscription ends here nor a token follows."""
        return not (self.members or self._child or self._more)

    def follow(self, token: str) -> Node | None:
        """Return the node behind a token, or None."""
        if token == self._token:
            return self._child
        return None if self._more is None else self._more.get(token)

    def grow(self, token: str) -> Node:
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

    def grow_to(self, pattern: str) -> Node:
        """Return the node at the end of a pattern; create it if it does not exist."""
        node = self
        for token in pattern.split("."):
            node = node.grow(token)
        if node.members is None:
            node.members = {}
            node.pattern = pattern
        return node

    def remove(
        self, pattern: str, member: Member, group: str | None
    ) -> tuple[Node | None, list[Node]]:
        """Remove a subscription, and the nodes that it leaves empty.

        Return (its node, or None without such a subscription; the removed nodes).
        """
        emptied: list[Node] = []
        path: list[Node] = []
        tokens = pattern.split(".")
        end = self
        for token in tokens:
            child = end.follow(token)
            if child is None:
                return None, emptied
            path.append(end)
            end = child
        members = end.members
        joined = None if members is None else members.get(member)
        if members is None or joined is None or group not in joined:
            return None, emptied
        joined.discard(group)
        if not joined:
            del members[member]
        node = end
        while path and node.is_empty:
            emptied.append(node)
            node = path.pop()
            node.cut(tokens[len(path)])
        return end, emptied

    def cut(self, token: str) -> None:
        """Remove the node behind a token."""
        if token == self._token:
            self._token, self._child = "", None
        else:
            assert self._more is not None, "only a token that leads on is cut"
            del self._more[token]


class Matches:
    """The recipients of an event: all of ``everyone``, and one member of each of
    ``groups``.

    Attributes:
        everyone: The members without a group.
        groups: The members of each group, with the number of their patterns that match.
        has_remote: Whether a member of a group is another host.
        left: Members that have left since, and may still be in groups.
        size: The number of subscriptions and of ``publishers``.
        turn: Counts the events of a group, so that its members take turns.
        fanout: The outboxes of everyone; None until the routing loop asks for them.
        is_plain: Whether no group has members, and the routing loop may write into all
            of those outboxes.
        used: Whether an event has used them lately: see TopicCache.
        publisher, publishers: The rules of the clients that may publish on the topic, as
            far as these have done so: one, and all further ones.
    """

    __slots__ = (
        "_ordered",
        "everyone",
        "fanout",
        "groups",
        "has_remote",
        "is_plain",
        "left",
        "publisher",
        "publishers",
        "size",
        "turn",
        "used",
    )

    def __init__(
        self,
        everyone: tuple[Any, ...],
        groups: dict[str, dict[Any, int]],
        left: set[Any] | None,
        size: int,
    ) -> None:
        self.everyone = everyone
        self.groups = groups
        self.has_remote = any(
            getattr(member, "host", "") for members in groups.values() for member in members
        )
        self.left = left
        self.size = size
        self.turn = 0
        self.fanout: tuple[WriteBuffer, ...] | None = None
        self.is_plain = False
        self.used = False
        self.publisher: str | None = None
        self.publishers: set[str] | None = None
        #: The members, in a fixed order, of each group from which a member has been
        #: chosen.
        self._ordered: dict[str, list[Any]] | None = None

    def permit(self, rules: str) -> None:
        """Note that clients with these rules may publish on the topic."""
        if self.publisher is None:
            self.publisher = rules
        else:
            self.publishers = self.publishers or set()
            self.publishers.add(rules)
            self.size += 1

    def permits(self, rules: str) -> bool:
        """Return whether clients with these rules are known to be allowed to publish."""
        return rules is self.publisher or (self.publishers is not None and rules in self.publishers)

    def members_of(self, group: str) -> list[Any]:
        """Return the members of a group in a fixed order."""
        if self._ordered is None:
            self._ordered = {}
        ordered = self._ordered.get(group)
        if ordered is None:
            ordered = self._ordered[group] = list(self.groups[group])
        return ordered


class MatchCounts:
    """The matches of a search so far: each member with the number of its patterns that
    match.

    Attributes:
        left: Members that have left since, and may still be in groups.
    """

    __slots__ = ("_count", "everyone", "groups", "left")

    def __init__(self) -> None:
        self.everyone: dict[Any, int] = {}
        self.groups: dict[str, dict[Any, int]] = {}
        self.left: set[Any] | None = None
        self._count = 0

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
        self.left = self.left or set()
        self.left.add(member)

    def finish(self) -> Matches:
        """Return the matches, which are final now."""
        return Matches(tuple(self.everyone), self.groups or _NO_GROUPS, self.left, self._count)


class TopicSearch:
    """An unfinished search for one topic: through the tree, then through the
    subscriptions found.

    tokens: the tokens of the topic.
    depth: how many of them the walk through the tree has followed.
    level, level_done: the nodes behind these tokens, and how many of them are visited.
    next_level: the nodes found behind the visited ones.
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
        "depth",
        "groups",
        "level",
        "level_done",
        "matches",
        "member",
        "members",
        "next_level",
        "node",
        "nodes",
        "seen",
        "tokens",
        "topic",
    )

    def __init__(self, topic: str, root: Node) -> None:
        self.topic = topic
        self.tokens = topic.split(".")
        self.depth = 0
        self.level = [root]
        self.level_done = 0
        self.next_level: list[Node] = []
        self.nodes: dict[Node, None] = {}
        self.seen: set[Node] = set()
        self.node: Node | None = None
        self.members: dict[Member, None] = {}
        self.member: Member | None = None
        self.groups: dict[str | None, None] = {}
        self.matches = MatchCounts()
        self.asked_at = 0

    def has_passed(self, node: Node, member: Member, group: str | None) -> bool:
        """Return whether the search has passed the place of that subscription."""
        if node is not self.node:
            return node in self.seen
        return member not in self.members and (member != self.member or group not in self.groups)

    def leave(self, member: Member) -> None:
        """Exclude a member from now on."""
        self.matches.leave(member)
        if member == self.member:
            self.groups.clear()

    def walk(self, count: int) -> int:
        """Visit about ``count`` nodes; return how many were visited.

        The result is less than ``count`` only if the walk is over.
        """
        visited = 0
        while self.depth < len(self.tokens):
            token = self.tokens[self.depth]
            wildcards_match = self.depth > 0 or not token.startswith("$")
            level = self.level
            while self.level_done < len(level):
                if visited >= count:
                    return visited
                node = level[self.level_done]
                self.level_done += 1
                visited += 1
                if wildcards_match and (remainder := node.follow(">")) is not None:
                    self.nodes[remainder] = None
                if (exact := node.follow(token)) is not None:
                    self.next_level.append(exact)
                if wildcards_match and (star := node.follow("*")) is not None:
                    self.next_level.append(star)
            self.depth += 1
            self.level, self.next_level = self.next_level, []
            self.level_done = 0
        for node in self.level:
            # Its pattern matches the whole topic.
            self.nodes[node] = None
        visited += len(self.level)
        self.level = []
        return visited

    def look_up(
        self,
        count: int,
        departed: Container[Member],
        restricted: Mapping[Any, Callable[[str], bool]],
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
                joined = self.node.members.get(self.member)
                if joined is not None and self.member not in departed:
                    allowed = restricted.get(self.member)
                    visited += 0 if allowed is None else _JUDGED
                    if allowed is None or allowed(self.node.pattern):
                        self.groups = dict.fromkeys(joined)
            elif self.nodes:
                self.node, _ = self.nodes.popitem()
                visited += 1
                self.seen.add(self.node)
                members = self.node.members or {}
                if restricted or 2 * len(members) > count - visited:
                    self.members = dict.fromkeys(reversed(members))
                    continue
                # All at once, but for the members with many groups.
                for member, joined in members.items():
                    if len(joined) > 1:
                        self.members[member] = None
                    elif member not in departed:
                        visited += 2
                        (group,) = joined
                        self.matches.add(member, group)
            else:
                break
        return visited
