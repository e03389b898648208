"""The broker for users' tests, used as its documentation says."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from time import monotonic

import pytest
from support.tls.authority import Authority

from brokerd.config.problems import ConfigError
from brokerd.testing import RunningBroker, broker, running
from brokerd_client.errors import Denied, NoSuchClient, TooLarge

assert broker, "the fixture is used by name"


def test_testing_broker_connect_creates_client_on_demand(broker: RunningBroker) -> None:
    """Two clients without a configuration exchange a message through a real broker."""
    alice, bob = broker.connect("alice"), broker.connect("bob")
    alice.send("bob", "hello")
    assert bob.recv(timeout=30).payload == "hello"


def test_testing_broker_client_entry_takes_configuration_keys() -> None:
    """A client's entry takes the keys of the configuration file, before or while the
    broker runs.
    """
    with running({"alice": {"send_to": ["carol"]}, "bob": {}, "carol": {}}) as broker:
        alice = broker.connect("alice")
        with pytest.raises(Denied):
            alice.send_confirmed("bob", "hello")
        broker.add("alice", send_to=["bob"])
        broker.connect("bob")
        alice.send_confirmed("bob", "hello")


def test_testing_broker_connect_async_gives_aio_client(broker: RunningBroker) -> None:
    """An asyncio client and a blocking one use the same broker."""

    async def ask() -> object:
        client = await broker.connect_async("alice")
        async with client:
            return (await client.request("bob", "status?", timeout=30)).payload

    bob = broker.connect("bob")
    bob.on_request(lambda message: "fine")
    assert asyncio.run(ask()) == "fine"


def test_testing_broker_restarted_keeps_address(broker: RunningBroker) -> None:
    """After a kill and a start the clients reconnect by themselves."""
    alice = broker.connect("alice")
    address = broker.address
    broker.kill()
    broker.start()
    assert broker.address == address
    # A command sent before the client detects the kill may fail with the old connection.
    deadline = monotonic() + 30
    while not alice.counters["losses"]:
        assert monotonic() < deadline
        threading.Event().wait(0.005)
    assert alice.control("whoami", timeout=10)["name"] == "alice"


def test_testing_broker_stats_hold_broker_counters(broker: RunningBroker) -> None:
    """A test can assert on counters without an administrator's client."""
    alice = broker.connect("alice")
    with pytest.raises(NoSuchClient):
        alice.send_confirmed("nobody", "hello")
    assert broker.stats()["refused"] == {"no_such_client": 1}


OWN = """\
listen:
  - address: /run/brokerd/brokerd.sock
    mode: "0660"
    group: no-such-group
  - 0.0.0.0:6000
monitor: {address: 0.0.0.0:6060, page: false}
clients:
  alice: {key_file: keys/alice, send_to: [bob]}
  bob: {key_env: NO_SUCH_VARIABLE, connections: 2}
  carol: {key: "carol's own key"}
  root: {peer_uid: [4242], admin: true}
limits: {max_message: 4KiB}
"""


def test_testing_broker_own_configuration_keeps_rules_and_limits() -> None:
    """Rules, pools, rights and limits are those of the text; keys are made."""
    with running(config=OWN) as broker:
        alice, bob, other = (broker.connect(name) for name in ("alice", "bob", "bob"))
        assert bob.address != other.address
        with pytest.raises(Denied):
            alice.send_confirmed("carol", "hello")
        with pytest.raises(TooLarge):
            alice.send_confirmed("bob", bytes(5000))
        assert broker.connect("root").control("stats")["clients"] == 4
        assert broker.key("carol") == b"carol's own key"


def test_testing_broker_own_configuration_gets_free_addresses() -> None:
    """Each listener is at a free address of this machine, in the order of the file."""
    with running(config=OWN) as broker:
        assert broker.addresses[0] == broker.address
        assert broker.address.endswith(".sock")
        assert "/run/brokerd" not in broker.address
        assert broker.addresses[1].startswith("127.0.0.1:")
        assert broker.monitor_address.startswith("127.0.0.1:")
        alice = broker.connect("alice", address=broker.addresses[1])
        assert alice.control("whoami")["name"] == "alice"
        url = f"http://{broker.monitor_address}/livez"
        with urllib.request.urlopen(url, timeout=10) as page:
            assert page.status == 200

        before = list(broker.addresses), broker.monitor_address
        broker.kill()
        broker.start()
        assert (broker.addresses, broker.monitor_address) == before


