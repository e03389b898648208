"""Managers of multiprocessing by name."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.managed_stock import Shop, Stock, add_two_apples

from brokerd.testing import RunningBroker
from brokerd_client import AuthenticationError, managers

TIMEOUT_S = 30
KEY = b"one key for all"


@pytest.fixture
def environ(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The broker, with this process as its client alice."""
    for variable, value in broker.environ("alice").items():
        monkeypatch.setenv(variable, value)
    return broker


@pytest.mark.skipif(os.name == "nt", reason="fork and spawn alike")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_manager_starts_a_server_and_gives_its_proxies_to_a_child(
    environ: RunningBroker, method: str
) -> None:
    """The server is a child process that listens by name. A proxy works in a child too,
    however it is started.
    """
    context = multiprocessing.get_context(method)
    with Shop("broker://alice", KEY, ctx=context) as manager:
        assert manager.address == "broker://alice"
        stock = manager.stock()  # type: ignore[attr-defined]
        stock.add("apple", 1)
        child = context.Process(target=add_two_apples, args=(stock,))
        child.start()
        child.join(TIMEOUT_S)
        assert (child.exitcode, stock.count("apple")) == (0, 3)
        with pytest.raises(KeyError):
            stock.count("pear")


# A manager's server ends its threads by SystemExit.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_manager_connects_to_a_server_of_another_client(
    environ: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server in this process; its client is another client of the broker."""
    stock = Stock()

    class Server(managers.BaseManager):
        pass

    Server.register("stock", callable=lambda: stock)
    server = Server("broker://alice", KEY).get_server()
    accepter = threading.Thread(target=server.accepter, daemon=True)  # type: ignore[attr-defined]
    server.stop_event = threading.Event()  # type: ignore[attr-defined]
    accepter.start()
    for variable, value in environ.environ("bob").items():
        monkeypatch.setenv(variable, value)
    manager = Shop("broker://alice", KEY)
    manager.connect()
    proxy = manager.stock()  # type: ignore[attr-defined]
    proxy.add("apple", 5)
    assert stock.counts == {"apple": 5}
    wrong = Shop("broker://alice", b"wrong")
    with pytest.raises(AuthenticationError):
        wrong.connect()
    del proxy
    server.listener.close()  # type: ignore[attr-defined]
    # It does not call accept() forever.
    accepter.join(TIMEOUT_S)
    assert not accepter.is_alive()


def test_manager_of_sync_types_shares_a_dict(environ: RunningBroker) -> None:
    # The fork server, Python 3.14's default, may have begun before the variables were set.
    context = multiprocessing.get_context("spawn")
    with managers.SyncManager("broker://alice", ctx=context) as manager:
        shared = manager.dict(a=1)
        shared["b"] = manager.list([2])
        assert (shared["a"], list(shared["b"])) == (1, [2])


def test_manager_at_an_ordinary_address_works_as_before() -> None:
    with managers.SyncManager(authkey=KEY) as manager:
        assert manager.list([1])._getvalue() == [1]


PROGRAM = """
import multiprocessing, sys
import brokerd_client.connection as ours
sys.modules["multiprocessing.connection"] = multiprocessing.connection = ours
from multiprocessing.managers import BaseManager

# A server of Python 3.14 would begin by importing this class, which is in no file.
multiprocessing.set_start_method("fork")

class Shop(BaseManager):
    pass

Shop.register("text", str)
with Shop(address="broker://alice", authkey=b"key") as manager:
    print(manager.text("by name").upper())
"""


def test_manager_of_standard_library_works_where_our_module_stands_in(
    environ: RunningBroker, tmp_path: Path
) -> None:
    """The standard library's manager serves and connects by name."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "BY NAME\n"), done.stderr
