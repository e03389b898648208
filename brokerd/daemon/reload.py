"""A reload's preparation: read and compare the configuration, and do all slow work.

Nothing changes here: the daemon takes over the prepared configuration, or does not. The
log and the client that asked for the reload get a ReloadOutcome.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from brokerd import __version__
from brokerd.config.diff import Plan, compare, overlaps
from brokerd.config.key_validity import ending
from brokerd.config.lint import lint_warnings
from brokerd.config.load import load
from brokerd.config.model import Config
from brokerd.config.values import ClientConfig, ListenConfig
from brokerd.core.session import Session
from brokerd.daemon import garbage
from brokerd.monitor.toggle import preload
from brokerd.net.handshake.keyring import Keyring
from brokerd.net.handshake.peer_uid import unseen
from brokerd.net.listen.listener import Listening, Resolved, look_up, precheck
from brokerd.net.listen.socket_activation import ActivatedSocket, ActivatedSockets

__all__ = [
    "Cause",
    "Prepared",
    "ReloadOutcome",
    "blockers",
    "compare_running",
    "json_pieces",
    "logged",
    "plan_fields",
    "prepare",
]

#: Most entries of each list of a plan in a log event.
_LOGGED: Final = 1000
#: Entries of a plan that are encoded in one turn: a millisecond's work.
_ENCODED: Final = 512

#: Why a reload is refused: a mistake in the files, an address, the audit file, the store
#: of the mailboxes, or the broker is about to stop or to be replaced.
Cause: TypeAlias = Literal["", "config", "listen", "audit", "store", "draining", "upgrade"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Another configuration, ready to be taken over.

    Attributes:
        keyring: The new keys, with the uses of the running keyring up to now.
        ending: The clients that have a key with an end.
        users_unseen: The clients with users that this process can't see.
        assigned: The service manager's sockets for its entries.
        blocked: Why it can't be taken over, a line each.
        resolved: The addresses of new host names.
        warnings: Probable mistakes of its author, a line each.
        opened: Sockets that listen at new addresses, for clients and for the monitor.
        audit: A descriptor of a new audit file, or None.
    """

    config: Config
    plan: Plan
    keyring: Keyring
    ending: list[ClientConfig]
    users_unseen: dict[str, list[int]]
    assigned: dict[ListenConfig, list[ActivatedSocket]]
    blocked: tuple[str, ...] = ()
    resolved: Resolved = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    opened: tuple[list[Listening], list[Listening]] = field(default_factory=lambda: ([], []))
    audit: int | None = None

    def discard(self) -> None:
        """Close the sockets and files opened for it, since it is not taken over."""
        for group in self.opened:
            for listening in group:
                listening.close()
        if self.audit is not None:
            os.close(self.audit)


@dataclass(frozen=True, slots=True)
class ReloadOutcome:
    """How a reload went, or would go.

    Attributes:
        plan: As ``plan_fields`` returns it; None where the files have mistakes.
        problems: A line each; an empty list means success.
        cause: The kind of the problems.
        warnings: A line each.
        plan_json: The plan in pieces, as ``json_pieces`` yields them; empty if it was not
            encoded yet.
    """

    plan: dict[str, Any] | None
    problems: list[str] = field(default_factory=list)
    cause: Cause = ""
    warnings: tuple[str, ...] = ()
    plan_json: list[bytes] = field(default_factory=list)

    def as_reply(self, config: str, *, dry_run: bool) -> list[bytes]:
        """Return the reply to the operation ``reload``, as pieces of its JSON.

        config: the main file.
        """
        facts = {
            "reloaded": not self.problems and not dry_run,
            "dry_run": dry_run,
            "problems": self.problems,
            "cause": self.cause,
            "warnings": list(self.warnings),
            "config": str(Path(config).absolute()),
        }
        plan = self.plan_json or [json.dumps(self.plan).encode()]
        return [json.dumps(facts)[:-1].encode(), b', "plan": ', *plan, b"}"]


def prepare(
    running: Config,
    activated: ActivatedSockets,
    assigned: dict[ListenConfig, list[ActivatedSocket]],
    keyring: Keyring,
) -> Prepared:
    """Return the configuration in the files, ready to be taken over.

    Slow: to be run in a thread.

    Args:
        activated: The service manager's sockets.
        assigned: Which of them each entry of the running configuration uses.
        keyring: The keys of the running configuration.

    Raises ConfigError and ListenError.
    """
    with garbage.undisturbed():
        return _prepared(running, activated, assigned, keyring)


