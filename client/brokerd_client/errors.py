"""Every exception the library raises, in one tree that says who must act.

::

    BrokerdError
    ├── LocalError                   the caller made a mistake; nothing was sent
    │   ├── AddressError             (ValueError) the address can't be understood or served here
    │   ├── InvalidName              (ValueError) not a client name, address or topic
    │   ├── InvalidKey               (ValueError) an empty or unreadable key
    │   ├── AlreadyAnswered          (RuntimeError) a second answer to one request
    │   ├── PayloadError             (TypeError)  the payload has no codec, or is too large to frame
    │   ├── WrongLoop                (RuntimeError) an asyncio client used outside the event loop that made it
    │   ├── WrongProcess             (RuntimeError) a client used in a fork of the process that made it
    │   └── WouldDeadlock            (RuntimeError) a signal handler waits for the call that it has interrupted
    ├── RemoteError                  the peer broke the rules
    │   ├── ProtocolError            (ConnectionError) the broker did, in an answer or with the connection as a whole
    │   ├── FrameError
    │   │   ├── BadLength            a length no frame can have
    │   │   └── FrameTooBig          more was announced than the limit of the moment
    │   ├── MalformedEnvelope        a frame that is no broker frame
    │   │   └── ExtensionTooDeep     ... its extension has too many levels
    │   ├── UndecodablePayload       the codec named in the header can't read the payload
    │   └── AuthenticationError      (multiprocessing.AuthenticationError) the handshake failed
    │       └── TlsError             (ConnectionError) ... that of TLS: a certificate, a version, no TLS at all
    ├── Refused                      the broker, or the other client, said no: one class per error code
    │   ├── NoSuchClient  Offline  Abandoned  Denied  Full  TooLarge  Expired
    │   ├── RateLimited  Malformed  Unsupported  ShuttingDown
    │   ├── NameTaken  Replaced  KeyRemoved  DisconnectedByOperator
    │   └── RequestFailed            the other client answered a request with an error of its own
    ├── Disconnected                 (ConnectionError) the connection to the broker is gone
    │   └── InDoubt                  ... and what became of this send is not known
    ├── Closed                       (OSError) used after close()
    ├── TimedOut                     (TimeoutError) the time the caller gave ran out
    └── BufferTooShort               (multiprocessing.BufferTooShort) args[0] is the whole message

Nothing here ever holds a key, a MAC or a message body, except BufferTooShort, whose purpose
it is. ``Refused.code`` is the word of the wire (docs/protocol.md, "Outcomes").
"""

from __future__ import annotations

import multiprocessing

__all__ = [
    "Abandoned",
    "AddressError",
    "AlreadyAnswered",
    "AuthenticationError",
    "BadLength",
    "BrokerdError",
    "BufferTooShort",
    "Closed",
    "Denied",
    "Disconnected",
    "DisconnectedByOperator",
    "Expired",
    "ExtensionTooDeep",
    "FrameError",
    "FrameTooBig",
    "Full",
    "InDoubt",
    "InvalidKey",
    "InvalidName",
    "KeyRemoved",
    "LocalError",
    "Malformed",
    "MalformedEnvelope",
    "NameTaken",
    "NoSuchClient",
    "Offline",
    "PayloadError",
    "ProtocolError",
    "RateLimited",
    "Refused",
    "RemoteError",
    "Replaced",
    "RequestFailed",
    "ShuttingDown",
    "TimedOut",
    "TlsError",
    "TooLarge",
    "UndecodablePayload",
    "Unsupported",
    "WouldDeadlock",
    "WrongLoop",
    "WrongProcess",
    "refusal",
]


class BrokerdError(Exception):
    """Whatever the library raises is one of these."""

    #: Whether the peer ended a connection in the middle of its handshake, without a word: another try may succeed.
    cut_off = False


class LocalError(BrokerdError):
    """The caller made a mistake; nothing was sent."""


class AddressError(LocalError, ValueError):
    """The address can't be understood, or its family is not available here."""


class InvalidName(LocalError, ValueError):
    """The text is no client name, address or topic (docs/protocol.md, "Names")."""


class InvalidKey(LocalError, ValueError):
    """The key is empty, or could not be read."""


class PayloadError(LocalError, TypeError):
    """The payload can't be encoded, or is larger than can be sent."""


class AlreadyAnswered(LocalError, RuntimeError):
    """A request was given a second answer; whoever asked has the first."""


class WrongLoop(LocalError, RuntimeError):
    """An asyncio client was used in another event loop, or in another thread, than the one that made it."""


class WrongProcess(LocalError, RuntimeError):
    """A client made by one process was used in a fork of it."""


class WouldDeadlock(LocalError, RuntimeError):
    """A signal handler called something that waits, and has interrupted a call of the same client."""


class RemoteError(BrokerdError):
    """The peer broke the rules."""


class ProtocolError(RemoteError, ConnectionError):
    """The broker broke the rules of the protocol (docs/protocol.md); ``__cause__`` is the error behind it, if any."""


