"""Announcements: the names and interests of this host, and those of another.

Changes are numbered. A host that misses a number asks for everything. It gets this in
parts that carry the number of the last change in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from brokerd.core.cluster.messages import Malformed
from brokerd.core.cluster.seam import Interest, Name

__all__ = ["Announcements", "Changes", "HostDirectory"]

#: Names and interests in one message: at most some 200 KiB.
_ITEMS: Final = 1000


class Changes(NamedTuple):
    """New states of names and interests."""

    names: list[Name]
    interests: list[Interest]


class Announcements:
    """The changes at this host that the others have not been told.

    number: that of the last changes that were told.
    """

    __slots__ = ("_interests", "_names", "number")

    def __init__(self) -> None:
        self.number = 0
        self._names: dict[str, Name] = {}
        self._interests: dict[tuple[str, str], Interest] = {}

    def __bool__(self) -> bool:
        return bool(self._names or self._interests)

    def add_name(self, name: Name) -> None:
        """Note the new state of a name."""
        self._names[name.name] = name

    def add_interest(self, interest: Interest) -> None:
        """Note the new state of an interest."""
        self._interests[interest.pattern, interest.group] = interest

    def take(self) -> Iterator[dict[str, Any]]:
        """Yield the bodies of the messages ``changes``; nothing is left to tell then."""
        names, self._names = list(self._names.values()), {}
        interests, self._interests = list(self._interests.values()), {}
        for part in _parts(names, interests):
            self.number += 1
            yield {"number": self.number, **part}

    def state(
        self, names: Iterable[Name], interests: Iterable[Interest]
    ) -> Iterator[dict[str, Any]]:
        """Yield the bodies of the messages ``state``: everything, in parts."""
        parts = list(_parts(list(names), list(interests))) or [{"names": [], "interests": []}]
        for place, part in enumerate(parts):
            yield {"number": self.number, "part": place, "parts": len(parts), **part}


class HostDirectory:
    """The announcements of another host.

    Attributes:
        number: That of the last changes that are in it; None before the first state.
        names: Names with connections or mailboxes there.
        interests: By pattern and group.
    """

    __slots__ = ("_parts", "_parts_number", "interests", "names", "number")

    def __init__(self) -> None:
        self.number: int | None = None
        self.names: dict[str, Name] = {}
        self.interests: dict[tuple[str, str], Interest] = {}
        self._parts: dict[int, Changes] = {}
        self._parts_number = -1

    def restore(self, facts: dict[str, Any]) -> None:
        """Go on with the announcements that another process has received."""
        number, changes = _decode({**facts, "number": facts["number"] or 0})
        self._apply(changes)
        self.number = None if facts["number"] is None else number

    def misses(self, number: int) -> bool:
        """Return whether changes up to this number are missing."""
        return self.number is None or self.number < number

    def change(self, body: dict[str, Any]) -> Changes | None:
        """Take changes; return them, or None if they do not follow the last ones."""
        number, changes = _decode(body)
        if self.number is None or number != self.number + 1:
            return None
        self.number = number
        self._apply(changes)
        return changes

    def take_part(self, body: dict[str, Any]) -> Changes | None:
        """Take a part of the state; return the differences to before after the last part."""
        number, changes = _decode(body)
        place, count = body.get("part"), body.get("parts")
        if not (isinstance(place, int) and isinstance(count, int) and 0 <= place < count):
            raise Malformed("a state without its part")
        if number != self._parts_number:
            self._parts, self._parts_number = {}, number
        self._parts[place] = changes
        if len(self._parts) < count:
            return None
        parts, self._parts, self._parts_number = self._parts, {}, -1
        self.number = number
        return self._replace(
            [name for part in parts.values() for name in part.names],
            [interest for part in parts.values() for interest in part.interests],
        )

    def _replace(self, names: list[Name], interests: list[Interest]) -> Changes:
        """Replace everything, and return what has changed."""
        left_names = self.names.keys() - {name.name for name in names}
        left = self.interests.keys() - {(each.pattern, each.group) for each in interests}
        changes = Changes(
            [
                *(Name(name, 0, self.names[name].since) for name in sorted(left_names)),
                *(name for name in names if self.names.get(name.name) != name),
            ],
            [
                *(Interest(*key, on=False) for key in sorted(left)),
                *(each for each in interests if (each.pattern, each.group) not in self.interests),
            ],
        )
        self._apply(changes)
        return changes

    def _apply(self, changes: Changes) -> None:
        for name in changes.names:
            if name.is_gone:
                self.names.pop(name.name, None)
            else:
                self.names[name.name] = name
        for interest in changes.interests:
            key = interest.pattern, interest.group
            if interest.on:
                self.interests[key] = interest
            else:
                self.interests.pop(key, None)


def _parts(names: list[Name], interests: list[Interest]) -> Iterator[dict[str, Any]]:
    for start in range(0, max(len(names), len(interests)), _ITEMS):
        end = start + _ITEMS
        yield {"names": names[start:end], "interests": interests[start:end]}


def _decode(body: dict[str, Any]) -> tuple[int, Changes]:
    """Return the number and the changes of a message. Raises Malformed."""
    number = body.get("number")
    try:
        names = [_name(*fields) for fields in body["names"]]
        interests = [_interest(*fields) for fields in body["interests"]]
    except (KeyError, TypeError, ValueError) as error:
        raise Malformed(f"its names or interests are not valid: {error!r}") from error
    if not isinstance(number, int):
        raise Malformed("changes without a number")
    return number, Changes(names, interests)


def _name(name: str, connections: int, since: float, free: bool, mailbox: bool) -> Name:
    return Name(str(name), int(connections), float(since), bool(free), bool(mailbox))


def _interest(pattern: str, group: str, on: bool) -> Interest:
    return Interest(str(pattern), str(group), bool(on))
