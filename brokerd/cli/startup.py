"""The start of the broker, which needs few of the modules of the command ``brokerd``.

Most of a start is imports. So libraries are imported without the parts that are never
used here. click is imported only where there is something to parse.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, cast

from brokerd.config.text_files import DEFAULT_CONFIG, IN_ENVIRON, VARIABLE

__all__ = ["import_libraries", "named_config", "run"]

#: The names that pydantic imports for types that no configuration has, by their modules.
#: structlog uses uuid, too, in a part that is not used here.
_UNUSED: Final[Mapping[str, Sequence[str]]] = {
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "secrets": (),
    "uuid": ("UUID",),
    "zoneinfo": ("ZoneInfo", "ZoneInfoNotFoundError"),
}


def named_config(arguments: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    """Return the configuration of a broker that is started in a plain way, else None.

    For all other arguments and variables, click finds out what to do.
    """
    if "_BROKERD_COMPLETE" in environ:
        return None
    match arguments:
        case ["--config", file] if file and not file.startswith("-"):
            return Path(file)
        case []:
            named, text = environ.get("BROKERD_CONFIG"), environ.get(VARIABLE)
            if named and text:
                return None
            return Path(IN_ENVIRON if text else named or DEFAULT_CONFIG)
    return None


def run(config: Path) -> int:
    """Run the broker until it is stopped, and return the exit status."""
    if os.getpid() == 1:
        # In the first process of a container, the system drops a signal without a
        # handler. A stop during the start would then need a forced kill. Once the event
        # loop runs, the daemon handles the signal itself.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Imports leave hardly any garbage, and each collection would walk all that they made.
    gc.disable()
    import_libraries()
    from brokerd.daemon import process

    # Otherwise the first collection would.
    gc.freeze()
    gc.enable()
    return process.run(config)


def import_libraries() -> None:
    """Import structlog, pydantic and PyYAML without modules that they would not use.

    Together those would take a fifth of the time until the daemon accepts connections.
    They would also take 5 MiB of memory for as long as it runs.
    """
    unused = dict(_UNUSED)
    if os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__") == "__all__":
        # pydantic looks for plugins in the metadata of installed distributions. The
        # package for that imports others, for e-mail and zip files.
        unused["importlib.metadata"] = ("entry_points",)
    # Each library is there when the module that uses it asks for it.
    with _stand_ins(unused):
        # structlog imports rich, whatever the renderer, for a form of traceback that is
        # never printed here.
        with _absent("rich"):
            import structlog  # noqa: F401
        with _cheap_typed_dicts():
            import pydantic_core
        import pydantic.main
        import pydantic.plugin._loader
        import pydantic.types  # noqa: F401

        # The first use of one asks for the types, too.
        pydantic_core.SchemaSerializer({"type": "any"}).to_python(None)
    with _patterns_compiled_on_use():
        import yaml  # noqa: F401


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """Make imports of a module fail, unless it is loaded already."""
    modules = cast("dict[str, object]", sys.modules)
    if name in modules:
        yield
        return
    # A module that is None in sys.modules can't be imported (importlib, "The module
    # cache").
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


@contextlib.contextmanager
def _stand_ins(contents: Mapping[str, Iterable[str]]) -> Iterator[None]:
    """Replace modules that are not loaded yet by empty modules for imports.

    contents: the names that are imported from each of them, and never used.
    """
    added = [name for name in contents if name not in sys.modules]
    for name in added:
        sys.modules[name] = stand_in = ModuleType(name)
        for each in contents[name]:
            setattr(stand_in, each, type(each, (), {}))
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class _Pattern:
    """A regular expression that is compiled when it is first used."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._given = pattern, flags

    def __getattr__(self, name: str) -> object:
        """Return a method or an attribute of the compiled pattern, and keep it."""
        value = self.__dict__[name] = getattr(re.compile(*self._given), name)
        return value


@contextlib.contextmanager
def _patterns_compiled_on_use() -> Iterator[None]:
    """Make imported modules compile a pattern when they first use it.

    PyYAML has patterns for texts in other scripts, for dates and for numbers to base 60.
    """
    lazy = ModuleType("re")
    vars(lazy).update(vars(re), compile=_Pattern)
    sys.modules["re"] = lazy
    try:
        yield
    finally:
        sys.modules["re"] = re


class _Declaration:
    """The base of classes that only type checkers need; an instance is a dict."""

    def __new__(cls, **values: object) -> dict[str, object]:  # type: ignore[misc]  # as TypedDict
        """Return the values."""
        return values

    def __init_subclass__(cls, **options: object) -> None:
        """Accept the options of TypedDict."""


@contextlib.contextmanager
def _cheap_typed_dicts() -> Iterator[None]:
    """Make TypedDict return classes that know nothing of their annotations.

    pydantic_core declares a hundred of them, and TypedDict would compile each annotation.
    """
    import typing

    import typing_extensions

    original = typing.TypedDict, typing_extensions.TypedDict
    typing.TypedDict = typing_extensions.TypedDict = _Declaration  # type: ignore[assignment]
    try:
        yield
    finally:
        typing.TypedDict, typing_extensions.TypedDict = original
