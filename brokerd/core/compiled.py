"""The modules of the core that are compiled, and whether this process uses them.

All of them are used, or none: a compiled module reads the C structures of another, which
an object of the other's source does not have. ``BROKERD_PURE=1`` in the environment
forces the sources.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Container
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from typing import Final

__all__ = ["MODULES", "choose", "why_sources"]

#: setup.py compiles them. Each but ``_routing_c`` is a ``.py`` file that is compiled as
#: it is, with the C types of the ``.pxd`` file beside it.
MODULES: Final = (
    "_routing_c",
    "consumer",
    "deadlines",
    "flight",
    "groups",
    "in_flight",
    "outbox",
    "rate",
    "requests",
    "session",
    "sink",
    "stored_message",
    "topic_cache",
    "topic_search",
    "write_buffer",
)


def choose(folder: str) -> str:
    """Hide the compiled modules in a folder from imports, unless all can be used.

    Return :func:`why_sources`.
    """
    why = why_sources(folder)
    # A zip file has nothing to hide, and a finder of its own.
    if why and os.path.isdir(folder):  # noqa: PTH112 - pathlib loads slowly
        sys.path_importer_cache[folder] = FileFinder(
            folder, (SourceFileLoader, SOURCE_SUFFIXES), (SourcelessFileLoader, BYTECODE_SUFFIXES)
        )
    return why


def why_sources(folder: str) -> str:
    """Return why the compiled modules in a folder are not used; "" if they are."""
    if os.environ.get("BROKERD_PURE") == "1":
        return "BROKERD_PURE=1"
    try:
        files = frozenset(os.listdir(folder))  # noqa: PTH208 - pathlib loads slowly
    except OSError:
        files = frozenset()
    for name in MODULES:
        binary = _binary(name, files)
        if not binary:
            return (
                "brokerd was installed without a working C compiler or without Python's headers (on"
                " Debian: apt install gcc python3-dev, then install brokerd again)"
            )
        # Only a checkout has .pyx and .pxd files; an installation has no order of times.
        if "_routing_c.pyx" in files:
            for source in (f"{name}.py", f"{name}.pyx", f"{name}.pxd"):
                if source in files and _changed(folder, source) > _changed(folder, binary):
                    return f"{source} is newer than what was compiled from it: run make ready-test"
    return ""


def _binary(name: str, files: Container[str]) -> str:
    """Return the file with a compiled module for this Python; "" without one."""
    for suffix in EXTENSION_SUFFIXES:
        if name + suffix in files:
            return name + suffix
    return ""


def _changed(folder: str, name: str) -> float:
    return os.stat(f"{folder}{os.sep}{name}").st_mtime  # noqa: PTH116 - pathlib loads slowly
