"""What users see of a cluster: brokers over a real NATS server, and clients of the library."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.cluster_brokers import Brokers, brokers, links
from support.keys import key_of
from support.nats_server import NatsServer, nats_server, needs_nats
from support.raw_client import login
from support.waiting import until

import brokerd_client
from brokerd.ctl import brokerctl
from brokerd_client import Denied, Disconnected, Elsewhere, NameTaken, Offline, Replaced, aio
from brokerd_client.wire.envelope import Kind

pytestmark = needs_nats

ADMIN = {"alice": {"admin": True}, "bob": {}, "carol": {}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server for tests that leave it running."""
    with nats_server(tmp_path_factory.mktemp("nats")) as running:
        yield running


@pytest.fixture
def pair(server: NatsServer) -> Iterator[Brokers]:
    """Two hosts with an administrator and two other clients."""
    with brokers(server, ADMIN, prefix="pair") as running:
        yield running


def test_clients_of_two_hosts_exchange_messages_and_requests(pair: Brokers) -> None:
    alice, bob = pair.connect("alice", "a"), pair.connect("bob", "b")
    bob.on_request(lambda request: f"{request.sender}: {request.payload}")
    pair.sees(alice, "bob")
    assert alice.request("bob", "hello", timeout=20).payload == "alice: hello"
    bob.send("alice", "and back")
    assert alice.recv(timeout=20).payload == "and back"
    alice.send_confirmed("bob", "confirmed", timeout=20)
    with pytest.raises(Offline):
        alice.send_confirmed("carol", "offline", timeout=20)


def test_topics_reach_subscribers_of_other_hosts(pair: Brokers) -> None:
    alice, bob = pair.connect("alice", "a"), pair.connect("bob", "b")
    with bob.subscribe("news.>") as news:
        until(lambda: bool(alice.publish("news.x", "first")) and _has_one(news))
        alice.publish("news.y", "last")
        assert next(e.payload for e in news if e.topic == "news.y") == "last"


def _has_one(news: Any) -> bool:
    try:
        return news.recv(timeout=0.05) is not None
    except brokerd_client.TimedOut:
        return False


def test_presence_is_that_of_all_hosts(pair: Brokers) -> None:
    alice, bob = pair.connect("alice", "a"), pair.connect("bob", "b")
    pair.sees(alice, "bob")
    bob.close()
    pair.sees(alice, "bob", online=False)


def test_name_that_is_connected_at_another_host_is_taken(pair: Brokers) -> None:
    bob = pair.connect("bob", "b")
    alice = pair.connect("alice", "a")
    pair.sees(alice, "bob")
    with pytest.raises(Disconnected) as refused:
        pair.connect("bob", "a", reconnect=False)
    assert isinstance(refused.value.__cause__, NameTaken)
    assert "at another host of the cluster" in str(refused.value)
    assert bob.ping() < 20
    bob.close()
    # The host of the older connection finds that its client has gone.
    assert pair.connect("bob", "a").whoami()["host"] == "a"


def test_newer_connection_replaces_one_at_another_host(server: NatsServer) -> None:
    entry = {"when_connected": "replace"}
    with brokers(server, {"alice": {}, "bob": entry}, prefix="newer") as hosts:
        lost: list[BaseException | None] = []
        gone = threading.Event()
        alice, bob = hosts.connect("alice", "a"), hosts.connect("bob", "b", reconnect=False)

        @bob.on_connection
        def on_connection(event: brokerd_client.ConnectionEvent) -> None:
            if event.state == "lost":
                lost.append(event.reason)
                gone.set()

        hosts.sees(alice, "bob")
        newer = hosts.connect("bob", "a")
        assert gone.wait(20)
        assert isinstance(lost[0].__cause__, Replaced)  # type: ignore[union-attr]
        alice.send("bob", "to the newer")
        assert newer.recv(timeout=20).payload == "to the newer"


def test_channel_is_opened_at_the_host_of_the_other_client(pair: Brokers) -> None:
    alice, bob = pair.connect("alice", "a"), pair.connect("bob", "b")
    pair.sees(alice, "bob")
    with bob.listen() as listener:
        accepted: list[Any] = []
        other = threading.Thread(target=lambda: accepted.append(listener.accept(20)), daemon=True)
        other.start()
        with alice.open("bob", timeout=20) as caller:
            other.join(20)
            caller.send_bytes(b"hello")
            assert accepted[0].recv_bytes() == b"hello"
            assert accepted[0].peer == "alice"
            accepted[0].close()


