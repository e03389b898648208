"""Setup before large imports: hold signals and open the standard descriptors.

Otherwise a closed standard descriptor would be reused for a socket or a file. A print
would then write into it, and libuv ends the process when it closes one.
"""

from __future__ import annotations

import os
import sys

from brokerd import _BUNDLED
from brokerd._held_signals import hold_signals

__all__ = ["brokerctl", "brokerd", "open_standard_descriptors"]


def brokerd() -> None:
    """Run the command ``brokerd``."""
    hold_signals()
    open_standard_descriptors()
    prefer_bundled_library()
    from brokerd.cli import startup

    config = startup.named_config(sys.argv[1:], os.environ)
    if config is not None:
        sys.exit(startup.run(config))
    from brokerd.cli.main import main

    main(prog_name="brokerd")


def brokerctl() -> None:
    """Run the command ``brokerctl``."""
    open_standard_descriptors()
    prefer_bundled_library()
    from brokerd.ctl import main

    main()


def prefer_bundled_library() -> None:
    """Use the library of this wheel, whatever version of brokerd-client is installed."""
    if _BUNDLED in sys.path:
        sys.path.remove(_BUNDLED)
        sys.path.insert(0, _BUNDLED)


def open_standard_descriptors() -> None:
    """Open the null device at each of the descriptors 0, 1 and 2 that is closed."""
    if os.name != "posix":
        return
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system assigns the lowest free number, which is this one.
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            if getattr(sys, name) is None:
                setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
