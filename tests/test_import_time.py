"""What is imported when: starting is mostly importing, so nothing is loaded before it
is needed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import brokerd_client


def loaded_by(code: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter has loaded after this."""
    command = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_importing_the_library_loads_next_to_nothing() -> None:
    """Neither face, nor asyncio, nor anything of the conversation is there before it is
    asked for.
    """
    loaded = loaded_by("import brokerd_client")
    assert not loaded & {
        "asyncio",
        "ssl",
        "dataclasses",
        "json",
        "brokerd_client.blocking.client",
        "brokerd_client.protocol.dialog",
    }


def test_the_blocking_client_does_not_load_asyncio() -> None:
    """Whoever asks for connect gets what that needs and no more."""
    loaded = loaded_by("from brokerd_client import connect")
    assert "brokerd_client.blocking.client" in loaded
    assert not loaded & {"asyncio", "ssl", "brokerd_client.aio.client"}


@pytest.mark.parametrize("name", brokerd_client.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """It is found when it is asked for, the same each time, and dir() tells of it."""
    assert name in dir(brokerd_client)
    assert getattr(brokerd_client, name) is getattr(brokerd_client, name)


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    """And so `hasattr` works."""
    with pytest.raises(AttributeError, match="has no attribute 'conect'"):
        _ = brokerd_client.conect


def test_the_daemon_loads_no_client_and_nothing_for_show() -> None:
    """What it starts with has neither the client's faces nor rich; who asks for rich
    later gets it.
    """
    loaded = loaded_by(
        "from brokerd.cli import main as cli; cli._import_structlog_without_rich(); import"
        " brokerd.daemon.process"
    )
    assert "structlog" in loaded
    assert not loaded & {
        "rich",
        "brokerd_client.blocking.client",
        "brokerd_client.protocol.dialog",
        "brokerd_client.aio.client",
    }
    assert "rich.console" in loaded_by(
        "from brokerd.cli import main as cli; cli._import_structlog_without_rich(); import"
        " rich.console"
    )


def test_rich_that_is_there_already_stays() -> None:
    """A program that has loaded it keeps it."""
    assert "rich" in loaded_by(
        "import rich\nfrom brokerd.cli import main as cli; cli._import_structlog_without_rich()"
    )