@pytest.mark.parametrize("stock", [False, True])
def test_channel_to_another_host_leaves_the_caller_connected(
    server: NatsServer, stock: bool
) -> None:
    """A channel takes no place, so nothing is replaced at the caller's own host."""
    clients = {"alice": {"when_connected": "replace"}, "bob": {}}
    with brokers(server, clients, prefix=f"stay{int(stock)}") as hosts:
        alice, bob = hosts.connect("alice", "a"), hosts.connect("bob", "b")
        hosts.sees(alice, "bob")
        hosts.sees(bob, "alice")
        if stock:
            # Nothing but the first frame tells that this is a channel.
            with login(hosts.hosts["b"].address, key_of("alice")) as other:
                other.send(Kind.OPEN, "bob", message_id=5)
                answer = other.recv()
                assert (answer.kind, answer.code) == (Kind.ERROR, "offline")
        else:
            with pytest.raises(Offline, match="does not listen"):
                alice.open("bob", timeout=20)
        assert alice.ping() < 20
        assert alice.counters["losses"] == 0


def test_stream_is_opened_at_the_host_of_the_other_client(pair: Brokers) -> None:
    async def main() -> None:
        async with (
            aio.connect(str(pair.hosts["a"].address), "alice", key_of("alice")) as alice,
            aio.connect(str(pair.hosts["b"].address), "bob", key_of("bob")) as bob,
            bob.listen() as listener,
        ):
            while "bob" not in {  # noqa: ASYNC110 - the broker does not announce it
                each.name for each in await alice.clients() if each.online
            }:
                await asyncio.sleep(0.01)
            caller, callee = await asyncio.gather(
                alice.open_stream("bob", timeout=20), listener.accept(20)
            )
            caller.writer.write(b"hello")
            assert await callee.reader.readexactly(5) == b"hello"
            caller.writer.close()
            callee.writer.close()

    asyncio.run(main())


def test_channel_is_elsewhere_for_clients_that_may_send_only(server: NatsServer) -> None:
    clients = {"alice": {}, "bob": {}, "carol": {"send_to": ["alice"]}}
    with brokers(server, clients, prefix="may", advertise=[]) as hosts:
        alice, carol = hosts.connect("alice", "a"), hosts.connect("carol", "a")
        hosts.connect("bob", "b")
        hosts.sees(alice, "bob")
        with pytest.raises(Elsewhere) as elsewhere:
            alice.open("bob", timeout=20)
        assert (elsewhere.value.host, elsewhere.value.addresses) == ("b", ())
        with pytest.raises(Denied):
            carol.open("bob", timeout=20)


def test_client_connects_to_the_host_of_its_mailbox(server: NatsServer, tmp_path: Path) -> None:
    clients = {"alice": {}, "bob": {"mailbox": True, "home": "b"}}
    with brokers(server, clients, prefix="home", folder=tmp_path) as hosts:
        alice = hosts.connect("alice", "a")
        alice.post("bob", "kept", timeout=20)
        bob = hosts.connect("bob", "a")
        message = bob.recv(timeout=20)
        assert (message.payload, bob.whoami()["host"]) == ("kept", "b")
        message.done()
        alice.post("bob", "again", timeout=20)
        assert bob.recv(timeout=20).payload == "again"


def test_event_receipt_waits_for_the_disk_of_another_host(
    server: NatsServer, tmp_path: Path
) -> None:
    box = {"subscribe": ["t.>"]}
    clients = {
        "alice": {},
        "bob": {"mailbox": box, "home": "b"},
        "carol": {"mailbox": box, "home": "a"},
        "dave": {},
    }
    limits = {"remote_timeout": 1}
    with brokers(server, clients, prefix="disk", folder=tmp_path, limits=limits) as hosts:
        alice, dave = hosts.connect("alice", "a"), hosts.connect("dave", "b")
        hosts.sees(alice, "dave")
        there = hosts.hosts["b"]
        there.call(there.daemon.broker.mailboxes.pause)
        publishing = threading.Thread(
            target=lambda: done.append(alice.publish_confirmed("t.x", "event", timeout=20)),
            daemon=True,
        )
        done: list[Any] = []
        publishing.start()
        until(lambda: there.call(lambda: bool(there.daemon.broker.held.deadlines)))
        # What was sent later has its outcome, and the event has none.
        hosts.connect("carol", "a").send_confirmed("dave", "later", timeout=20)
        assert dave.recv(timeout=20).payload == "later"
        assert not done
        there.call(lambda: (there.daemon.broker.mailboxes.resume(), there.daemon.server.settle()))
        publishing.join(20)
        assert done
        assert hosts.connect("bob", "b").recv(timeout=20).payload == "event"
        there.call(there.daemon.kill)
        with pytest.raises(Offline) as refused:
            until(lambda: _is_published(alice))
        assert refused.value.names == ("bob",)