def _prepared(
    running: Config,
    activated: ActivatedSockets,
    assigned: dict[ListenConfig, list[ActivatedSocket]],
    keyring: Keyring,
) -> Prepared:
    prepared = compare_running(running, load(Path(running.path)), activated, assigned, keyring)
    plan = prepared.plan
    preload(prepared.config.monitor)
    new = (
        *(entry for entry in plan.opened if entry not in prepared.assigned),
        *plan.monitor_opened,
    )
    return replace(
        prepared,
        plan=plan._replace(restart=(*plan.restart, *_another_version())),
        resolved=look_up(new),
        warnings=tuple(lint_warnings(prepared.config, datetime.now(UTC))),
    )


def compare_running(
    running: Config,
    config: Config,
    activated: ActivatedSockets,
    assigned: dict[ListenConfig, list[ActivatedSocket]],
    keyring: Keyring,
) -> Prepared:
    """Return a loaded configuration, ready to be taken over. Raises ListenError."""
    plan = compare(running, config)
    new_sockets = activated.assign(config.listen)
    new = (*(entry for entry in plan.opened if entry not in new_sockets), *plan.monitor_opened)
    new_keyring = Keyring(config.clients.values(), config.limits.identify_by_key)
    new_keyring.adopt_uses(keyring)
    blocked = overlaps(new, (*plan.closed, *plan.monitor_closed))
    return Prepared(
        config,
        plan,
        new_keyring,
        ending(config.clients.values()),
        unseen(config.clients),
        new_sockets,
        (*plan.refused, *blocked, *_swaps(plan, assigned, new_sockets)),
    )


def _swaps(
    plan: Plan,
    assigned: dict[ListenConfig, list[ActivatedSocket]],
    new_sockets: dict[ListenConfig, list[ActivatedSocket]],
) -> Iterator[str]:
    """Yield a problem for each address that stays but would get other sockets than
    before.
    """
    before = {entry.address: sockets for entry, sockets in assigned.items()}
    for entry, _ in plan.altered:
        if new_sockets.get(entry, []) != before.get(entry.address, []):
            yield (
                f"{entry.address}: with name: {entry.name} another socket of the service manager's"
                " would be listened at (restart the broker for that)"
            )


def _another_version() -> list[str]:
    # Imported here because the import is slow.
    import importlib.metadata

    # For a folder that does not exist, importlib builds new objects on each call, in
    # cycles that wait for the collector.
    there = [entry for entry in sys.path if entry and Path(entry).is_dir()]
    installed = next(iter(importlib.metadata.distributions(name="brokerd", path=there)), None)
    if installed is None or installed.version == __version__:
        return []
    return [f"version {installed.version} is installed, and {__version__} runs"]


def blockers(prepared: Prepared) -> list[str]:
    """Return why it can't be taken over, as far as a check without trying shows; a line
    each.
    """
    by_itself = (entry for entry in prepared.plan.opened if entry not in prepared.assigned)
    return [
        *prepared.blocked,
        *filter(None, map(precheck, (*by_itself, *prepared.plan.monitor_opened))),
    ]


def plan_fields(plan: Plan, leaving: Iterable[tuple[Session, str]]) -> dict[str, Any]:
    """Return the plan, with the sessions that are disconnected and the reasons.

    leaving: as ``Server.unauthorized_in_batches`` yields them.
    """
    return {
        **plan.as_fields(),
        "disconnected": [
            {"address": session.address, "peer": session.peer, "reason": reason}
            for session, reason in sorted(leaving, key=lambda pair: pair[0].address)
        ],
    }


def json_pieces(fields: dict[str, Any]) -> Iterator[bytes]:
    """Yield the JSON of a plan's fields in pieces, each of which takes little time."""
    if sum(map(len, fields.values())) <= _ENCODED:
        yield json.dumps(fields).encode()
        return
    before = "{"
    for name, value in fields.items():
        is_mapping = isinstance(value, dict)
        yield f"{before}{json.dumps(name)}: {'{' if is_mapping else '['}".encode()
        entries = iter(value.items() if is_mapping else value)
        before = ""
        while chunk := list(islice(entries, _ENCODED)):
            yield f"{before}{json.dumps(dict(chunk) if is_mapping else chunk)[1:-1]}".encode()
            before = ", "
        yield b"}" if is_mapping else b"]"
        before = ", "
    yield b"}"


def logged(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a plan's fields for a log event, without the ends of very long lists.

    A line with a hundred thousand names takes long to write, and no log accepts it.
    """
    return {name: _shortened(value) for name, value in fields.items()}


def _shortened(value: Any) -> Any:
    more = [f"and {len(value) - _LOGGED} more"] if len(value) > _LOGGED else []
    if isinstance(value, dict):
        shown = {name: list(changes) for name, changes in islice(value.items(), _LOGGED)}
        return {**shown, **{name: [] for name in more}}
    return [*value[:_LOGGED], *more]
