"""Several NATS servers, slow hosts and long round trips."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.cluster_net import message
from support.nats_hosts import NatsHost, eventually, run_limited
from support.nats_server import NatsServer, needs_nats
from support.slow_proxy import slow_proxy

from brokerd.net.cluster import nats_connection

pytestmark = needs_nats


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[NatsServer]]:
    """Two NATS servers that are one cluster."""
    first = NatsServer(tmp_path / "first", routes=())
    second = NatsServer(tmp_path / "second", routes=(first.route,))
    with ExitStack() as stack:
        for server in (first, second):
            server.start()
            stack.callback(server.kill)
        yield [first, second]


def account(a: NatsHost, b: NatsHost, last: int) -> None:
    """Check that each message has one outcome, which is true; and their order."""
    delivered = [number for _, _, number in b.remotes.delivered]
    assert delivered == sorted(set(delivered))
    for number in range(1, last + 1):
        (outcome,) = a.remotes.outcomes[number]
        if outcome == "receipt":
            assert number in delivered
        elif outcome == "offline":
            assert number not in delivered
        else:
            assert outcome == "in_doubt"


def test_hosts_at_different_servers_meet(servers: list[NatsServer]) -> None:
    async def main() -> None:
        a, b = NatsHost("a", servers[0]), NatsHost("b", servers[1])
        await a.start()
        await b.start()
        await a.meet(b)
        a.send("b", message("alice", 1))
        await eventually(lambda: a.remotes.outcomes[1] == ["receipt"])
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_host_whose_server_is_killed_goes_on_at_another(servers: list[NatsServer]) -> None:
    async def main() -> None:
        a = NatsHost("a", *servers, remote_timeout=30.0)
        b = NatsHost("b", servers[1], remote_timeout=30.0)
        await a.start()
        await b.start()
        await a.meet(b)
        for number in range(1, 501):
            a.send("b", message("alice", number))
            if number % 20 == 0:
                await asyncio.sleep(0)
            if number == 250:
                servers[0].kill()
        await eventually(lambda: a.log.named("cluster.nats_found"))
        a.send("b", message("alice", 501))
        await eventually(lambda: all(a.remotes.outcomes[each] for each in range(1, 502)))
        account(a, b, 501)
        assert a.remotes.outcomes[501] == ["receipt"]
        assert not any(each == ["in_doubt"] for each in a.remotes.outcomes.values())
        assert a.remotes.calls == [("up", "b")]
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_frozen_server_is_left_for_another(
    servers: list[NatsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_connection, "_PING_S", 0.5)

    async def main() -> None:
        a = NatsHost("a", *servers, remote_timeout=30.0)
        b = NatsHost("b", servers[1], remote_timeout=30.0)
        await a.start()
        await b.start()
        await a.meet(b)
        servers[0].signal(signal.SIGSTOP)
        try:
            a.send("b", message("alice", 1))
            await eventually(lambda: a.remotes.outcomes[1])
            await eventually(
                lambda: a.membership.failure == "" and a.log.named("cluster.nats_lost")
            )
            a.send("b", message("alice", 2))
            await eventually(lambda: a.remotes.outcomes[2])
        finally:
            servers[0].signal(signal.SIGCONT)
        await asyncio.sleep(0.2)
        account(a, b, 2)
        assert a.remotes.outcomes[2] == ["receipt"]
        await a.membership.close()
        await b.membership.close()

    run_limited(main)


def test_slow_host_fills_its_own_window_only(servers: list[NatsServer]) -> None:
    async def main() -> None:
        a, b, c = (NatsHost(name, servers[0], unanswered=10_000) for name in "abc")
        for each in (a, b, c):
            await each.start()
        await a.meet(b, c)
        b.remotes.blocks = True
        for number in range(1, 2001):
            a.send("b", message("alice", number))
        for number in range(2001, 3001):
            a.send("c", message("alice", number))
        await eventually(lambda: len(c.remotes.delivered) == 1000)
        waiting = sum(len(frames) for frames in b.remotes.waiting.values())
        assert 0 < waiting < 500
        b.remotes.unblock()
        await eventually(lambda: all(a.remotes.outcomes[each] for each in range(1, 2001)))
        assert len(b.remotes.delivered) == 2000
        account(a, b, 2000)
        for each in (a, b, c):
            await each.membership.close()

    run_limited(main)


def test_round_trip_of_50_ms_leaves_throughput(servers: list[NatsServer]) -> None:
    """The window, and not the round trip, bounds what is under way."""

    async def main() -> None:
        async with slow_proxy(servers[0].port, 0.025) as proxy:
            a = NatsHost("a", servers[0])
            b = NatsHost("b", servers[0], urls=(proxy.url,))
            await a.start()
            await b.start()
            await a.meet(b)
            for number in range(1, 3001):
                a.send("b", message("alice", number))
                if number % 100 == 0:
                    await asyncio.sleep(0)
            await eventually(lambda: a.remotes.outcomes[3000])
            account(a, b, 3000)
            assert all(each == ["receipt"] for each in a.remotes.outcomes.values())
            await eventually(lambda: a.cluster.hosts(0.0)[0]["round_trip_ms"] >= 50)
            await a.membership.close()
            await b.membership.close()

    run_limited(main)


@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_host_that_is_cut_from_nats_leaves_one_outcome_for_each_id(
    servers: list[NatsServer], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """No connection is closed, and no byte passes: for less or more than remote_timeout."""
    monkeypatch.setattr(nats_connection, "_PING_S", 1.0)

    async def main() -> None:
        async with slow_proxy(servers[0].port) as proxy:
            a = NatsHost("a", servers[1], remote_timeout=2.0)
            b = NatsHost("b", servers[0], urls=(proxy.url,), remote_timeout=2.0)
            await a.start()
            await b.start()
            await a.meet(b)
            proxy.is_cut = True
            for number in range(1, 101):
                a.send("b", message("alice", number))
                await asyncio.sleep(seconds / 100)
            proxy.is_cut = False
            await eventually(lambda: all(a.remotes.outcomes[each] for each in range(1, 101)))
            await a.meet(b)
            a.send("b", message("alice", 101))
            await eventually(lambda: a.remotes.outcomes[101] == ["receipt"])
            account(a, b, 101)
            await a.membership.close()
            await b.membership.close()

    run_limited(main)
