"""The direct API at addresses of a broker: listeners and clients that know names."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.managed_stock import echo_to_peer

from brokerd.testing import RunningBroker
from brokerd_client import (
    AddressError,
    AuthenticationError,
    Closed,
    InvalidName,
    KeyRejected,
    Offline,
    TimedOut,
    UndecodablePayload,
    WrongProcess,
)
from brokerd_client.connection import (
    Client,
    Connection,
    Listener,
    XmlClient,
    XmlListener,
    address_type,
    answer_challenge,
    deliver_challenge,
    wait,
)

TIMEOUT_S = 30
KEY = b"known to both ends"

As = Callable[[str], None]


@pytest.fixture
def as_client(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> As:
    """Make this process a client of the broker, by its environment."""

    def become(name: str) -> None:
        for variable, value in broker.environ(name).items():
            monkeypatch.setenv(variable, value)

    return become


def opened(listener: Listener, *args: Any, **options: Any) -> tuple[Connection, Connection]:
    """Return (a new Client's connection, the accepted one)."""
    with ThreadPoolExecutor(1) as other:
        dialed = other.submit(Client, *args, timeout=TIMEOUT_S, **options)
        try:
            accepted = listener.accept(TIMEOUT_S)
        finally:
            client = dialed.result(TIMEOUT_S)
        return client, accepted


def test_name_family_is_inferred() -> None:
    assert address_type("broker://bob") == "AF_BROKER"


def test_name_listener_accepts_and_knows_the_caller(as_client: As) -> None:
    """Both ends prove the key to each other, and unpickle afterwards."""
    as_client("bob")
    with Listener("broker://bob", authkey=KEY) as listener:
        as_client("alice")
        client, accepted = opened(listener, "broker://bob", authkey=KEY)
        with client, accepted:
            assert listener.address == "broker://bob"
            assert listener.last_accepted == accepted.peer == "alice"
            assert client.peer == "bob"
            client.send([1, 2])
            assert accepted.recv() == [1, 2]
            accepted.send({"a": None})
            assert wait([client], TIMEOUT_S) == [client]
            assert client.recv() == {"a": None}


def test_name_without_authkey_carries_bytes_but_no_pickles(as_client: As) -> None:
    as_client("bob")
    with Listener("broker://bob") as listener:
        as_client("alice")
        client, accepted = opened(listener, "broker://bob")
        with client, accepted:
            client.send(1)
            with pytest.raises(UndecodablePayload):
                accepted.recv()
            assert accepted.recv_bytes()


def test_name_in_allow_pickle_from_is_trusted(as_client: As) -> None:
    as_client("bob")
    with Listener("broker://bob", allow_pickle_from=["alice"]) as listener:
        as_client("alice")
        client, accepted = opened(listener, "broker://bob", allow_pickle_from=["bob"])
        with client, accepted:
            client.send(1)
            accepted.send(2)
            assert (accepted.recv(), client.recv()) == (1, 2)


def test_name_challenge_by_hand_makes_a_channel_unpickle(as_client: As) -> None:
    """The functions of the direct API count as a proof, as in a manager's server."""
    as_client("bob")
    with Listener("broker://bob") as listener, ThreadPoolExecutor(1) as other:
        as_client("alice")
        dialed = other.submit(Client, "broker://bob", authkey=KEY)
        with listener.accept(TIMEOUT_S) as accepted:
            deliver_challenge(accepted, KEY)
            answer_challenge(accepted, KEY)
            with dialed.result(TIMEOUT_S) as client:
                client.send(1)
                assert accepted.recv() == 1


def test_name_listener_survives_a_wrong_authkey(as_client: As) -> None:
    as_client("bob")
    with Listener("broker://bob", authkey=KEY, on_error="skip") as listener:
        as_client("alice")
        with ThreadPoolExecutor(2) as other:
            wrong = other.submit(Client, "broker://bob", authkey=b"wrong", timeout=TIMEOUT_S)
            right = other.submit(Client, "broker://bob", authkey=KEY, timeout=TIMEOUT_S)
            listener.accept(TIMEOUT_S).close()
            right.result(TIMEOUT_S).close()
            closing = other.submit(listener.accept)
            with pytest.raises(AuthenticationError, match="rejected our answer"):
                wrong.result(TIMEOUT_S)
            listener.close()
            with pytest.raises(Closed):
                closing.result(TIMEOUT_S)


def test_name_without_listener_is_offline(as_client: As) -> None:
    as_client("alice")
    with pytest.raises(Offline):
        Client("broker://bob", authkey=KEY)


def test_name_with_broker_in_the_address_needs_no_variable(
    broker: RunningBroker, as_client: As, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_client("bob")
    monkeypatch.delenv("BROKERD_ADDRESS")
    with Listener(f"broker://bob@{broker.address}", authkey=KEY) as listener:
        as_client("alice")
        monkeypatch.delenv("BROKERD_ADDRESS")
        assert listener.address == f"broker://bob@{broker.address}"
        for end in opened(listener, listener.address, authkey=KEY):
            end.close()


def test_name_client_tries_every_address_of_the_broker(
    broker: RunningBroker, as_client: As, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_client("bob")
    with Listener("broker://bob", authkey=KEY) as listener:
        as_client("alice")
        monkeypatch.setenv("BROKERD_ADDRESS", f"./nothing.sock, {broker.address}")
        for end in opened(listener, "broker://bob", authkey=KEY):
            end.close()


def test_name_of_own_program_is_the_default(as_client: As, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener of the family without an address has the program's own name."""
    as_client("bob")
    with Listener(family="AF_BROKER") as listener:
        assert listener.address == "broker://bob"
    monkeypatch.delenv("BROKERD_NAME")
    with pytest.raises(AddressError, match="BROKERD_NAME"):
        Listener(family="AF_BROKER")


@pytest.mark.parametrize("address", ["broker://", "broker://a b", "broker://.x"])
def test_name_that_is_not_valid_is_refused(address: str, as_client: As) -> None:
    as_client("bob")
    with pytest.raises(InvalidName):
        Listener(address)
    with pytest.raises(InvalidName):
        Client(address)


def test_name_family_with_another_address_is_refused() -> None:
    with pytest.raises(AddressError, match="broker://NAME"):
        Client(("localhost", 1), family="AF_BROKER")


def test_name_instance_can_not_be_chosen_by_a_listener(as_client: As) -> None:
    as_client("bob")
    with pytest.raises(OSError, match="gives the instance") as caught:
        Listener("broker://bob/1")
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_name_of_another_client_is_rejected(as_client: As) -> None:
    as_client("alice")
    with pytest.raises(KeyRejected):
        Listener("broker://bob")


def test_name_client_with_a_wrong_key_is_rejected(
    as_client: As, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_client("alice")
    monkeypatch.setenv("BROKERD_NAME", "bob")
    with pytest.raises(KeyRejected):
        Client("broker://bob")


def test_name_option_at_other_addresses_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="broker://"):
        Listener(allow_pickle_from=["alice"])
    with pytest.raises(ValueError, match="broker://"):
        Client(str(tmp_path / "x"), allow_pickle_from=["alice"])


def test_name_listener_accept_times_out(as_client: As) -> None:
    as_client("bob")
    with Listener("broker://bob") as listener:
        with pytest.raises(TimedOut):
            listener.accept(timeout=0)
        with pytest.raises(TimedOut):
            listener.accept(timeout=0.05)


def test_name_listener_closes_what_was_not_accepted(as_client: As) -> None:
    """A caller that no accept() has taken sees the end of the listener."""
    as_client("bob")
    listener = Listener("broker://bob")
    as_client("alice")
    with Client("broker://bob", timeout=TIMEOUT_S) as client:
        listener.close()
        with pytest.raises(EOFError):
            client.recv_bytes()


def test_name_listener_leaves_no_thread(as_client: As) -> None:
    """A listener that is dropped unclosed ends as well."""
    as_client("bob")
    before = set(threading.enumerate())
    listener = Listener("broker://bob")
    assert set(threading.enumerate()) - before
    del listener
    for thread in threading.enumerate():
        if thread.name in ("brokerd listener", "brokerd client"):
            thread.join(TIMEOUT_S)
    assert not set(threading.enumerate()) - before


def test_name_xml_carries_values(as_client: As) -> None:
    as_client("bob")
    with XmlListener("broker://bob") as listener, ThreadPoolExecutor(1) as other:
        as_client("alice")
        dialed = other.submit(XmlClient, "broker://bob")
        with listener.accept(TIMEOUT_S) as accepted, dialed.result(TIMEOUT_S) as client:
            client.send([1, "x", None])
            assert accepted.recv() == [1, "x", None]


@pytest.mark.skipif(os.name == "nt", reason="fork and spawn alike")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_name_channel_is_given_to_a_child(as_client: As, method: str) -> None:
    """A child gets the connection as an argument, and trusts it as its parent does."""
    as_client("bob")
    with Listener("broker://bob", authkey=KEY) as listener:
        as_client("alice")
        client, accepted = opened(listener, "broker://bob", authkey=KEY)
        with client, accepted:
            child = multiprocessing.get_context(method).Process(
                target=echo_to_peer, args=(accepted,)
            )
            child.start()
            client.send("question")
            assert client.recv() == ["alice", "question"]
            child.join(TIMEOUT_S)
            assert child.exitcode == 0


def test_name_channel_is_sent_over_a_channel(as_client: As) -> None:
    """A connection within a message arrives as a connection of its own, on one machine."""
    as_client("bob")
    with Listener("broker://bob", authkey=KEY) as listener:
        as_client("alice")
        first = opened(listener, "broker://bob", authkey=KEY)
        second = opened(listener, "broker://bob", authkey=KEY)
        first[0].send(second[0])
        with first[1].recv() as passed_on:
            assert passed_on.peer == "bob"
            passed_on.send_bytes(b"x")
            assert second[1].recv_bytes() == b"x"
        for end in (*first, *second):
            end.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_name_listener_can_not_accept_in_a_fork(as_client: As) -> None:
    """The connection to the broker belongs to the process that made the listener."""
    as_client("bob")
    with Listener("broker://bob") as listener:
        pid = os.fork()
        if not pid:
            try:
                listener.accept(timeout=TIMEOUT_S)
            except WrongProcess:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        as_client("alice")
        for end in opened(listener, "broker://bob"):
            end.close()