class FrameError(RemoteError):
    """The bytes are no frame."""


class BadLength(FrameError):
    """The length is negative and not the -1 that announces a 64-bit length."""


class FrameTooBig(FrameError):
    """The peer announced a frame above the limit.

    size: bytes announced. limit: bytes accepted.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"the peer announced a frame of {size} bytes; at most {limit} are accepted")
        self.size = size
        self.limit = limit

    def __reduce__(self) -> tuple[type[FrameTooBig], tuple[int, int]]:
        # Without it the copy that travels to another process would be built from the message.
        return FrameTooBig, (self.size, self.limit)


class MalformedEnvelope(RemoteError):
    """A frame that is no broker frame.

    id: the frame's id where it could be read, else 0.
    """

    def __init__(self, message: str, id: int = 0) -> None:
        super().__init__(message)
        self.id = id


class ExtensionTooDeep(MalformedEnvelope):
    """The frame's extension has more levels than the protocol allows; the rest of the frame may be read."""


class UndecodablePayload(RemoteError):
    """The payload is not what its codec says it is."""


class AuthenticationError(RemoteError, multiprocessing.AuthenticationError):
    """The handshake failed; the message says which side rejected which, and why."""


class TlsError(AuthenticationError, ConnectionError):
    """There is no TLS channel with the peer, or none any more; the message says what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        # Whoever reports an OSError shows this.
        self.strerror = message


class Refused(BrokerdError):
    """The broker, or the client asked, said no.

    code: the word of the wire, such as ``offline``. name: the recipient it concerns, or "".
    id: the id of the message refused, 0 where the broker could not read it.
    """

    code = "refused"

    def __init__(self, message: str, *, name: str = "", id: int = 0, code: str | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.id = id
        if code is not None:
            self.code = code


class NoSuchClient(Refused):
    """The configuration knows no client of that name."""

    code = "no_such_client"


class Offline(Refused):
    """The client exists and is not connected."""

    code = "offline"


class Abandoned(Refused):
    """The request was delivered, and its recipient's connection ended before it answered."""

    code = "abandoned"


class Denied(Refused):
    """The sender's rules do not allow it."""

    code = "denied"


class Full(Refused):
    """The recipient's queue has no room."""

    code = "full"


class TooLarge(Refused):
    """The message is longer than the broker's ``limits.max_message``."""

    code = "too_large"


class Expired(Refused):
    """The message's time to live ran out before it could be delivered."""

    code = "expired"


class RateLimited(Refused):
    """The sender exceeded the rate its configuration allows."""

    code = "rate_limited"


class Malformed(Refused):
    """The broker could not read what was sent, and closed the connection."""

    code = "malformed"


class Unsupported(Refused):
    """The broker does not know this operation, kind or flag."""

    code = "unsupported"


class ShuttingDown(Refused):
    """The broker is draining and takes nothing new."""

    code = "shutting_down"


class NameTaken(Refused):
    """The client has as many connections as it may have; the broker closes this one."""

    code = "name_taken"


class Replaced(Refused):
    """A newer connection of the same client has taken the place of this one."""

    code = "replaced"


class KeyRemoved(Refused):
    """The configuration does not let this key in any more; the broker closes its connections."""

    code = "key_removed"


class DisconnectedByOperator(Refused):
    """An administrator has disconnected this connection."""

    code = "disconnected"


class RequestFailed(Refused):
    """The client asked answered with an error whose code is its own."""

    code = "failed"


class Disconnected(BrokerdError, ConnectionError):
    """The connection to the broker is gone, or was never made.

    id: the id of the message that was therefore not sent, 0 where it is about none.
    """

    def __init__(self, message: str, *, id: int = 0) -> None:
        super().__init__(message)
        self.id = id


class InDoubt(Disconnected):
    """The connection went before the outcome of this send was known.

    It may have been delivered or not; it is never repeated by the library.
    id: the id of the message.
    """


class Closed(BrokerdError, OSError):
    """The object was used after its close()."""


class TimedOut(BrokerdError, TimeoutError):
    """The time the caller gave ran out."""


class BufferTooShort(BrokerdError, multiprocessing.BufferTooShort):
    """The buffer handed to recv_bytes_into is too small; args[0] is the whole message."""


_BY_CODE: dict[str, type[Refused]] = {
    cls.code: cls
    for cls in (
        NoSuchClient,
        Offline,
        Abandoned,
        Denied,
        Full,
        TooLarge,
        Expired,
        RateLimited,
        Malformed,
        Unsupported,
        ShuttingDown,
        NameTaken,
        Replaced,
        KeyRemoved,
        DisconnectedByOperator,
    )
}


def refusal(code: str, message: str, *, name: str = "", id: int = 0) -> Refused:
    """Return the exception for an error code; RequestFailed for a code that is not the broker's."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return RequestFailed(message, name=name, id=id, code=code)
    return cls(message, name=name, id=id)
