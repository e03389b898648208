"""Layers: every import of both packages must be allowed by the table below.

``errors <- wire <- dialog <- {blocking, aio}``; ``wire <- core <- net <- daemon <-
cli``; ``config.model <- core, net, daemon``. The library never imports the daemon,
nor anything beyond the standard library. Sans-I/O modules import nothing that opens,
waits, logs or draws random numbers.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"brokerd": ROOT / "brokerd", "brokerd_client": ROOT / "client" / "brokerd_client"}

#: The modules that every other part may import: errors, addresses, the bytes on the wire,
#: and features that older Pythons lack.
LEAVES = (
    "brokerd_client.errors",
    "brokerd_client.address",
    "brokerd_client.wire",
    "brokerd_client._compat",
)
#: The values that a user of the library gets, which the protocol makes of received bytes.
VALUES = (
    "brokerd_client.channel_offer",
    "brokerd_client.codec",
    "brokerd_client.connection_event",
    "brokerd_client.json_codec",
    "brokerd_client.message",
    "brokerd_client.presence",
    "brokerd_client.topics",
)
#: The modules that both faces use. The faces never import each other.
FACE = (
    *LEAVES,
    *VALUES,
    "brokerd_client.settings",
    "brokerd_client.protocol",
    "brokerd_client._common",
)
MODEL = (
    "brokerd.config.model",
    "brokerd.config.values",
    "brokerd.config.cert_subjects",
    "brokerd.config.topic_rules",
)

#: What the parts may import of the two packages: (parts, what all of them may import).
#: The longest matching prefix of a module's name decides; a prefix stands for itself and
#: everything inside it. A package may always import its own inside.
ROWS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("brokerd_client",), ("brokerd_client",)),
    (("brokerd_client.errors", "brokerd_client._compat", "brokerd_client.topics"), ()),
    (
        ("brokerd_client.address", "brokerd_client.wire"),
        ("brokerd_client.errors", "brokerd_client._compat"),
    ),
    (
        (
            "brokerd_client.channel_offer",
            "brokerd_client.connection_event",
            "brokerd_client.json_codec",
            "brokerd_client.presence",
        ),
        LEAVES,
    ),
    (("brokerd_client.codec",), (*LEAVES, "brokerd_client.json_codec")),
    (
        ("brokerd_client.message",),
        (*LEAVES, "brokerd_client.codec", "brokerd_client.json_codec"),
    ),
    (
        ("brokerd_client.settings",),
        (*LEAVES, "brokerd_client._common", "brokerd_client.json_codec"),
    ),
    (
        ("brokerd_client.connection",),
        (*LEAVES, "brokerd_client._common", "brokerd_client.settings", "brokerd_client.tls"),
    ),
    # Listeners at a broker's addresses are clients of the broker.
    (
        ("brokerd_client.connection.broker",),
        (
            *LEAVES,
            "brokerd_client.blocking",
            "brokerd_client.connection",
            "brokerd_client.settings",
        ),
    ),
    (("brokerd_client.managers",), ("brokerd_client.connection", "brokerd_client.errors")),
    (("brokerd_client.tls",), LEAVES),
    (("brokerd_client.protocol",), (*LEAVES, *VALUES)),
    (
        ("brokerd_client._common",),
        (
            *LEAVES,
            *VALUES,
            "brokerd_client.protocol",
            "brokerd_client.connection.named_pipes",
        ),
    ),
    (
        ("brokerd_client.aio",),
        (*FACE, "brokerd_client.tls", "brokerd_client.connection.named_pipes"),
    ),
    # A channel of the blocking client is a connection of the direct API.
    (
        ("brokerd_client.blocking",),
        (
            *FACE,
            "brokerd_client.tls",
            "brokerd_client.connection.channels",
            "brokerd_client.connection.named_pipes",
            "brokerd_client.connection.stream",
        ),
    ),
    (("brokerd",), ()),
    (
        ("brokerd.config",),
        (
            *LEAVES,
            "brokerd_client._common.paths",
            "brokerd_client._common.ssl_errors",
        ),
    ),
    (("brokerd.log",), (*MODEL, "brokerd.config.units", "brokerd_client._common.rate_limit")),
    (("brokerd.core",), (*LEAVES, *MODEL, "brokerd_client.topics")),
    # A process of its own: of the core it knows the seam only.
    (("brokerd.store",), ("brokerd.core.mailboxes.journal",)),
    (
        ("brokerd.net",),
        (
            *LEAVES,
            *MODEL,
            "brokerd_client._common",
            "brokerd_client.connection.named_pipes",
            "brokerd_client.tls",
            "brokerd.core",
            "brokerd.log",
        ),
    ),
    (
        ("brokerd.monitor",),
        (
            *LEAVES,
            *MODEL,
            "brokerd.core",
            "brokerd.net",
            "brokerd.log",
            "brokerd.daemon.threads",
        ),
    ),
    (
        ("brokerd.daemon",),
        (
            *LEAVES,
            "brokerd_client._common.processors",
            "brokerd.config",
            "brokerd.core",
            "brokerd.net",
            "brokerd.log",
            "brokerd.monitor",
            "brokerd.store",
        ),
    ),
    # A new process hands the daemon what it takes over. That module is below the daemon;
    # the old process's modules use the daemon.
    (
        ("brokerd.daemon.daemon",),
        (
            *LEAVES,
            "brokerd.config",
            "brokerd.core",
            "brokerd.daemon",
            "brokerd.net",
            "brokerd.log",
            "brokerd.monitor",
            "brokerd.store",
            "brokerd.upgrade.new_process",
        ),
    ),
    (
        ("brokerd.upgrade",),
        (
            *LEAVES,
            *MODEL,
            "brokerd.core",
            "brokerd.daemon",
            "brokerd.log",
            "brokerd.net",
        ),
    ),
    # The process around the daemon: it also replaces itself.
    (
        ("brokerd.daemon.process",),
        (
            *LEAVES,
            "brokerd.config",
            "brokerd.daemon",
            "brokerd.log",
            "brokerd.net",
            "brokerd.upgrade",
            "brokerd._held_signals",
        ),
    ),
    (("brokerd.testing",), ("brokerd_client", "brokerd.config", "brokerd.daemon", "brokerd.log")),
    (("brokerd.__main__", "brokerd._held_signals"), ("brokerd.entry",)),
    # The first thing that runs: it imports the rest when signals are held.
    (
        ("brokerd.entry",),
        ("brokerd._BUNDLED", "brokerd._held_signals", "brokerd.cli", "brokerd.ctl"),
    ),
    (
        ("brokerd.cli",),
        (
            "brokerd_client",
            "brokerd._held_signals",
            "brokerd.config",
            "brokerd.core",
            "brokerd.ctl",
            "brokerd.daemon",
            "brokerd.log",
            "brokerd.store",
            "brokerd.testing",
        ),
    ),
    # A client like any other, without access to the daemon's inside.
    (
        ("brokerd.ctl",),
        ("brokerd_client", "brokerd.config.admin_user", "brokerd.config.text_files"),
    ),
)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    part: allowed for parts, allowed in ROWS for part in parts
}

SANS_IO = ("brokerd_client.wire", *VALUES, "brokerd_client.protocol", "brokerd.core")
NOT_IN_SANS_IO = {
    "asyncio",
    "logging",
    "random",
    "secrets",
    "select",
    "selectors",
    "socket",
    "ssl",
    "structlog",
    "subprocess",
    "threading",
    "time",
    "uvloop",
}
#: Imports under TYPE_CHECKING that close a circle: (importing module, imported module),
#: where a ``*`` stands for any module of the folder, and the reason. Nothing else may.
TYPES_IN_A_CIRCLE: dict[tuple[str, str], str] = {
    (
        "brokerd_client.aio.*",
        "brokerd_client.aio.base",
    ): "a transport reports its events to the client",
    (
        "brokerd_client.aio.*",
        "brokerd_client.aio.client",
    ): "messages and subscriptions pass their calls on to the client",
    ("brokerd_client.blocking.*", "brokerd_client.blocking.client"): "the same",
    (
        "brokerd_client.blocking.leader",
        "brokerd_client.blocking.base",
    ): "a leader has the client handle what it reads",
    ("brokerd.core.session", "brokerd.core.*"): "a session keeps state for the other modules",
    (
        "brokerd.core.*",
        "brokerd.core.cluster.remote_traffic",
    ): "the traffic with other hosts hands frames to the broker, which announces its names",
    ("brokerd.core.write_buffer", "brokerd.core.flight"): "a route keeps a client's requests",
    ("brokerd.core.exchange", "brokerd.core.mailboxes.mailbox"): "a client keeps its mailbox",
    (
        "brokerd.core.consumer",
        "brokerd.core.mailboxes.mailbox",
    ): "a mailbox and its consumers know each other",
    ("brokerd.daemon.*", "brokerd.daemon.daemon"): "the parts of Daemon are given it",
    ("brokerd.net.context", "brokerd.net.*"): "the parts of Server share these services",
    (
        "brokerd.net.handshake.*",
        "brokerd.net.handshake.pending",
    ): "admission and TLS are given a connection that keeps their state",
}
#: Packages that are used if installed; codec's is named in the error if not.
OPTIONAL = {
    "brokerd_client.codec": {"msgpack"},
    "brokerd_client._common.tracing": {"opentelemetry"},
}


def imports_of(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, module imported) for every import in the file, wherever it stands.

    ``from a import b`` yields ``a.b``: whether b is a module or a name in one, the
    longest prefix decides.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".pyx":
        source = cython_imports(source)
    elif path.with_suffix(".pxd").exists():
        source += "\n" + cython_imports(path.with_suffix(".pxd").read_text(encoding="utf-8"))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and _is_import_function(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


@cache
def all_imports_of(path: Path, module: str) -> list[tuple[int, str]]:
    """Return what ``imports_of`` yields, read once for each file."""
    return list(imports_of(path, module))


def cython_imports(source: str) -> str:
    """Return the imports of a Cython source as Python; its other lines are empty.

    A ``cimport`` imports too, unless it is from Cython's declarations of C libraries.
    """
    return "\n".join(
        line.strip().replace(" cimport ", " import ")
        if re.match(r"\s*(from [\w.]+ )?import |\s*from brokerd[\w.]* cimport ", line)
        else ""
        for line in source.splitlines()
    )


def _is_import_function(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def within(module: str, prefix: str) -> bool:
    """Return whether the module is the prefix or inside it."""
    return module == prefix or module.startswith(prefix + ".")


def problems_of(path: Path, module: str) -> list[str]:
    """Return a line for every import that the file must not have."""
    owner = max((prefix for prefix in MAY_IMPORT if within(module, prefix)), key=len)
    found = []
    for_types = lines_for_types(path)
    for line, imported in imports_of(path, module):
        top = imported.partition(".")[0]
        reason = ""
        if top == "typing_extensions" and line in for_types:
            continue  # every type checker has it, and nothing imports it at run time
        if top in PACKAGES:
            if not any(
                within(imported, prefix)
                for prefix in (*MAY_IMPORT[owner], owner, "brokerd.__version__")
            ):
                reason = f"{owner} may import only {', '.join(MAY_IMPORT[owner]) or 'itself'}"
        elif any(within(module, prefix) for prefix in SANS_IO) and top in NOT_IN_SANS_IO:
            reason = "sans-I/O modules take clocks, random numbers and sockets as arguments"
        elif module.startswith(
            "brokerd_client"
        ) and top not in sys.stdlib_module_names | OPTIONAL.get(module, set()):
            reason = "the library imports nothing beyond the standard library"
        elif not module.startswith("brokerd_client") and top in (
            "pickle",
            "cPickle",
            "_pickle",
            "shelve",
            "dill",
        ):
            reason = "nothing in the daemon unpickles"
        if reason:
            found.append(f"{path}:{line}: {module} imports {imported}: {reason}")
    return found


def modules() -> list[tuple[str, Path]]:
    """Return every module of both packages with its file."""
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyx")]):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join((package, *parts)).removesuffix(".__init__"), path))
    return found


@cache
def lines_for_types(path: Path) -> set[int]:
    """Return the numbers of the lines below ``if TYPE_CHECKING:``."""
    if path.suffix == ".pyx":
        return set()
    return {
        line
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for line in range(statement.lineno, (statement.end_lineno or 0) + 1)
    }


def graph(
    sources: dict[str, Path], allowed: Collection[tuple[str, str]] = ()
) -> dict[str, set[str]]:
    """Return the modules that each module imports, in functions and for types too.

    Args:
        allowed: Pairs of patterns for imports under TYPE_CHECKING that are left out.
    """
    arrows: dict[str, set[str]] = {}
    for module, path in sources.items():
        for_types = lines_for_types(path)
        arrows[module] = set()
        for line, name in all_imports_of(path, module):
            imported = name
            while imported and imported not in sources:
                imported = imported.rpartition(".")[0]
            if (
                imported
                and imported != module
                and not (
                    line in for_types
                    and any(
                        fnmatchcase(module, importer) and fnmatchcase(imported, target)
                        for importer, target in allowed
                    )
                )
            ):
                arrows[module].add(imported)
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the groups of modules that import each other, directly or not."""

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        pending = [module]
        while pending:
            for imported in arrows[pending.pop()] - found:
                found.add(imported)
                pending.append(imported)
        return found

    reachable = {module: reached(module) for module in arrows}
    return sorted(
        {
            tuple(sorted(other for other in reachable[module] if module in reachable[other]))
            for module in arrows
            if module in reachable[module]
        }
    )