def _is_published(client: brokerd_client.Client) -> bool:
    """Publish, and return False while the other host is not known to be lost."""
    try:
        client.publish_confirmed("t.x", "event", timeout=20)
    except brokerd_client.StoreInDoubt:
        return False
    return True


def test_sender_is_told_how_long_the_store_of_another_host_remembers_keys(
    server: NatsServer, tmp_path: Path
) -> None:
    clients = {"alice": {}, "bob": {"mailbox": True, "home": "b"}}
    store = {"path": str(tmp_path / "b"), "dedup": "10m"}
    with brokers(server, clients, prefix="dedup", stores={"b": store}) as hosts:
        told = hosts.connect("alice", "a").whoami()
        assert told["limits"]["dedup"] == 600.0


def test_listen_at_another_host_names_the_host_of_the_mailbox(
    server: NatsServer, tmp_path: Path
) -> None:
    clients = {"alice": {}, "bob": {"mailbox": True, "home": "b"}}
    with brokers(server, clients, prefix="listen", folder=tmp_path) as hosts:
        key = tmp_path / "key"
        key.write_bytes(key_of("bob"))
        key.chmod(0o600)
        options = ["--address", str(hosts.hosts["a"].address), "--name", "bob"]
        command = ["listen", "--count", "1", *options, "--key-file", str(key)]
        refused = CliRunner().invoke(brokerctl, command)
        assert refused.exit_code == 1
        assert "the mailbox of bob is at host b, and this is host a: connect" in refused.output
        hosts.connect("alice", "a").post("bob", "kept", timeout=20)
        followed = CliRunner().invoke(brokerctl, [*command, "--reconnect", "--timeout", "20"])
        assert (followed.exit_code, followed.stdout) == (0, "alice\tkept\n")


def test_client_fails_over_to_another_host(server: NatsServer) -> None:
    with brokers(server, prefix="over", limits={"remote_timeout": 1}) as hosts:
        addresses = [str(host.address) for host in hosts.hosts.values()]
        alice = brokerd_client.connect(addresses, "alice", key_of("alice"))
        try:
            assert alice.whoami()["host"] == "a"
            hosts.hosts["a"].call(hosts.hosts["a"].daemon.kill)
            until(lambda: _host_of(alice) == "b")
        finally:
            alice.close()


def _host_of(client: brokerd_client.Client) -> str:
    try:
        return str(client.whoami()["host"])
    except brokerd_client.BrokerdError:
        return ""


def test_hosts_shows_the_other_hosts(pair: Brokers, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(key_of("alice"))
    key.chmod(0o600)
    options = ["--address", str(pair.hosts["a"].address), "--name", "alice"]
    where = [*options, "--key-file", str(key)]
    shown = CliRunner().invoke(brokerctl, ["hosts", "--json", *where])
    assert shown.exit_code == 0, shown.output
    answer = json.loads(shown.stdout)
    assert (answer["host"], answer["nats"]["connected"]) == ("a", True)
    (other,) = answer["hosts"]
    assert (other["name"], other["state"], other["digest"]) == ("b", "up", answer["digest"])
    assert other["addresses"] == [str(pair.hosts["b"].address)]
    table = CliRunner().invoke(brokerctl, ["hosts", *where])
    assert table.stdout.split("\t")[:2] == ["b", "up"]
    assert "differ" not in table.stdout


def test_host_without_nats_serves_its_own_clients(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server, brokers(server, ADMIN, prefix="alone") as hosts:
        alice, bob = hosts.connect("alice", "a"), hosts.connect("bob", "b")
        carol = hosts.connect("carol", "a")
        hosts.sees(alice, "bob")
        server.kill()
        host = hosts.hosts["a"]
        until(lambda: bool(host.call(lambda: host.daemon.cluster_host.failure)))
        carol.send("alice", "local")
        assert alice.recv(timeout=20).payload == "local"
        with pytest.raises(Offline):
            alice.send_confirmed("bob", "far", timeout=20)
        assert host.call(lambda: host.daemon.not_ready) == ""
        server.start()
        until(lambda: links(host) == {"b": "up"})
        until(lambda: _is_accepted(alice, "bob", "far again"))
        assert bob.recv(timeout=20).payload == "far again"


def _is_accepted(client: brokerd_client.Client, to: str, payload: str) -> bool:
    try:
        client.send_confirmed(to, payload, timeout=20)
    except Offline:
        return False
    return True
