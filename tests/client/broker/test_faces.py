"""Both clients have the same names, signatures and docstrings."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import brokerd_client
from brokerd_client import aio, blocking

ROOT = Path(__file__).resolve().parents[3]
FACES = (blocking, aio)
#: Names whose docstrings differ, because they mention threads, tasks or opening.
DIFFERENT = {
    "Client",
    "Client.close",
    "Client.listen",
    "Client.on_message",
    "Client.on_request",
    "Client.open",
    "Client.subscribe",
    "Client.watch_presence",
    "Message",
    "Subscription",
    "connect",
}
#: Of asyncio alone, by the name that threads have for it. A channel is a connection of
#: the direct API for threads, and a pair of streams for asyncio.
ASYNCIO_NAMES = {"open": "open_stream", "Connection": "Stream"}

CLIENTS = [
    pytest.param(brokerd_client.Client, id="blocking"),
    pytest.param(aio.Client, id="aio"),
]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("method", ["send", "send_many", "publish"])
def test_client_send_with_receipt_keyword_is_refused(client: Any, method: str) -> None:
    """Sends with a receipt have methods of their own; the keyword is unknown."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'receipt'"):
        getattr(client, method)(None, "bob", "hello", receipt=True)


def public_names(module: ModuleType, name: str) -> set[str]:
    """Return the public names of a class; ``__aenter__`` counts as ``__enter__``."""
    names = {_shared_name(name) for name in dir(getattr(module, name)) if not name.startswith("_")}
    special = {
        name
        for name in dir(getattr(module, name))
        if name in ("__enter__", "__exit__", "__aenter__", "__aexit__", "__iter__", "__aiter__")
    }
    return names | {re.sub(r"^__a", "__", name) for name in special}


def _shared_name(name: str) -> str:
    """Return the name that threads have for a name of asyncio."""
    return next((shared for shared, own in ASYNCIO_NAMES.items() if own == name), name)


def _own_name(name: str) -> str:
    """Return the name that asyncio has for a name of threads."""
    return ASYNCIO_NAMES.get(name, name)


def documented() -> Iterator[tuple[str, Any, Any]]:
    """Yield each public name with its objects in both clients."""
    for name in aio.__all__:
        if name in ("Opening", "Stream"):
            continue
        yield name, getattr(blocking, name), getattr(aio, name)
        if inspect.isclass(getattr(aio, name)):
            for method in sorted(public_names(aio, name)):
                in_blocking, in_aio = (
                    getattr(getattr(face, name), own_name, None)
                    for face, own_name in ((blocking, method), (aio, _own_name(method)))
                )
                if callable(in_aio) or isinstance(in_aio, property):
                    yield f"{name}.{method}", in_blocking, in_aio


@pytest.mark.skipif(
    importlib.util.find_spec("ruff") is None, reason="ruff formats the generated files"
)
def test_blocking_client_generated_files_are_up_to_date() -> None:
    """`make faces` would change nothing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "blocking_face.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_clients_both_have_same_file_names() -> None:
    """A new contributor can compare the clients file by file. Six
    files are for asyncio alone, four for threads.
    """
    in_blocking, in_aio = (
        {path.name for path in Path(face.__path__[0]).glob("*.py")} for face in FACES
    )

    assert in_aio - in_blocking == {
        "channels.py",
        "compat.py",
        "opening.py",
        "streams.py",
        "tls_streams.py",
        "wakeups.py",
    }
    assert in_blocking - in_aio == {"gate.py", "input_poll.py", "leader.py", "poller.py"}


@pytest.mark.parametrize("name", ["Client", "Listener", "Message", "PresenceWatch", "Subscription"])
def test_clients_both_have_same_public_names(name: str) -> None:
    """Each method exists in both clients, with the same name and in the same order."""
    assert public_names(blocking, name) == public_names(aio, name)
    in_blocking, in_aio = ([*vars(getattr(face, name))] for face in FACES)
    in_blocking = [method for method in in_blocking if not method.startswith("_")]
    in_aio = [_shared_name(method) for method in in_aio if not method.startswith("_")]
    assert in_blocking == in_aio


def test_clients_both_have_same_signatures() -> None:
    """A method takes the same arguments in both clients."""
    for name, in_blocking, in_aio in documented():
        if inspect.isclass(in_aio) or not callable(in_aio):
            continue
        blocking_signature, aio_signature = (
            inspect.signature(in_blocking),
            inspect.signature(in_aio),
        )
        assert blocking_signature.parameters == aio_signature.parameters, name
        returned = re.sub(r"Opening\[(\w+)\]", r"\1", str(aio_signature.return_annotation))
        returned = _shared_name(returned)
        assert blocking_signature.return_annotation == returned, name
        assert not inspect.iscoroutinefunction(in_blocking), name


def test_clients_both_have_same_docstrings() -> None:
    """Only docstrings that name threads, tasks or the opening of objects differ."""
    different = {
        name for name, in_blocking, in_aio in documented() if in_blocking.__doc__ != in_aio.__doc__
    }

    assert all(in_blocking.__doc__ and in_aio.__doc__ for _, in_blocking, in_aio in documented())
    assert different == DIFFERENT