def test_imports_form_no_circle() -> None:
    """No modules import each other, in functions and for types too.

    The exceptions are the imports for types in TYPES_IN_A_CIRCLE.
    """
    assert circles(graph(dict(modules()), TYPES_IN_A_CIRCLE)) == []


@pytest.mark.parametrize("pair", TYPES_IN_A_CIRCLE)
def test_imports_listed_exception_still_closes_a_circle(pair: tuple[str, str]) -> None:
    """Each exception is needed: without it, there is a circle."""
    assert circles(graph(dict(modules()), TYPES_IN_A_CIRCLE.keys() - {pair}))


@pytest.mark.parametrize(
    "line",
    [
        "from brokerd.b import name",
        "def function():\n    from brokerd.b import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from brokerd.b import Name",
    ],
)
def test_imports_planted_circle_is_found(tmp_path: Path, line: str) -> None:
    """A circle is found, also one that an import in a function or for types closes."""
    sources = {}
    for name, content in (("a", line), ("b", "import brokerd.c"), ("c", "import brokerd.a")):
        sources[f"brokerd.{name}"] = path = tmp_path / f"{name}.py"
        path.write_text(content + "\n", encoding="utf-8")

    assert circles(graph(sources)) == [("brokerd.a", "brokerd.b", "brokerd.c")]


