"""All attacks at once: the broker's memory stays below the bound of its configuration,
and other clients are served.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.siege.siege import LIMITS, LOG, besiege, clients, until_listening

from brokerd.config.load import load
from brokerd.config.memory_bound import memory_bound

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is read from /proc"
)


@pytest.mark.parametrize(
    "seconds", [pytest.param(4, id="short"), pytest.param(60, id="long", marks=pytest.mark.slow)]
)
def test_memory_under_all_attacks_stays_below_bound(socket_dir: Path, seconds: int) -> None:
    """Under every attack at once, the broker holds less memory than its configuration
    allows. Two well-behaved clients still exchange messages.
    """
    seconds = int(os.environ.get("BROKERD_SIEGE_S", seconds))
    with BrokerProcess(socket_dir, clients(), limits=LIMITS, log=LOG) as broker:
        until_listening(broker)
        bound = memory_bound(load(broker.config)).total

        samples, took = besiege(broker, seconds)

        most = max(size for _, size in samples)
        took.sort()
        print(
            f"\n{seconds} s: at most {most / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB;"
            f" {len(took)} good messages,"
        )
        print(f"median {took[len(took) // 2] * 1e3:.2f} ms, longest {took[-1] * 1e3:.0f} ms")
        assert most < bound
        assert len(took) > seconds
        broker.signal()
        assert broker.exit_status() == 0
