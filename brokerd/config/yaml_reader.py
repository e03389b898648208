"""One YAML text as plain values with their places in the text.

The values are built from the parser's events, not by PyYAML's composer. The compiled
composer recurses at every level of nesting, so a file of 100,000 brackets crashes the
process. Here both nesting and repetition by aliases are limited.

The types are those of ``yaml.SafeLoader``, with four differences. A repeated key, a key
that is not text, and a missing value are errors. A number with colons, which YAML 1.1
reads to base 60, is text.

No file is opened here. No problem repeats a value: it may be a secret key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
)
from yaml.reader import Reader

from brokerd.config.marked_values import Map, Seq
from brokerd.config.problems import Path, Place, Problem, format_path
from brokerd.config.scalars import OTHER_THAN_TEXT, InvalidScalar, tagged, unquoted

__all__ = ["Document", "Map", "Seq", "read"]

#: Limits the nesting, in levels. A configuration has five.
_DEEPEST: Final = 20
#: Limits the values that aliases repeat, per text: a fixed number, plus a number for
#: each value written.
_REPEATED: Final = 1_000_000
_REPEATED_EACH: Final = 20

#: Characters searched in one call: a millisecond's work.
_SEARCHED: Final = 256 * 1024

#: What both parsers say of a list or a mapping in brackets that does not end.
_UNCLOSED: Final = re.compile(r"(?:did not find )?expected ',' or '(?P<bracket>[]}])'")
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG: Final = "tag:yaml.org,2002:"
#: Represents a merge key, <<. It differs from the same text by object identity.
_MERGE: Final = "".join("<<")


class _Mark(Protocol):
    """A place in the text as PyYAML counts, with line and column from 0."""

    line: int
    column: int


@dataclass(slots=True)
class Document:
    """The parsed text of one file.

    Attributes:
        root: The value, None for an empty file or invalid YAML.
        problems: The faults of the text itself.
        complete: Whether it was read to its end.
    """

    file: str
    root: object = None
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True

    def place(self, path: Path, *, at_key: bool = False) -> tuple[Place, str]:
        """Return the place that a path leads to, and the part of the path that exists.

        The place of a scalar is its own start. The place of a list, a mapping or an
        empty value is its key, also for anything missing in it.

        Args:
            at_key: Return the place of the last key instead of its value.
        """
        value: object = self.root
        place = Place(self.file, 1, 1) if isinstance(value, (Map, Seq)) else Place(self.file, 0, 0)
        for depth, step in enumerate(path):
            if isinstance(value, Map) and isinstance(step, str) and step in value.marks:
                marks = value.marks[step]
                value = value[step]
                wants_key = (
                    value is None
                    or isinstance(value, (Map, Seq))
                    or (at_key and depth == len(path) - 1)
                )
                line, column = marks[:2] if wants_key else marks[2:]
            elif isinstance(value, Seq) and isinstance(step, int) and step < len(value.marks):
                (line, column), value = value.marks[step], value[step]
            elif isinstance(value, (dict, list)):
                # The step is missing, or a program made the value, so that it has no
                # marks.
                break
            else:
                return place, format_path(path[:depth])
            place = _place(self.file, line, column)
        return place, format_path(path)


def read(text: str, file: str) -> Document:
    """Return the document in the text.

    Args:
        file: Its name for the places.

    Nothing is raised: all faults are in the document's problems.
    """
    document = Document(file)
    bad = _unprintable(text)
    if bad is not None:
        line = text.count("\n", 0, bad.start())
        column = bad.start() - (text.rfind("\n", 0, bad.start()) + 1)
        fault = f"a text file can't hold the character U+{ord(bad.group()):04X} (take it out)"
        document.problems.append(Problem(Place(file, line + 1, column + 1), "", fault))
        document.complete = False
        return document
    composer = _Composer(text, document)
    try:
        composer.compose()
    except _Stop:
        document.complete = False
    except yaml.YAMLError as error:
        document.complete = False
        if not isinstance(error, yaml.MarkedYAMLError):
            composer.report(None, "not YAML: it can't be read as text (save it as UTF-8)")
            return document
        mark = error.problem_mark or error.context_mark
        if _at_end(text, mark) and error.context_mark is not None:
            # The text ended inside a construct; the start of the construct says more.
            mark = error.context_mark
        composer.report(mark, _syntax(error, text, mark))
    finally:
        composer.dispose()
    return document


def _unprintable(text: str) -> re.Match[str] | None:
    """Return the first character that YAML can't hold, or None.

    The text is searched in pieces: a long search keeps all other threads waiting.
    """
    for start in range(0, len(text), _SEARCHED):
        bad = Reader.NON_PRINTABLE.search(text, start, start + _SEARCHED)
        if bad is not None:
            return bad
    return None


class _Stop(Exception):
    """The rest of the text can't be read; the problem is already reported."""


