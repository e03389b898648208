"""What NATS' permissions protect: no host speaks or listens as another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster_net import message
from support.nats_hosts import NatsHost, eventually, run_limited
from support.nats_server import NatsServer, nats_server, needs_nats

from brokerd.core.cluster.messages import Data, pack
from brokerd.core.cluster.seam import Run

pytestmark = needs_nats


EXAMPLE = Path(__file__).resolve().parents[3] / "config" / "examples" / "cluster-nats.conf"


def authorization() -> str:
    """Return who may say what in the example, which has a user for each host."""
    text = EXAMPLE.read_text(encoding="utf-8")
    start = text.index("authorization {")
    return text[start : text.index("\n}\n", start) + 2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS server with the users of the example."""
    with nats_server(tmp_path, config=authorization()) as running:
        yield running


def host(name: str, server: NatsServer, *, login: str = "", password: str = "") -> NatsHost:
    """Return a host that logs in as a user, by default as its own."""
    login = login or name
    return NatsHost(
        name, server, user=login, password=(password or f"password of {login}").encode()
    )


def test_hosts_with_users_of_their_own_meet(server: NatsServer) -> None:
    async def main() -> None:
        a, b = host("a", server), host("b", server)
        await a.start()
        await b.start()
        await a.meet(b)
        a.send("b", message("alice", 1))
        await eventually(lambda: a.remotes.outcomes[1] == ["receipt"])
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_host_with_wrong_password_says_so_and_tries_again(server: NatsServer) -> None:
    async def main() -> None:
        a = host("a", server, password="wrong")
        await a.start()
        assert "Authorization Violation" in a.membership.failure
        assert a.remotes.is_suspended
        assert "wrong" not in str(a.log.events)
        a.membership.reconfigure(host("a", server).config, a.settings, 1 << 16)
        await eventually(lambda: a.cluster.has_joined)
        assert a.membership.failure == ""
        await a.membership.close()

    run_limited(main)


def test_reload_with_wrong_password_keeps_the_connection(server: NatsServer) -> None:
    async def main() -> None:
        a, b = host("a", server), host("b", server)
        await a.start()
        await b.start()
        await a.meet(b)
        a.membership.reconfigure(host("a", server, password="x").config, a.settings, 1 << 16)
        await eventually(lambda: a.log.named("cluster.nats_lost"))
        assert a.membership.failure == ""
        a.send("b", message("alice", 1))
        await eventually(lambda: a.remotes.outcomes[1] == ["receipt"])
        a.membership.reconfigure(host("a", server).config, a.settings._replace(digest="e"), 1 << 16)
        await eventually(lambda: b.cluster.hosts(0.0)[0]["digest"] == "e")
        assert a.remotes.calls == [("up", "b")]
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_host_that_speaks_as_another_is_not_heard(server: NatsServer) -> None:
    """User c publishes a batch and a bye of host a; host b gets neither."""
    import nats

    async def main() -> None:
        a, b = host("a", server), host("b", server)
        await a.start()
        await b.start()
        await a.meet(b)
        errors: list[str] = []

        async def note(error: Exception) -> None:
            errors.append(str(error))

        foreign: Any = await nats.connect(
            server.url, user="c", password="password of c", error_cb=note, allow_reconnect=False
        )
        boots = [int(each.settings.boot_id, 16) for each in (a, b)]
        frames = message("alice", 1)
        batch = pack(*boots, Data(1, 1, 0, [Run("bob", frames)]).encode())
        await foreign.publish("brokerd.a.b.data", batch)
        await foreign.publish("brokerd.a.all.bye", pack(boots[0], 0, ()))
        await foreign.subscribe("brokerd.*.b.>")
        await eventually(lambda: len(errors) == 3)
        assert all("permissions violation" in each.lower() for each in errors)
        a.send("b", message("alice", 2))
        await eventually(lambda: a.remotes.outcomes[2] == ["receipt"])
        assert b.remotes.delivered == [("bob", "alice", 2)]
        assert b.remotes.up == {"a"}
        await foreign.close()
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_host_with_the_user_of_another_is_told_that_it_may_not(server: NatsServer) -> None:
    async def main() -> None:
        a, b = host("a", server), host("b", server, login="c")
        await a.start()
        await b.start()
        await eventually(lambda: "permissions violation" in b.membership.failure.lower())
        assert b.log.named("cluster.nats_error")
        assert a.cluster.hosts(0.0) == []
        await a.membership.close()
        await b.membership.close()

    run_limited(main)
