"""The daemon: a message broker that routes framed messages between named clients.

The client library is :mod:`brokerd_client`; this package uses it, never the other way
round. To run a broker inside a program, see :class:`brokerd.daemon.daemon.Daemon`.
"""

__version__ = "0.1.0"
