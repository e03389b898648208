"""Admin commands to a running daemon, sent through the broker, and their answers.

The core has checked the client's permission. It passes on the commands that only the
daemon can execute: drain, reload, replace the process, change log levels, report key
usage. Source: docs/protocol.md, "Operations".
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from brokerd.core.broker import AdminCommand
from brokerd.log.levels import LevelRefused
from brokerd_client.wire.envelope import BROKER, ErrorCode

if TYPE_CHECKING:
    from brokerd.daemon.daemon import Daemon

__all__ = ["AdminCommands"]

#: Entries of a long answer that are encoded per turn of the event loop: some
#: milliseconds' work.
_ENTRIES: Final = 256
#: Long answers that may be in progress or waiting at once.
_MOST_LONG: Final = 64


class AdminCommands:
    """The admin commands given to one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        #: Long answers are encoded one at a time; `_long` counts those in progress or
        #: waiting.
        self._one_long = asyncio.Lock()
        self._long = 0

    def execute(self, order: AdminCommand) -> None:
        """Execute a command or begin to; its sender is answered when it is done."""
        daemon = self._daemon
        asker = order.source.client.name
        if order.op == "drain":
            reply: dict[str, Any] = {"draining": True}
            if daemon.assigned:
                # The service manager listens on, and starts a new broker.
                reply["activated"] = sorted(str(entry.address) for entry in daemon.assigned)
            daemon.broker.replies.reply(order.source, order.id, reply)
            daemon.stop_soon(f"request of {asker}")
        elif order.op == "log_level":
            self._answer_log_level(order)
        elif order.op == "keys":
            self._answer_in_turns(
                order, "clients", daemon.key_uses(), {"since": daemon.broker.status.started_at}
            )
        elif order.op == "upgrade":
            if daemon.on_upgrade is not None:
                daemon.on_upgrade(f"request of {asker}", order)
            else:
                problems = [
                    "this broker is part of another program, which would have to be replaced"
                ]
                daemon.broker.replies.reply(
                    order.source, order.id, {"upgraded": False, "problems": problems}
                )
                daemon.server.settle()
        else:
            daemon.in_background(self._reload_for(order, f"request of {asker}"))

    def _answer_in_turns(
        self,
        order: AdminCommand,
        name: str,
        entries: Iterator[dict[str, Any]],
        more: dict[str, object],
    ) -> None:
        """Answer with a list too long to encode in one turn without blocking the event
        loop.
        """
        daemon = self._daemon
        if self._long >= _MOST_LONG:
            message = f"{self._long} long answers are in progress already; ask again later"
            daemon.broker.replies.refuse(order.source, order.id, ErrorCode.FULL, message, BROKER)
            daemon.server.settle()
            return
        self._long += 1
        daemon.in_background(self._collect(order, name, entries, more))

    async def _collect(
        self,
        order: AdminCommand,
        name: str,
        entries: Iterator[dict[str, Any]],
        more: dict[str, Any],
    ) -> None:
        daemon = self._daemon
        pieces = [f'{{"{name}": ['.encode()]
        separator = ""
        try:
            async with self._one_long:
                while chunk := list(itertools.islice(entries, _ENTRIES)):
                    pieces.append(f"{separator}{json.dumps(chunk)[1:-1]}".encode())
                    separator = ", "
                    await asyncio.sleep(0)
        finally:
            self._long -= 1
        more_fields = "".join(
            f", {json.dumps(key)}: {json.dumps(value)}" for key, value in more.items()
        )
        pieces.append(f"]{more_fields}}}".encode())
        daemon.broker.replies.reply_json(order.source, order.id, *pieces)
        daemon.server.settle()

    def _answer_log_level(self, order: AdminCommand) -> None:
        daemon, arguments = self._daemon, order.arguments
        try:
            if daemon.own_log is None:
                raise LevelRefused("the log of this broker belongs to its program")
            if arguments:
                daemon.own_log.change_level(
                    arguments.get("area"),
                    arguments.get("level"),
                    arguments.get("for"),
                    by=order.source.client.name,
                )
        except LevelRefused as error:
            daemon.broker.replies.refuse(
                order.source, order.id, ErrorCode.UNSUPPORTED, str(error), BROKER
            )
        else:
            daemon.broker.replies.reply(order.source, order.id, {"levels": daemon.own_log.levels()})
        daemon.server.settle()

    async def _reload_for(self, order: AdminCommand, reason: str) -> None:
        daemon = self._daemon
        dry_run = order.arguments.get("dry_run") is True
        outcome = await daemon.reloading.run(reason, dry_run=dry_run)
        # Before bytes are written: a client that this reload disconnects must still get
        # its answer.
        pieces = outcome.as_reply(daemon.config.path, dry_run=dry_run)
        daemon.broker.replies.reply_json(order.source, order.id, *pieces)
        daemon.server.settle()
