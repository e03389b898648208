"""`brokerctl`: talks to a running broker as a client of it, with that client's key and
rights.

Knows nothing of the daemon's inside: everything goes through
:func:`brokerd_client.connect`.
"""

from __future__ import annotations

from brokerd.ctl import bench, hosts, mailbox, messages, operations, tap, top, why
from brokerd.ctl.command import brokerctl, main

__all__ = ["main"]

for _module in (messages, operations, hosts, mailbox, why, tap, top, bench):
    for _command in _module.COMMANDS:
        brokerctl.add_command(_command)
