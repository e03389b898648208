"""Completion of client names: what the broker lists for the client that asks."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import CompletionItem

from brokerd.ctl.command import Access
from brokerd_client.errors import BrokerdError

__all__ = ["complete_name"]

#: Seconds that a person waits after the tab key, at most.
_TIMEOUT_S: Final = 2.0


def complete_name(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the clients whose names begin so; none if no broker can be asked."""
    access = context.find_object(Access) or Access()
    try:
        with access.connect(timeout=_TIMEOUT_S) as client:
            infos = client.clients()
    except (BrokerdError, click.ClickException, OSError):
        return []
    return [
        CompletionItem(info.name, help="online" if info.online else "offline")
        for info in sorted(infos, key=lambda info: info.name)
        if info.name.startswith(incomplete)
    ]