def test_testing_broker_own_file_is_read_with_its_includes(tmp_path: Path) -> None:
    """Paths and includes start from the file, and the key in a key file is kept."""
    (tmp_path / "clients.d").mkdir()
    (tmp_path / "clients.d" / "bob.yaml").write_text("clients: {bob: {key_file: bob.key}}\n")
    (tmp_path / "clients.d" / "bob.key").write_text("bob's own key\n")
    (tmp_path / "clients.d" / "bob.key").chmod(0o644)
    file = tmp_path / "brokerd.yaml"
    file.write_text(
        "include: [clients.d/*.yaml]\n"
        "listen: [./brokerd.sock]\n"
        "clients: {alice: {key_file: missing}}\n"
    )
    with running(config=file) as broker:
        assert broker.key("bob") == b"bob's own key"
        bob = broker.connect("bob")
        broker.connect("alice").send("bob", "hello")
        assert bob.recv(timeout=30).payload == "hello"
    assert not (tmp_path / "brokerd.sock").exists()


def test_testing_broker_own_values_need_no_listener() -> None:
    """A mapping works as a file does; it is not changed, and addresses may be missing."""
    values = {"clients": {"alice": {"connections": 2}}}
    with running(config=values) as broker:
        broker.connect("alice")
        broker.connect("alice")
    assert values == {"clients": {"alice": {"connections": 2}}}


def test_testing_broker_own_configuration_takes_changed_clients_and_limits() -> None:
    """A test can replace the entry of one client, and single limits."""
    limits = {"max_message": "1MiB"}
    with running({"alice": {}}, config=OWN, limits=limits) as broker:
        alice, carol = broker.connect("alice"), broker.connect("carol")
        alice.send_confirmed("carol", bytes(5000))
        broker.add("carol", key=broker.key("carol"), send_to=[])
        with pytest.raises(Denied):
            carol.send_confirmed("alice", "hello")


def test_testing_broker_own_configuration_unknown_client_is_an_error() -> None:
    """A misspelt name does not become a client of its own."""
    with running(config=OWN) as broker:
        with pytest.raises(ValueError, match=r"no client 'alcie'.*alice, bob, carol, root"):
            broker.connect("alcie")
        broker.add("alcie")
        broker.connect("alcie")


def test_testing_broker_own_configuration_mistake_is_told_with_its_place(tmp_path: Path) -> None:
    """The error is that of ``brokerd check``, with the line of the file."""
    file = tmp_path / "brokerd.yaml"
    file.write_text("listen: [x.sock]\nclients:\n  alice: {send_to: [bbo]}\n  bob: {}\n")
    with pytest.raises(ConfigError, match=r"brokerd\.yaml:3:\d+.*'bbo' .did you mean 'bob'"):
        RunningBroker(config=file)


def test_testing_broker_own_tls_files_are_replaced(authority: Authority) -> None:
    """The certificate of the production broker is not needed."""
    issued = authority.issue("own-configuration")
    own = "listen: [{address: '0.0.0.0:6000', tls: {certificate: no.pem, key: no.key}}]\n"
    own += "clients: {alice: {}}\n"
    tls = {"certificate": str(issued.certificate), "key": str(issued.key)}
    with running(config=own, tls=tls) as broker:
        assert broker.address.startswith("tls://127.0.0.1:")
        broker.connect("alice", ssl=authority.context())


def test_testing_broker_sample_configuration_runs() -> None:
    """The sample file of the project, with its includes and comments."""
    sample = Path(__file__).parents[1] / "config" / "brokerd.yaml"
    with running(config=sample) as broker:
        bob = broker.connect("bob")
        broker.connect("alice").send("bob", "hello")
        assert bob.recv(timeout=30).payload == "hello"


def test_testing_broker_environ_connects_a_program(broker: RunningBroker) -> None:
    """A program that is given nothing but the environment is the named client."""
    program = "import brokerd_client as b; print(b.connect().name)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **broker.environ("alice")},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "alice\n"
    assert Path(broker.environ("alice")["BROKERD_KEY_FILE"]).stat().st_mode & 0o077 == 0