#: Marks an anchor whose value is not complete: an alias to it would contain itself.
_OPEN: Final = object()
#: Marks a scalar that is already reported as a problem.
_BROKEN: Final = object()


class _Composer:
    """Builds values from the parser's events, and tracks the path of the current value."""

    def __init__(self, text: str, document: Document) -> None:
        self._loader = _LOADER(text)
        self._next = self._loader.get_event
        self._document = document
        self._path: list[str | int] = []
        #: Each anchor's value, and the number of values that it holds.
        self._anchors: dict[str, tuple[object, int]] = {}
        self._written = 0
        self._repeated = 0

    def dispose(self) -> None:
        self._loader.dispose()

    def report(self, mark: _Mark | None, fault: str) -> None:
        place = (
            Place(self._document.file, 1, 1)
            if mark is None
            else _place(self._document.file, mark.line, mark.column)
        )
        self._document.problems.append(Problem(place, format_path(self._path), fault))

    def compose(self) -> None:
        """Read the whole text."""
        self._next()
        event = self._next()
        if type(event) is StreamEndEvent:
            return
        assert type(event) is DocumentStartEvent
        self._document.root = self._value(self._next(), 0)
        self._next()
        event = self._next()
        if type(event) is not StreamEndEvent:
            self.report(event.start_mark, "a second document begins here (one file holds one)")

    def _value(self, event: Any, depth: int) -> object:
        self._written += 1
        kind = type(event)
        if kind is ScalarEvent:
            if (
                event.tag is None
                and event.anchor is None
                and event.value[:1] not in OTHER_THAN_TEXT
            ):
                # Most scalars are text as it stands.
                return event.value
            value = self._scalar(event)
            if event.anchor is not None:
                self._anchors[event.anchor] = value, 1
            return value
        if kind is AliasEvent:
            return self._alias(event)
        if depth >= _DEEPEST:
            self._stop(
                event, f"is nested more than {_DEEPEST} deep (a configuration has five levels)"
            )
        if event.anchor is None:
            return (
                self._mapping(event, depth)
                if kind is MappingStartEvent
                else self._sequence(event, depth)
            )
        self._anchors[event.anchor] = _OPEN, 0
        before = self._written + self._repeated
        value = (
            self._mapping(event, depth)
            if kind is MappingStartEvent
            else self._sequence(event, depth)
        )
        self._anchors[event.anchor] = value, self._written + self._repeated - before + 1
        return value

    def _alias(self, event: Any) -> object:
        value, size = self._anchors.get(event.anchor, (None, 0))
        if value is _OPEN:
            self._stop(event, "an alias is inside its own anchor (take it out)")
        if not size:
            # Its name is not repeated: it may be a key that begins with an asterisk.
            self._stop(
                event,
                "an alias to an unknown anchor (text that begins with '*' needs quotes)",
            )
        self._repeated += size
        if self._repeated > _REPEATED + _REPEATED_EACH * self._written:
            self._stop(
                event, "the aliases up to here repeat too much (write fewer, or shorter anchors)"
            )
        return value

    def _stop(self, event: Any, fault: str) -> None:
        self.report(event.start_mark, fault)
        raise _Stop

    def _sequence(self, start: Any, depth: int) -> Seq:
        self._check_tag(start, "seq")
        items = Seq()
        path = self._path
        path.append(0)
        event = self._next()
        while type(event) is not SequenceEndEvent:
            path[-1] = len(items)
            value = self._value(event, depth + 1)
            if value is None:
                self.report(event.start_mark, "is empty (give a value, or take the item out)")
            items.append(value)
            items.marks.append((event.start_mark.line, event.start_mark.column))
            event = self._next()
        path.pop()
        return items

    def _mapping(self, start: Any, depth: int) -> Map:
        self._check_tag(start, "map")
        entries = Map()
        marks = entries.marks
        merged: list[Map] = []
        merge_mark = None
        path = self._path
        path.append("")
        key_event = self._next()
        while type(key_event) is not MappingEndEvent:
            if (
                type(key_event) is ScalarEvent
                and key_event.tag is None
                and key_event.anchor is None
                and key_event.value[:1] not in OTHER_THAN_TEXT
            ):
                # As _key does, for most keys: two calls for each of them would take a
                # twentieth of the time for a large file.
                key: str | None = key_event.value
                self._written += 1
            else:
                key = self._key(key_event, depth)
            path[-1] = key if key is not None else "?"
            if key is not None and key in marks:
                first = _place(self._document.file, *marks[key][:2])
                self.report(
                    key_event.start_mark, f"is given twice, first at {first} (keep one of them)"
                )
                key = None
            value_event = self._next()
            value = self._value(value_event, depth + 1)
            if key is _MERGE:
                if merge_mark is not None:
                    self.report(
                        key_event.start_mark, "is given twice (merge a list: <<: [*one, *other])"
                    )
                merge_mark = key_event.start_mark
                merged += self._merged(value, value_event)
            elif key is not None:
                if value is None:
                    self.report(
                        key_event.start_mark, "is empty (give a value, or take the key out)"
                    )
                entries[key] = value
                at, value_at = key_event.start_mark, value_event.start_mark
                marks[key] = at.line, at.column, value_at.line, value_at.column
            key_event = self._next()
        path.pop()
        for other in merged:
            for key, value in other.items():
                if key not in entries:
                    entries[key] = value
                    marks[key] = other.marks[key]
        return entries

    def _key(self, event: Any, depth: int) -> str | None:
        """Return the key, _MERGE for a merge, or None after reporting an invalid key."""
        if (
            type(event) is ScalarEvent
            and event.value == "<<"
            and event.tag is None
            and event.implicit[0]
        ):
            return _MERGE
        key = self._value(event, depth + 1)
        if type(key) is str:
            return key
        if key is not _BROKEN:
            kind = {int: "a number", float: "a number", bool: "true or false"}.get(
                type(key), "not text"
            )
            self._path.pop()
            self.report(event.start_mark, f"holds a key that is {kind} to YAML (put it in quotes)")
            self._path.append("")
        return None

    def _merged(self, value: object, event: Any) -> list[Map]:
        maps = value if isinstance(value, Seq) else [value]
        if not all(isinstance(item, Map) for item in maps):
            self.report(
                event.start_mark,
                "only a mapping can be merged (give an alias to one, or a list of them)",
            )
            return []
        return list(maps)

    def _check_tag(self, event: Any, kind: str) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            self.report(
                event.start_mark,
                "a tag without meaning here (text that begins with '!' needs quotes)",
            )

    def _scalar(self, event: Any) -> object:
        tag = event.tag
        try:
            if tag is None or tag == "!":
                return unquoted(event.value) if event.implicit[0] else event.value
            return tagged(tag, event.value)
        except InvalidScalar as error:
            self.report(event.start_mark, str(error))
        return _BROKEN


