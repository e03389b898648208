"""The warning of a daemon that runs the routing loop in Python."""

from __future__ import annotations

import pytest
from support.running_daemon import configuration, running_daemon

import brokerd.daemon.daemon


@pytest.mark.parametrize("reason", ["no compiler", ""])
def test_daemon_with_slow_routing_loop_warns_of_it(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """The warning has the reason; with the compiled loop there is no warning."""
    monkeypatch.setattr(brokerd.daemon.daemon, "WHY_SOURCES", reason)

    with running_daemon(configuration("127.0.0.1:0", {"a": {}})) as daemon:
        warnings = daemon.log.named("daemon.slow_routing")

    assert [(each.level, each.fields) for each in warnings] == (
        [("warning", {"reason": reason})] if reason else []
    )
