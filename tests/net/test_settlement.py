"""What a settlement does for other hosts of a cluster."""

from __future__ import annotations

import asyncio

import pytest
from support.cluster_net import ClusterNet
from support.running_daemon import Recorder

from brokerd.core.broker import Broker
from brokerd.log.rate_limit import LogRateLimiter
from brokerd.net.settlement import Settlement


@pytest.mark.parametrize("settle", ["settle", "settle_read"])
def test_settlement_publishes_only_what_there_is_for_other_hosts(settle: str) -> None:
    loop = asyncio.new_event_loop()
    broker = Broker((), version="test", now_wall=0.0)
    log = LogRateLimiter(loop, Recorder().logger)
    settlement = Settlement(loop, broker, log, lambda command: None, wall=lambda: 0.0)
    cluster = ClusterNet().start("a", is_online=False).cluster
    published = []
    settlement.cluster = cluster
    settlement.on_outgoing = lambda: published.append(cluster.take_outgoing(0.0))

    getattr(settlement, settle)()
    assert published == []
    cluster.touch("b")
    getattr(settlement, settle)()
    getattr(settlement, settle)()
    assert published == [[]]
    # News that wait for frames need the timer, which is set where frames are published.
    cluster.postpone(1.0)
    getattr(settlement, settle)()
    assert published == [[], []]

    settlement.close()
    loop.close()
