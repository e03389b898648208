"""The direct API: two processes, one connection, a key.

A drop-in for ``multiprocessing.connection``.

It keeps the documented API of its predecessor ``processing.connection``, old method
names included. It is compatible with the standard library of every Python.
docs/direct-api.md says how to use it, and lists the differences from the standard
library.

    listener.py           Listener
    client.py             Client
    dialing.py            connecting within a deadline, and the handshake of the dialing side
    stream.py             Connection
    pair.py               Pipe
    xml.py                XmlListener, XmlClient
    readiness.py          wait
    handshaking.py        pending handshakes, deliver_challenge, answer_challenge
    keys.py               the forms of a key
    listening_sockets.py  listening sockets, their files, and wakers
    channels.py           channels through a broker, as sockets
    broker.py             addresses of a broker: broker://NAME
    tls_bridge.py         TLS between a channel and its broker
    call_lock.py          locks of connections and listeners
    named_pipes.py        AF_PIPE, on Windows
"""

from __future__ import annotations

import sys

from brokerd_client.address import infer_family as address_type
from brokerd_client.connection.client import Client
from brokerd_client.connection.handshaking import answer_challenge, deliver_challenge
from brokerd_client.connection.listener import Listener
from brokerd_client.connection.listening_sockets import arbitrary_address, default_family, families
from brokerd_client.connection.pair import Pipe
from brokerd_client.connection.readiness import wait
from brokerd_client.connection.stream import BadMessageLength, Connection, MessageTooBig
from brokerd_client.connection.xml import XmlClient, XmlConnection, XmlListener
from brokerd_client.errors import (
    AuthenticationError,
    BufferTooShort,
    Closed,
    InvalidKey,
    TimedOut,
    UndecodablePayload,
)

__all__ = [
    "AuthenticationError",
    "BadMessageLength",
    "BufferTooShort",
    "Client",
    "Closed",
    "Connection",
    "InvalidKey",
    "Listener",
    "MessageTooBig",
    "Pipe",
    "TimedOut",
    "UndecodablePayload",
    "XmlClient",
    "XmlConnection",
    "XmlListener",
    "address_type",
    "answerChallenge",
    "answer_challenge",
    "arbitrary_address",
    "default_family",
    "deliverChallenge",
    "deliver_challenge",
    "families",
    "wait",
]

if sys.platform == "win32":
    from brokerd_client.connection.named_pipes import PipeConnection

    __all__ += ["PipeConnection"]

# The names of processing.connection.
deliverChallenge = deliver_challenge  # noqa: N816
answerChallenge = answer_challenge  # noqa: N816


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
