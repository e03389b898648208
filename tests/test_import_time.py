"""Lazy imports: most of the start is imports, so no module is loaded before its use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import brokerd_client


def loaded_by(code: str) -> set[str]:
    """Return the names of the modules that the code loads in a fresh interpreter."""
    command = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_import_of_library_loads_no_client_and_no_asyncio() -> None:
    """The clients, asyncio and the protocol are loaded only when a program asks for
    them.
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


def test_import_of_blocking_client_loads_no_asyncio() -> None:
    """A program that imports connect loads only the modules that connect needs."""
    loaded = loaded_by("from brokerd_client import connect")
    assert "brokerd_client.blocking.client" in loaded
    assert not loaded & {"asyncio", "ssl", "brokerd_client.aio.client"}


@pytest.mark.parametrize("name", brokerd_client.__all__)
def test_import_public_name_is_found_and_listed_by_dir(name: str) -> None:
    """Each public name is loaded on demand, gives the same object each time, and is
    listed by dir().
    """
    assert name in dir(brokerd_client)
    assert getattr(brokerd_client, name) is getattr(brokerd_client, name)


def test_import_unknown_name_is_attribute_error() -> None:
    """`hasattr` works, because an unknown name gives an AttributeError."""
    with pytest.raises(AttributeError, match="has no attribute 'conect'"):
        _ = brokerd_client.conect


def test_import_of_daemon_loads_no_client_and_no_rich() -> None:
    """The daemon starts without the client's faces and without rich. A later import of
    rich works.
    """
    loaded = loaded_by(
        "from brokerd.cli.startup import import_libraries; import_libraries(); import"
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
        "from brokerd.cli.startup import import_libraries; import_libraries(); import rich.console"
    )


def test_import_of_daemon_loads_no_parser_of_arguments_and_no_metadata() -> None:
    """The daemon starts without click, and without what pydantic finds plugins with. A
    later import of that works.
    """
    loaded = loaded_by(
        "from brokerd.cli.startup import import_libraries; import_libraries(); import"
        " brokerd.daemon.process; from brokerd.config.load import load_text;"
        " load_text('listen: [/s]\\nclients: {a: {key: k}}')"
    )
    assert "pydantic" in loaded
    assert not loaded & {"click", "importlib.metadata", "email.message", "zipfile"}
    assert "importlib.metadata" in loaded_by(
        "from brokerd.cli.startup import import_libraries; import_libraries(); from"
        " importlib.metadata import version; version('pydantic')"
    )


def test_import_of_daemon_with_plugins_allowed_looks_for_them() -> None:
    """A user's value of PYDANTIC_DISABLE_PLUGINS is obeyed."""
    assert "importlib.metadata" in loaded_by(
        "import os; os.environ['PYDANTIC_DISABLE_PLUGINS'] = 'other'; from brokerd.cli.startup"
        " import import_libraries; import_libraries(); from brokerd.config.load import load_text;"
        " load_text('listen: [/s]\\nclients: {a: {key: k}}')"
    )


def test_import_of_daemon_keeps_rich_already_loaded() -> None:
    """A program that has loaded rich keeps it."""
    assert "rich" in loaded_by(
        "import rich\nfrom brokerd.cli.startup import import_libraries; import_libraries()"
    )
