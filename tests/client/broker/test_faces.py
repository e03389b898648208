"""The two faces side by side: the same names, signatures and docstrings."""

from __future__ import annotations

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
#: What is documented in other words, because it names threads, tasks or opening.
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
def test_send_with_receipt_keyword_is_refused(client: Any, method: str) -> None:
    """The receipt has methods of its own; the keyword is unknown."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'receipt'"):
        getattr(client, method)(None, "bob", "hello", receipt=True)


def public_names(module: ModuleType, name: str) -> set[str]:
    """Return the public names of a class, without the mark of asynchronous methods."""
    names = {name for name in dir(getattr(module, name)) if not name.startswith("_")}
    special = {
        name
        for name in dir(getattr(module, name))
        if name in ("__enter__", "__exit__", "__aenter__", "__aexit__", "__iter__", "__aiter__")
    }
    return names | {re.sub(r"^__a", "__", name) for name in special}


def documented() -> Iterator[tuple[str, Any, Any]]:
    """Yield each public class, method and function of both faces, with its name."""
    for name in aio.__all__:
        if name == "Opening":
            continue
        yield name, getattr(blocking, name), getattr(aio, name)
        if inspect.isclass(getattr(aio, name)):
            for method in sorted(public_names(aio, name)):
                here, there = (getattr(getattr(face, name), method, None) for face in FACES)
                if callable(there) or isinstance(there, property):
                    yield f"{name}.{method}", here, there


def test_generated_files_of_blocking_face_are_up_to_date() -> None:
    """`make faces` would change nothing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "blocking_face.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_of_both_faces_have_the_same_names() -> None:
    """A newcomer compares them file by file; only asyncio opens objects on first use."""
    here, there = ({path.name for path in Path(face.__path__[0]).glob("*.py")} for face in FACES)

    assert there - here == {"opening.py"}
    assert here - there == set()


@pytest.mark.parametrize("name", ["Client", "Message", "PresenceWatch", "Subscription"])
def test_public_names_of_both_faces_are_equal(name: str) -> None:
    """Each method stands in both faces, under one name and in one order."""
    assert public_names(blocking, name) == public_names(aio, name)
    here, there = ([*vars(getattr(face, name))] for face in FACES)
    here = [method for method in here if not method.startswith("_")]
    there = [method for method in there if not method.startswith("_")]
    assert here == there


def test_signatures_of_both_faces_are_equal() -> None:
    """A method takes the same arguments in both; connect() also takes threads here."""
    for name, here, there in documented():
        if inspect.isclass(there) or not callable(there):
            continue
        here_signature, there_signature = inspect.signature(here), inspect.signature(there)
        arguments = dict(here_signature.parameters)
        if name == "connect":
            del arguments["threads"]
        assert arguments == dict(there_signature.parameters), name
        returned = re.sub(r"Opening\[(\w+)\]", r"\1", str(there_signature.return_annotation))
        assert here_signature.return_annotation == returned, name
        assert not inspect.iscoroutinefunction(here), name


def test_docstrings_of_both_faces_are_equal() -> None:
    """What differs is said in those that name threads, tasks or the opening of objects."""
    different = {name for name, here, there in documented() if here.__doc__ != there.__doc__}

    assert all(here.__doc__ and there.__doc__ for _, here, there in documented())
    assert different == DIFFERENT
