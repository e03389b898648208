"""The addresses at which the broker listens, read without the clients and their keys.

A file is read only up to its ``listen`` section. The rest may hold a hundred thousand
clients, or a mistake that the running broker has already refused. Neither matters to a
program that only looks for the broker. An invalid address is skipped; ``load`` is what
reports mistakes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from brokerd.config.file_reader import Unreadable
from brokerd.config.paths import shortened
from brokerd.config.text_files import matching, text_of
from brokerd.config.yaml_reader import read
from brokerd_client.address import Address, parse
from brokerd_client.errors import AddressError

__all__ = ["Entrance", "entrances"]

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPENS: Final = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSES: Final = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


@dataclass(frozen=True, slots=True)
class Entrance:
    """One address at which the broker listens. tls: whether the listener uses TLS."""

    address: Address
    tls: bool = False


def entrances(file: str, environ: Mapping[str, str]) -> list[Entrance]:
    """Return the listen addresses of a configuration, in its order.

    They come from the first file that has a ``listen`` section.
    file: the main file, or ``text_files.IN_ENVIRON``.
    Raises Unreadable if the main file can't be read; an unreadable included file is
    skipped.
    """
    text, _ = text_of(file, environ)
    return _entrances(file, text, {os.path.realpath(file)})


def _entrances(file: str, text: str, seen: set[str]) -> list[Entrance]:
    base = os.path.dirname(file)  # noqa: PTH120 - a Path would make "" a "."
    sections = _sections(text, file)
    listen = sections.get("listen")
    if isinstance(listen, list):
        return list(_addresses(listen, base))
    includes = sections.get("include")
    for pattern in includes if isinstance(includes, list) else []:
        for included in _matching(pattern, base):
            true = os.path.realpath(included)
            if true in seen:
                continue
            seen.add(true)
            try:
                included_entrances = _entrances(included, text_of(included)[0], seen)
            except Unreadable:
                continue
            if included_entrances:
                return included_entrances
    return []


def _matching(pattern: object, base: str) -> list[str]:
    if not isinstance(pattern, str) or "\0" in pattern:
        return []
    try:
        return matching(pattern, base)
    except Unreadable:
        return []


def _addresses(listen: list[Any], base: str) -> Iterator[Entrance]:
    for entry in listen:
        tls = isinstance(entry, Mapping) and entry.get("tls") is not None
        try:
            address = parse(entry.get("address", "") if isinstance(entry, Mapping) else entry)
        except AddressError:
            continue
        if address.is_file:
            path = shortened(os.path.join(base, address.path))  # noqa: PTH118 - as written
            address = Address("AF_UNIX", path=path)
        yield Entrance(address, tls)


def _sections(text: str, file: str) -> dict[str, Any]:
    """Return the top level's ``listen`` as soon as it is found, or else ``include``."""
    sections: dict[str, Any] = {}
    loader = _LOADER(text)
    try:
        for key, begin, end in _top_level(loader):
            if key in ("listen", "include"):
                root = read(text[begin:end], file).root
                if isinstance(root, dict):
                    sections[key] = root.get(key)
            if key == "listen":
                break
    except (yaml.YAMLError, UnicodeError):
        # The sections read up to here are still valid.
        pass
    finally:
        loader.dispose()
    if not isinstance(sections.get("listen"), list):
        # The value is an alias to another part of the file, or comes from a merge. This
        # is rare, and the whole text is read then.
        root = read(text, file).root
        if isinstance(root, dict):
            sections = {key: root[key] for key in ("listen", "include") if key in root}
    return sections


def _top_level(loader: Any) -> Iterator[tuple[str, int, int]]:
    """Yield each key of the outermost mapping, its start, and the end of its value.

    Both positions are character indexes into the text.
    """
    depth = 0
    key: Any = None
    while True:
        event = loader.get_event()
        if isinstance(event, (yaml.StreamEndEvent, yaml.DocumentEndEvent)):
            return
        if isinstance(event, _OPENS):
            depth += 1
            if depth == 1:
                continue
        elif isinstance(event, _CLOSES):
            depth -= 1
        elif depth == 0:
            continue
        if depth != 1:
            continue
        if key is None:
            key = event
            # The key is itself a mapping or a list: the text is not a configuration.
            if not isinstance(key, yaml.ScalarEvent):
                return
        else:
            yield key.value, key.start_mark.index, event.end_mark.index
            key = None
