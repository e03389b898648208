"""The start of the broker, which needs few of the modules of the command ``brokerd``.

Most of a start is imports. So libraries are imported without the parts that are never
used here. click is imported only where there is something to parse.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from brokerd.config.text_files import DEFAULT_CONFIG, IN_ENVIRON, VARIABLE

__all__ = ["import_libraries", "named_config", "run"]


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
    """Import structlog and pydantic without modules that they would not use.

    structlog imports rich, whatever the renderer, for a form of traceback that is never
    printed here. pydantic looks for plugins in the metadata of installed distributions.
    The package for that imports others, for e-mail and zip files. Together they would
    take a fifth of the time until the daemon accepts connections. They would also take
    5 MiB of memory for as long as it runs.
    """
    modules = cast("dict[str, object]", sys.modules)
    if "rich" not in modules:
        # A module that is None in sys.modules can't be imported (importlib, "The module
        # cache").
        modules["rich"] = None
        try:
            import structlog  # noqa: F401 - it is there when brokerd.log.logger asks for it
        finally:
            del modules["rich"]
    if os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__") != "__all__":
        return
    if "importlib.metadata" not in modules:
        stand_in = ModuleType("importlib.metadata")
        stand_in.__dict__["entry_points"] = None
        modules["importlib.metadata"] = stand_in
        try:
            import pydantic.plugin._loader  # noqa: F401 - so that no import looks for it again
        finally:
            del modules["importlib.metadata"]