def _place(file: str, line: int, column: int) -> Place:
    return Place(file, line + 1, column + 1)


def _at_end(text: str, mark: _Mark | None) -> bool:
    return mark is not None and mark.line >= text.rstrip().count("\n") + 1


def _syntax(error: yaml.MarkedYAMLError, text: str, mark: _Mark | None) -> str:
    """Return the YAML fault; it repeats nothing of the text but single characters."""
    if mark is not None:
        lines = text.split("\n")
        line = lines[mark.line] if mark.line < len(lines) else ""
        if line[mark.column : mark.column + 1] == "\t":
            return "not YAML: a tab (indent with spaces)"
    problem = str(error.problem or "unreadable")
    if unclosed := _UNCLOSED.match(problem):
        bracket = unclosed["bracket"]
        return f"not YAML: ',' or '{bracket}' is missing (a list or a mapping is not closed)"
    # The pure Python parser quotes the text that it found, which may be a key.
    problem = re.sub(r"(['\"]).{2,}\1", "something", problem, flags=re.DOTALL)
    context = re.sub(r"(['\"]).{2,}\1", "something", str(error.context or ""), flags=re.DOTALL)
    return f"not YAML: {problem}" + (
        f" ({context})" if context else " (see the YAML of docs/configuration.md)"
    )
