"""Subscriptions: who gets the event published on a topic.

Patterns hang in a tree, one level a token, so that a look-up walks the topic's own tokens and never
sees a subscription that does not match. Found sets are kept for topics published again, until a
subscription changes. Source of the rules: docs/protocol.md, "Topics".
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

__all__ = ["Matches", "Topics", "covers"]

Member = TypeVar("Member", bound=Hashable)

#: Topics whose matches are remembered, and how many matches in all of them; above it the memory is emptied.
_REMEMBERED: Final = 10_000
_REMEMBERED_MATCHES: Final = 250_000


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

    members: each with the groups it joined under this pattern; None stands for no group.
    """

    __slots__ = ("children", "members")

    def __init__(self) -> None:
        self.children: dict[str, _Node[Member]] = {}
        self.members: dict[Member, set[str | None]] = {}


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


class Topics(Generic[Member]):
    """All subscriptions. version: changes with every one of them."""

    def __init__(self) -> None:
        self.version = 1
        self._root: _Node[Member] = _Node()
        self._remembered: dict[str, Matches[Member]] = {}
        self._remembered_matches = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Subscribe; return False if that very subscription was there already."""
        node = self._root
        for token in pattern.split("."):
            node = node.children.setdefault(token, _Node())
        joined = node.members.setdefault(member, set())
        if group in joined:
            return False
        joined.add(group)
        self._count += 1
        self._changed()
        return True

    def discard(self, pattern: str, member: Member, group: str | None = None) -> bool:
        """Unsubscribe; return False if there was no such subscription. Empty branches are cut."""
        path: list[tuple[_Node[Member], str]] = []
        node = self._root
        for token in pattern.split("."):
            child = node.children.get(token)
            if child is None:
                return False
            path.append((node, token))
            node = child
        joined = node.members.get(member)
        if joined is None or group not in joined:
            return False
        joined.discard(group)
        if not joined:
            del node.members[member]
        for parent, token in reversed(path):
            child = parent.children[token]
            if child.members or child.children:
                break
            del parent.children[token]
        self._count -= 1
        self._changed()
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
            found = Matches()
            tokens = topic.split(".")
            for node in self._walk(self._root, tokens, 0):
                for member, joined in node.members.items():
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

    def _walk(self, node: _Node[Member], tokens: list[str], depth: int) -> Iterator[_Node[Member]]:
        if depth == len(tokens):
            yield node
            return
        children = node.children
        wild = not (depth == 0 and tokens[0].startswith("$"))
        if wild and (rest := children.get(">")) is not None:
            yield rest
        if (exact := children.get(tokens[depth])) is not None:
            yield from self._walk(exact, tokens, depth + 1)
        if wild and (star := children.get("*")) is not None:
            yield from self._walk(star, tokens, depth + 1)