@pytest.mark.parametrize(
    ("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()]
)
def test_imports_of_module_follow_layers(module: str, path: Path) -> None:
    """No module imports a module that its layer must not know."""
    assert problems_of(path, module) == []


@pytest.mark.parametrize("module", [module for module, _ in modules() if module not in PACKAGES])
def test_imports_table_lists_every_module(module: str) -> None:
    """Every module has an entry in the table, so that no module falls under the rule of
    a whole package by accident.
    """
    owner = max((prefix for prefix in MAY_IMPORT if within(module, prefix)), key=len)
    assert owner not in PACKAGES, f"{module} has no place in MAY_IMPORT of {__file__}"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("brokerd_client.errors", "from brokerd_client.wire import framing"),
        ("brokerd_client.wire.framing", "import brokerd_client.protocol.dialog"),
        ("brokerd_client.wire.framing", "from .. import dialog"),
        ("brokerd_client.wire.framing", "from ..dialog import Dialog"),
        ("brokerd_client.wire.framing", "import socket"),
        ("brokerd_client.wire.handshake", "from secrets import token_bytes"),
        ("brokerd_client.wire.handshake", "def f():\n    import random"),
        ("brokerd_client.protocol.dialog", "import asyncio.events"),
        ("brokerd_client.protocol.dialog", "import threading as t"),
        ("brokerd_client.protocol.dialog", "from brokerd_client import blocking"),
        ("brokerd_client.blocking.client", "from brokerd_client import aio"),
        ("brokerd_client.aio.client", "import brokerd"),
        ("brokerd_client.aio.client", "import structlog"),
        ("brokerd_client.blocking.client", "import msgpack"),
        ("brokerd_client.codec", "import importlib\nimportlib.import_module('yaml')"),
        ("brokerd.core.exchange", "import time"),
        ("brokerd.core.exchange", "from time import monotonic"),
        ("brokerd.core.exchange", "import structlog"),
        ("brokerd.core.exchange", "import brokerd.net.server"),
        ("brokerd.core.exchange", "from brokerd.config import load"),
        ("brokerd.core.exchange", "import brokerd_client"),
        ("brokerd.net.server", "from brokerd.daemon.daemon import Daemon"),
        (
            "brokerd.net.server",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from brokerd import cli",
        ),
        ("brokerd.daemon.daemon", "from brokerd.cli.main import main"),
        ("brokerd.ctl", "from brokerd.core import exchange"),
        ("brokerd.cli.main", "import pickle"),
        ("brokerd.core.exchange", "from pickle import loads"),
        ("brokerd.net.server", "__import__('pickle')"),
    ],
)
def test_imports_planted_forbidden_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    """A forbidden import planted in a module is reported, with its line."""
    planted = tmp_path / "planted.py"
    planted.write_text(f'"""A module."""\n\nimport json\n{line}\n', encoding="utf-8")

    problems = problems_of(planted, module)

    assert len(problems) == 1
    expected_line = 3 + len(line.splitlines())
    assert problems[0].startswith(f"{planted}:{expected_line}: {module} imports ")


