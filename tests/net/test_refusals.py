"""How turning strangers away is logged, and what becomes of a connection that meets a bug of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from net.house import configuration, house

from brokerd.core import routing


def test_a_flood_of_refusals_is_counted_rather_than_repeated(socket_dir: Path) -> None:
    """The first of them have a line each, the rest one line with their number; none is left out."""
    with house(configuration(str(socket_dir / "sock"))) as here:
        for _ in range(300):
            here.raw().close()
        here.log.wait("client.refused_more")
        # All three hundred are accounted for, however many periods they fell into.
        here.login("alice").close()
        here.log.wait("client.disconnected")
        here.stop_soon()
        here.log.wait("daemon.stopped")
        more = sum(event.fields["count"] for event in here.log.named("client.refused_more"))
        assert len(here.log.named("client.refused")) + more == 300


def test_a_bug_ends_one_connection_and_is_loud(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed, the log has the trace, and the others go on."""
    with house(configuration(str(socket_dir / "sock"))) as here:
        alice, bob = here.login("alice"), here.login("bob")
        right = routing.feed

        def wrong(broker: object, source: object, *rest: object) -> object:
            if getattr(source, "address", "") == "alice":
                raise ZeroDivisionError("a bug")
            return right(broker, source, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(routing, "feed", wrong)
        alice.send(1, "bob", b"hello")
        assert alice.is_closed()
        event = here.log.wait("daemon.bug")[0]
        assert event.level == "error"
        assert "ZeroDivisionError" in event.fields["error"]
        assert bob.ask("whoami").json["name"] == "bob"
        alice.close()
        bob.close()
