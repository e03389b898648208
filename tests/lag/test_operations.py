"""No operation of ``$broker`` blocks the event loop: the table below has every one of
them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.lag.crowded_broker import Crowded
from support.raw_client import ERROR, REPLY

from brokerd.core import operations as service

#: What is asked of the crowded broker, by operation: its arguments, made for the worst
#: that a client can ask.
ARGUMENTS: dict[str, Callable[[], dict[str, object]]] = {
    "whoami": dict,
    "ping": dict,
    "clients": dict,
    "subscribe": lambda: {"topic": ".".join("*" * 127), "group": "g"},
    "unsubscribe": lambda: {"topic": ".".join("*" * 127), "group": "g"},
    "stats": dict,
    "connections": dict,
    "keys": dict,
    "can": lambda: {"sender": "sender", "verb": "publish", "target": ".".join("a" * 127)},
    "disconnect": lambda: {"address": "crowd"},
    "log_level": dict,
    "reload": lambda: {"dry_run": True},
    "upgrade": dict,
    "cancels": dict,
    "in_flight": lambda: {"n": 1},
    "listen": dict,
    "unlisten": dict,
    "channels": dict,
    "goaway": dict,
    "finished": dict,
    "mailboxes": dict,
    "open_mailbox": dict,
    "close_mailbox": dict,
    "mailbox_show": lambda: {"name": "crowd", "state": "ready"},
    "mailbox_kick": lambda: {"name": "crowd", "seq": "all"},
    "mailbox_drop": lambda: {"name": "crowd", "seq": 1},
    "mailbox_purge": lambda: {"name": "crowd", "state": "dead"},
    "mailbox_import": lambda: {"name": "crowd", "messages": [{}]},
    "tap": lambda: {"pattern": "crowd"},
    "why": lambda: {"name": "crowd"},
    "hosts": dict,
}
#: Operations that have cases of their own: what each is measured by.
ELSEWHERE = {"drain": "test_turns.py"}
#: What a part of a program answers to these with an error, a broker that does not drain,
#: and one without mailboxes.
REFUSED = {"upgrade", "log_level", "reload", "finished"}
REFUSED |= {"open_mailbox", "close_mailbox"}
REFUSED |= {"mailbox_show", "mailbox_kick", "mailbox_drop", "mailbox_purge", "mailbox_import"}


def test_operations_all_have_a_case() -> None:
    """A new operation must be measured too."""
    known = {*service._OPEN, *service._ADMIN}
    assert known <= {*ARGUMENTS, *ELSEWHERE}, known - {*ARGUMENTS, *ELSEWHERE}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_event_loop_with_each_operation_stays_responsive(broker: Crowded, op: str) -> None:
    """With 10,000 clients configured and 8,000 connected."""
    if op == "disconnect":
        broker.call(lambda: [broker.connect_without_socket("crowd") for _ in range(1500)])
    with broker.login("ops") as ops:
        ops.ping()
        broker.meter.reset()
        answer = ops.ask(op, **ARGUMENTS[op]())
        assert answer.kind == REPLY or (op in REFUSED and answer.kind == ERROR), answer
        broker.idle()
    broker.idle()
    broker.meter.check()
