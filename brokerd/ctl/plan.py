"""The plan of a reload, from a reply of `$broker`, as readable lines.

The names and values in a plan come from configuration files, so control characters are
escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from brokerd.ctl.output import printable
from brokerd.ctl.status import Failure, Status

__all__ = ["judge", "plan_lines"]


def plan_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines for an answer to ``reload``.

    ``+`` marks an addition, ``-`` a removal, ``~`` a change, and ``!`` a warning.
    Problems are not included: see ``judge``.
    """
    plan = answer.get("plan") or {}
    shown = False
    for line in _lines(plan):
        shown = True
        yield printable(line)
    if answer.get("dry_run") and plan and not shown:
        yield "nothing changes"
    for warning in answer.get("warnings", ()):
        yield printable(f"! {warning}")


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"+ client {name}" for name in plan.get("added", ()))
    for name, changes in plan.get("changed", {}).items():
        yield from (f"~ client {name}: {change}" for change in changes)
    yield from (f"- client {name}" for name in plan.get("removed", ()))
    for connection in plan.get("disconnected", ()):
        address, peer = connection["address"], connection["peer"]
        yield f"! disconnected: {address} ({peer}): {connection['reason']}"
    yield from (f"+ listener {address}" for address in plan.get("opened", ()))
    for address, changes in plan.get("altered", {}).items():
        yield from (f"~ listener {address}: {change}" for change in changes)
    yield from (f"- listener {address}" for address in plan.get("closed", ()))
    for section in ("limits", "log", "monitor", "store", "cluster"):
        yield from (f"~ {section}.{change}" for change in plan.get(section, ()))
    for name in plan.get("orphaned", ()):
        yield f"! orphaned: the mailbox of {name} stays in the store, until it is purged"
    yield from (f"! needs a restart: {setting}" for setting in plan.get("restart", ()))


def judge(answer: Mapping[str, Any]) -> None:
    """Raise Failure if the broker refused a ``reload``.

    Mistakes in the files have an exit status of their own.
    """
    if not answer["problems"]:
        return
    status = Status.CONFIG if answer.get("cause") == "config" else Status.REFUSED
    heading = "would be refused" if answer.get("dry_run") else "the configuration stays as it was"
    problems = "\n".join(map(printable, answer["problems"]))
    raise Failure(status, f"{heading}:\n{problems}")
