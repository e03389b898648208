"""Public names in completion, in help() and in the import list."""

from __future__ import annotations

import importlib
import pydoc
import re

import pytest

import brokerd_client

PACKAGES = ["brokerd_client", "brokerd_client.aio", "brokerd_client.blocking"]


@pytest.mark.parametrize("package", [*PACKAGES, "brokerd_client.connection"])
def test_package_dir_lists_public_names_only(package: str) -> None:
    """Completion shows the names in __all__, and no other module or name."""
    module = importlib.import_module(package)

    shown = {name for name in dir(module) if not re.fullmatch(r"__\w+__", name)}

    assert shown == set(module.__all__) - {"__version__"}
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


def test_client_library_help_lists_public_modules_only() -> None:
    """Each module of the package is in __all__, or begins with an underscore."""
    text = pydoc.render_doc(brokerd_client, renderer=pydoc.plaintext)

    contents = text.split("PACKAGE CONTENTS\n")[1].split("\n\n")[0]
    modules = {line.split()[0] for line in contents.splitlines()}
    assert {"aio", "blocking", "connection", "errors"} <= modules
    assert {name for name in modules if not name.startswith("_")} <= set(brokerd_client.__all__)


def test_client_library_all_holds_every_error() -> None:
    """The whole tree of exceptions is public."""
    assert set(brokerd_client.errors.__all__) <= set(brokerd_client.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_help_describes_public_names_only(package: str) -> None:
    """help() describes the names in __all__, and no other function or class."""
    module = importlib.import_module(package)

    text = pydoc.render_doc(module, renderer=pydoc.plaintext)

    described = set(re.findall(r"^    class (\w+)\(", text, re.MULTILINE))
    assert {"Client", "Message", "Subscription"} <= described <= set(module.__all__)
