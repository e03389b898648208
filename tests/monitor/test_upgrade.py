"""The monitor across an upgrade of the daemon: the same sockets, and counters that
continue.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from http.client import HTTPException
from pathlib import Path

import pytest
import yaml
from support.broker_process import BrokerProcess
from support.scraping import get, read_prometheus

from brokerd_client.address import Address, parse

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGUSR2") or os.name != "posix", reason="needs Linux"
)

CLIENTS = {"ops": {"admin": True}}


def listening_at(broker: BrokerProcess) -> Address:
    return parse(broker.wait("monitor.listening")[0]["addresses"][0])


def value(at: Address, name: str) -> float:
    families = {each.name: each for each in read_prometheus(get(at, "/metrics").body)}
    return families[name].samples[0].value


def test_monitor_answers_throughout_two_upgrades(socket_dir: Path) -> None:
    """A health check runs without a pause during two upgrades: no request is refused,
    and the counters continue.

    A request that the old process answers in its last moment may be cut off, once per
    upgrade.
    """
    with BrokerProcess(socket_dir, CLIENTS, monitor="127.0.0.1:0", log={"level": "info"}) as broker:
        at = listening_at(broker)
        answers: list[int | str] = []
        done = threading.Event()

        def ask() -> None:
            while not done.wait(0.02):
                try:
                    answers.append(get(at, "/readyz").status)
                except ConnectionRefusedError:
                    answers.append("refused")
                except (ConnectionError, HTTPException):
                    answers.append("cut off")

        asking = threading.Thread(target=ask)
        with broker.login("ops") as ops:
            assert value(at, "brokerd_upgrades") == 0
            asking.start()
            try:
                for _ in range(2):
                    ops.ask("ping")
                    before = value(at, "brokerd_messages_received")
                    answer = ops.ask("upgrade").json
                    assert answer["upgraded"], answer
                    assert value(at, "brokerd_messages_received") > before
            finally:
                done.set()
                asking.join(30)
            assert value(at, "brokerd_upgrades") == 2
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0

    assert set(answers) <= {200, "cut off"}
    assert answers.count("cut off") <= 2
    assert answers.count(200) > 10


@pytest.mark.parametrize("after", ["moved", "off"])
def test_monitor_upgrade_with_new_configuration_moves_or_closes_it(
    socket_dir: Path, after: str
) -> None:
    """The new process has the monitor where its configuration says, and the old socket
    file is removed.
    """
    path = socket_dir / "monitor"
    with BrokerProcess(socket_dir, CLIENTS, monitor=str(path), log={"level": "info"}) as broker:
        assert get(listening_at(broker), "/livez").status == 200
        config = yaml.safe_load(broker.config.read_text())
        config |= {"monitor": str(socket_dir / "other")} if after == "moved" else {}
        if after == "off":
            del config["monitor"]
        broker.config.write_text(yaml.safe_dump(config))
        with broker.login("ops") as ops:
            answer = ops.ask("upgrade").json
        assert answer["upgraded"], answer
        broker.wait("daemon.upgraded")

        assert not path.exists()
        if after == "moved":
            assert get(parse(str(socket_dir / "other")), "/livez").status == 200


def test_monitor_failed_upgrade_leaves_it_listening(socket_dir: Path) -> None:
    """The new process can't listen at another address: the old monitor still answers,
    and its socket file stays.
    """
    path = socket_dir / "monitor"
    with BrokerProcess(socket_dir, CLIENTS, monitor=str(path), log={"level": "info"}) as broker:
        at = listening_at(broker)
        with socket.create_server(("127.0.0.1", 0)) as taken, broker.login("ops") as ops:
            config = yaml.safe_load(broker.config.read_text())
            config["listen"].append(f"127.0.0.1:{taken.getsockname()[1]}")
            broker.config.write_text(yaml.safe_dump(config))
            answer = ops.ask("upgrade").json

            assert not answer["upgraded"]
        assert path.exists()
        assert get(at, "/livez").status == 200