def test_imports_planted_forbidden_import_in_cython_is_found(tmp_path: Path) -> None:
    """Cython sources follow the same layers."""
    planted = tmp_path / "planted.pyx"
    planted.write_text(
        "cdef int x = 1\nfrom libc.string cimport memcpy\nimport socket\n", encoding="utf-8"
    )

    (problem,) = problems_of(planted, "brokerd.core._routing_c")

    assert problem.startswith(f"{planted}:3: brokerd.core._routing_c imports socket: ")


def test_imports_planted_cimport_beside_module_is_found(tmp_path: Path) -> None:
    """A .pxd file follows the layers of the module whose C types it declares."""
    planted = tmp_path / "planted.py"
    planted.write_text('"""A module."""\n', encoding="utf-8")
    planted.with_suffix(".pxd").write_text(
        "from libc.stdint cimport int64_t\nfrom brokerd.net.server cimport Server\n",
        encoding="utf-8",
    )

    (problem,) = problems_of(planted, "brokerd.core.rate")

    assert "brokerd.core.rate imports brokerd.net.server.Server: " in problem


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("brokerd_client.wire.handshake", "from brokerd_client.errors import BadLength"),
        ("brokerd_client.wire.handshake", "from . import framing"),
        ("brokerd_client.codec", "import msgpack"),
        ("brokerd_client.blocking.client", "import socket, threading, time"),
        ("brokerd.core.exchange", "from brokerd.config.model import Client"),
        (
            "brokerd.net.server",
            "from brokerd.core.exchange import Exchange\nimport asyncio, structlog",
        ),
        ("brokerd.cli.main", "from brokerd import __version__\nimport click"),
    ],
)
def test_imports_planted_allowed_import_is_not_reported(
    tmp_path: Path, module: str, line: str
) -> None:
    """An import that the table allows passes, so that the checker's silence means
    something.
    """
    planted = tmp_path / "planted.py"
    planted.write_text(line + "\n", encoding="utf-8")

    assert problems_of(planted, module) == []
