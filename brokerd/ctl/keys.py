"""Prints the list of all clients' keys from `$broker`: ids, times and uses, but no key."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from brokerd.ctl.output import note, print_json, print_table, printable, since

__all__ = ["show_keys"]


def show_keys(answer: Mapping[str, Any], as_json: bool) -> None:
    """Print the answer to the operation ``keys``: a line for each key."""
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            client["name"],
            key["id"] or "none",
            key["state"],
            _window(key),
            since(key["last_used"]) or "not used",
            str(key["connections"]),
            printable(key["source"]),
        )
        for client in sorted(answer["clients"], key=lambda entry: str(entry["name"]))
        for key in client["keys"]
    ]
    print_table(("client", "key", "state", "accepted", "last used", "connections", "source"), rows)
    note(f"uses are known since the broker started, {since(answer['since'])}")


def _window(key: Mapping[str, Any]) -> str:
    begin = f"from {_moment(key['not_before'])}" if key["not_before"] else ""
    end = f"until {_moment(key['not_after'])}" if key["not_after"] else ""
    return " ".join(filter(None, (begin, end))) or "always"


def _moment(text: str) -> str:
    return since(datetime.fromisoformat(text).timestamp())
