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
    "Client.on_message",
    "Client.on_request",
    "Client.subscribe",
    "Client.watch_presence",
    "Message",
    "Subscription",
    "connect",
}

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
    names = {name for name in dir(getattr(module, name)) if not name.startswith("_")}
    special = {
        name
        for name in dir(getattr(module, name))
        if name in ("__enter__", "__exit__", "__aenter__", "__aexit__", "__iter__", "__aiter__")
    }
    return names | {re.sub(r"^__a", "__", name) for name in special}


def documented() -> Iterator[tuple[str, Any, Any]]:
    """Yield each public name with its objects in both clients."""
    for name in aio.__all__:
        if name == "Opening":
            continue
        yield name, getattr(blocking, name), getattr(aio, name)
        if inspect.isclass(getattr(aio, name)):
            for method in sorted(public_names(aio, name)):
                in_blocking, in_aio = (getattr(getattr(face, name), method, None) for face in FACES)
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
    """A new contributor can compare the clients file by file. Two
    files are for asyncio alone.
    """
    in_blocking, in_aio = (
        {path.name for path in Path(face.__path__[0]).glob("*.py")} for face in FACES
    )

    assert in_aio - in_blocking == {"compat.py", "opening.py"}
    assert in_blocking - in_aio == set()


@pytest.mark.parametrize("name", ["Client", "Message", "PresenceWatch", "Subscription"])
def test_clients_both_have_same_public_names(name: str) -> None:
    """Each method exists in both clients, with the same name and in the same order."""
    assert public_names(blocking, name) == public_names(aio, name)
    in_blocking, in_aio = ([*vars(getattr(face, name))] for face in FACES)
    in_blocking = [method for method in in_blocking if not method.startswith("_")]
    in_aio = [method for method in in_aio if not method.startswith("_")]
    assert in_blocking == in_aio


def test_clients_both_have_same_signatures() -> None:
    """A method takes the same arguments in both clients. Only the blocking connect()
    also takes ``threads``.
    """
    for name, in_blocking, in_aio in documented():
        if inspect.isclass(in_aio) or not callable(in_aio):
            continue
        blocking_signature, aio_signature = (
            inspect.signature(in_blocking),
            inspect.signature(in_aio),
        )
        arguments = dict(blocking_signature.parameters)
        if name == "connect":
            del arguments["threads"]
        assert arguments == dict(aio_signature.parameters), name
        returned = re.sub(r"Opening\[(\w+)\]", r"\1", str(aio_signature.return_annotation))
        assert blocking_signature.return_annotation == returned, name
        assert not inspect.iscoroutinefunction(in_blocking), name


def test_clients_both_have_same_docstrings() -> None:
    """Only docstrings that name threads, tasks or the opening of objects differ."""
    different = {
        name for name, in_blocking, in_aio in documented() if in_blocking.__doc__ != in_aio.__doc__
    }

    assert all(in_blocking.__doc__ and in_aio.__doc__ for _, in_blocking, in_aio in documented())
    assert different == DIFFERENT
