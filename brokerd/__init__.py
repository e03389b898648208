"""The daemon: a message broker that routes framed messages between named clients.

The client library is :mod:`brokerd_client`; this package uses it, never the other way
round. To run a broker inside a program, see :class:`brokerd.daemon.daemon.Daemon`.
"""

import os as _os
import sys as _sys

__version__ = "0.1.0"

#: The copy of brokerd_client that a wheel of brokerd contains; see setup.py. A checkout
#: has none.
_BUNDLED = f"{__path__[0]}{_os.sep}_bundled"
if _BUNDLED not in _sys.path and _os.path.isdir(_BUNDLED):  # noqa: PTH112 - pathlib loads slowly
    # A directory that is not a site's, such as that of pip install --target: its .pth
    # file was not read.
    _sys.path.append(_BUNDLED)
