"""What the monitor says of a host that reaches no other one."""

from __future__ import annotations

import pytest
from support.nats_server import free_port
from support.scraping import get, samples, watched
from support.waiting import until

pytest.importorskip("nats", reason="needs nats-py")


def test_readyz_without_nats_is_200_and_says_so_in_a_second_line() -> None:
    """The host's own clients are served."""
    url = f"nats://127.0.0.1:{free_port()}"
    with watched("alice bob", cluster={"host": "a", "nats": [url]}) as broker:
        until(lambda: bool(broker.call(lambda: broker.daemon.cluster_host.failure)))
        answer = get(broker, "/readyz")
        assert answer.status == 200
        first, second = answer.body.splitlines()
        assert first == "ready"
        assert second.startswith(f"no other host can be reached: {url}: ")
        assert samples(broker)["brokerd_nats_connected"] == 0
        with broker.login("alice") as alice:
            alice.ping()


def test_readyz_without_a_cluster_is_one_line() -> None:
    with watched("alice") as broker:
        assert get(broker, "/readyz").body == "ready\n"
        assert "brokerd_nats_connected" not in samples(broker)
