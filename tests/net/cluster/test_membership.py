"""Hosts meet over a real NATS server, exchange frames, and find out what was lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster_net import message
from support.nats_hosts import NatsHost, eventually, run_limited
from support.nats_server import NatsServer, nats_server, needs_nats

from brokerd.net.cluster.errors import MembershipError

pytestmark = needs_nats


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS server."""
    with nats_server(tmp_path) as running:
        yield running


def test_message_to_other_host_is_delivered_and_receipted(server: NatsServer) -> None:
    async def main() -> None:
        a, b = NatsHost("a", server), NatsHost("b", server)
        await a.start()
        await b.start()
        await a.meet(b)
        a.send("b", message("alice", 1) + message("alice", 2))
        await eventually(lambda: a.remotes.outcomes[2])
        assert b.remotes.delivered == [("bob", "alice", 1), ("bob", "alice", 2)]
        assert a.remotes.outcomes == {1: ["receipt"], 2: ["receipt"]}
        await a.membership.close()
        await eventually(lambda: "a" not in b.remotes.up)
        assert b.remotes.calls[-1] == ("down", "a", "its broker has stopped")
        await b.membership.close()

    run_limited(main)


def test_host_with_name_of_another_refuses_to_start(server: NatsServer) -> None:
    async def main() -> None:
        a, b, other = NatsHost("a", server), NatsHost("b", server), NatsHost("a", server)
        await a.start()
        await b.start()
        await a.meet(b)
        with pytest.raises(MembershipError, match="another broker is host a"):
            await other.start()
        assert other.log.named("cluster.refused_to_join")
        await other.membership.close()
        a.send("b", message("alice", 1))
        await eventually(lambda: a.remotes.outcomes[1] == ["receipt"])
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_host_without_nats_starts_and_joins_later(tmp_path: Path) -> None:
    async def main() -> None:
        server = NatsServer(tmp_path / "nats")
        a, b = NatsHost("a", server), NatsHost("b", server)
        await a.start()
        await b.start()
        assert "Connect call failed" in a.membership.failure
        assert a.remotes.is_suspended
        await asyncio.get_running_loop().run_in_executor(None, server.start)
        try:
            await a.meet(b)
            assert a.membership.failure == ""
            assert a.log.named("cluster.nats_found")
        finally:
            server.kill()
        await eventually(lambda: a.membership.failure)
        assert a.remotes.is_suspended
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_restarted_server_leaves_each_message_one_outcome(server: NatsServer) -> None:
    """The server is killed while messages are under way; none is in doubt."""

    async def main() -> None:
        a, b = (NatsHost(name, server, remote_timeout=30.0) for name in "ab")
        await a.start()
        await b.start()
        await a.meet(b)
        for number in range(1, 2001):
            a.send("b", message("alice", number))
            if number % 50 == 0:
                await asyncio.sleep(0)
            if number == 1000:
                server.kill()
        await eventually(lambda: a.membership.failure)
        await asyncio.get_running_loop().run_in_executor(None, server.start)
        await eventually(lambda: all(a.remotes.outcomes[each] for each in range(1, 2001)))
        await eventually(lambda: a.membership.failure == "")
        delivered = [number for _, _, number in b.remotes.delivered]
        assert delivered == sorted(set(delivered))
        for number in range(1, 2001):
            expected = ["receipt"] if number in set(delivered) else ["offline"]
            assert a.remotes.outcomes[number] == expected
        assert a.remotes.up == {"b"}
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_frozen_server_leaves_in_doubt_what_was_under_way(server: NatsServer) -> None:
    async def main() -> None:
        a, b = (NatsHost(name, server, remote_timeout=2.0) for name in "ab")
        await a.start()
        await b.start()
        await a.meet(b)
        server.signal(signal.SIGSTOP)
        try:
            a.send("b", message("alice", 1))
            await eventually(lambda: a.remotes.outcomes[1])
            assert a.remotes.outcomes[1] == ["in_doubt"]
        finally:
            server.signal(signal.SIGCONT)
        await a.meet(b)
        a.send("b", message("alice", 2))
        await eventually(lambda: a.remotes.outcomes[2] == ["receipt"])
        assert a.remotes.outcomes[1] == ["in_doubt"]
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_message_beyond_max_payload_is_too_large(tmp_path: Path) -> None:
    async def main(server: NatsServer) -> None:
        a, b = NatsHost("a", server), NatsHost("b", server)
        await a.start()
        await b.start()
        await a.meet(b)
        assert a.log.named("cluster.small_max_payload")
        a.send("b", message("alice", 1, size=20_000) + message("alice", 2, size=10_000))
        await eventually(lambda: a.remotes.outcomes[1] and a.remotes.outcomes[2])
        assert a.remotes.outcomes == {1: ["too_large"], 2: ["receipt"]}
        await a.membership.close()
        await b.membership.close()

    with nats_server(tmp_path, config="max_payload: 16KB") as server:
        run_limited(lambda: main(server))
