"""Removes a client that ``add_client`` has made: its entry and its keys, all or none."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from brokerd.config.load import load
from brokerd.config.problems import ConfigError

__all__ = ["NotRemoved", "Removed", "remove_client"]


class NotRemoved(Exception):
    """The client can't be removed; the text gives the reason and the remedy.

    Nothing was changed.
    """


@dataclass(frozen=True, slots=True)
class Removed:
    """The removed files, the entry first."""

    files: tuple[Path, ...]


def remove_client(name: str, main: Path) -> Removed:
    """Remove ``clients.d/NAME.yaml`` and the keys that it names below ``keys``.

    Args:
        name: The client's name.
        main: The configuration's main file.

    Raises NotRemoved, or ConfigError if the configuration has mistakes, before or
    after. In both cases nothing was changed.
    """
    home = main.absolute().parent
    entry = home / "clients.d" / f"{name}.yaml"
    config = load(main)
    client = config.clients.get(name)
    if client is None:
        raise NotRemoved(f"{main} has no client {name!r} (brokerd check lists what it has)")
    if Path(client.source.file).absolute() != entry:
        raise NotRemoved(f"client {name!r} is configured at {client.source} (remove it there)")
    others = [each for each in config.clients.values() if each.source.file == client.source.file]
    if len(others) > 1:
        raise NotRemoved(f"{entry} has other clients too (remove {name!r} there)")
    sources = [key.source.partition(" ") for key in client.keys]
    keys = [Path(path).absolute() for kind, _, path in sources if kind == "key_file"]
    keys = [path for path in keys if path.parent == home / "keys"]
    # No pattern matches a name that begins with a dot.
    aside = entry.with_name(f".{entry.name}.removed")
    try:
        entry.rename(aside)
        try:
            load(main)
        except ConfigError:
            aside.rename(entry)
            raise
        aside.unlink()
    except OSError as error:
        raise NotRemoved(f"{entry} can't be removed: {error.strerror}") from error
    for key in keys:
        with contextlib.suppress(FileNotFoundError):
            key.unlink()
    return Removed((entry, *keys))
