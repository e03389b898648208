"""Every exception that the library raises, in one tree, ordered by the side at fault.

::

    BrokerdError
    ├── LocalError                   the caller made a mistake; nothing was sent
    │   ├── AddressError             (ValueError) the address can't be understood or served here
    │   ├── InvalidName              (ValueError) not a client name, address or topic
    │   ├── InvalidKey               (ValueError) an empty or unreadable key
    │   ├── AlreadyAnswered          (RuntimeError) a second answer to one request
    │   ├── PayloadError             (TypeError)  without a codec, or too large for a frame
    │   ├── WrongUse                 (RuntimeError) a call that does not fit the object
    │   ├── WrongLoop                (RuntimeError) an asyncio client used outside its event loop
    │   ├── WrongProcess             (RuntimeError) a client used in a forked process
    │   └── WouldDeadlock            (RuntimeError) a signal handler waits for the interrupted call
    ├── RemoteError                  the peer broke the rules
    │   ├── ProtocolError            (ConnectionError) the broker did, in an answer or otherwise
    │   ├── FrameError
    │   │   ├── BadLength            the length of a frame is not valid
    │   │   └── FrameTooBig          the announced length is above the current limit
    │   ├── MalformedEnvelope        the frame is not a valid broker frame
    │   │   └── ExtensionTooDeep     ... its extension has too many levels
    │   ├── UndecodablePayload       the codec named in the header can't read the payload
    │   └── AuthenticationError      (multiprocessing.AuthenticationError) the handshake failed
    │       ├── KeyRejected          ... because the peer does not accept the key used here
    │       └── TlsError             (ConnectionError) ... in TLS: certificate, version, or no TLS
    ├── Refused                      the broker or the other client refused: one class per code
    │   ├── NoSuchClient  Offline  Abandoned  Denied  Full  TooLarge  Expired
    │   ├── Cancelled  RateLimited  Malformed  Unsupported  ShuttingDown
    │   ├── StoreFailed  NameTaken  Replaced  KeyRemoved  DisconnectedByOperator
    │   ├── Elsewhere                another host of the cluster has the client, or its mailbox
    │   ├── StoreInDoubt             (OutcomeUnknown) ... it does not know what became of it
    │   └── RequestFailed            the other client answered a request with an error of its own
    │       ├── CallFailed           ... the method called raised an exception
    │       ├── NoSuchMethod         ... its service has no such method
    │       └── WrongArguments       (TypeError) ... the method does not take these arguments
    ├── OutcomeUnknown               the message may have been delivered or stored, or not
    ├── Disconnected                 (ConnectionError) the connection to the broker is gone
    │   └── InDoubt                  (OutcomeUnknown) ... before the outcome of this send was known
    ├── Closed                       (OSError) used after close()
    ├── TimedOut                     (TimeoutError) the caller's timeout ran out
    └── BufferTooShort               (multiprocessing.BufferTooShort) args[0] is the whole message

No exception ever holds a key, a MAC or a message body. Only BufferTooShort returns the body: that
is its purpose. ``Refused.code`` is the error code on the wire (docs/protocol.md,
"Outcomes").
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
    "CallFailed",
    "Cancelled",
    "Closed",
    "Denied",
    "Disconnected",
    "DisconnectedByOperator",
    "Elsewhere",
    "Expired",
    "ExtensionTooDeep",
    "FrameError",
    "FrameTooBig",
    "Full",
    "InDoubt",
    "InvalidKey",
    "InvalidName",
    "KeyRejected",
    "KeyRemoved",
    "LocalError",
    "Malformed",
    "MalformedEnvelope",
    "NameTaken",
    "NoSuchClient",
    "NoSuchMethod",
    "Offline",
    "OutcomeUnknown",
    "PayloadError",
    "ProtocolError",
    "RateLimited",
    "Refused",
    "RemoteError",
    "Replaced",
    "RequestFailed",
    "ShuttingDown",
    "StoreFailed",
    "StoreInDoubt",
    "TimedOut",
    "TlsError",
    "TooLarge",
    "UndecodablePayload",
    "Unsupported",
    "WouldDeadlock",
    "WrongArguments",
    "WrongLoop",
    "WrongProcess",
    "WrongUse",
]


class BrokerdError(Exception):
    """The base class of all exceptions that the library raises."""

    #: The key of the post() that raised this error. Another post() of the same message
    #: with this ``dedup_key`` continues it. "" for the errors of other calls.
    dedup_key = ""

    #: Whether the peer closed the connection during the handshake without a reason.
    #: A retry may then succeed.
    cut_off = False


class LocalError(BrokerdError):
    """The caller made a mistake; nothing was sent."""


class AddressError(LocalError, ValueError):
    """The address can't be understood, or its family is not available here."""


class InvalidName(LocalError, ValueError):
    """The text is not a valid client name, address or topic (docs/protocol.md,
    "Names").
    """


class InvalidKey(LocalError, ValueError):
    """The key is empty, or could not be read."""


class PayloadError(LocalError, TypeError):
    """The payload can't be encoded, or is larger than can be sent."""


class AlreadyAnswered(LocalError, RuntimeError):
    """The caller answered a request twice; the requester has the first answer."""


class WrongUse(LocalError, RuntimeError):
    """The call does not fit the object, such as an answer to what is not a request."""


class WrongLoop(LocalError, RuntimeError):
    """An asyncio client was used outside the event loop or thread that made it."""


class WrongProcess(LocalError, RuntimeError):
    """A client made by one process was used in a fork of it."""


class WouldDeadlock(LocalError, RuntimeError):
    """A signal handler made a waiting call, but had interrupted a call of the same
    client.
    """


class OutcomeUnknown(BrokerdError):
    """The message may have been delivered or stored, or not: InDoubt and StoreInDoubt.

    A message with a ``dedup_key`` can be sent again without being stored twice.
    """


class RemoteError(BrokerdError):
    """The peer broke the rules."""


class ProtocolError(RemoteError, ConnectionError):
    """The broker broke the rules of the protocol (docs/protocol.md).

    ``__cause__`` is the original error, if there is one.
    """


class FrameError(RemoteError):
    """The bytes are not a valid frame."""


class BadLength(FrameError):
    """The length is negative, and not the -1 that announces a 64-bit length."""


class FrameTooBig(FrameError):
    """The peer announced a frame above the limit.

    Attributes:
        size: The announced size, in bytes.
        limit: The largest accepted size, in bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"the peer announced a frame of {size} bytes; at most {limit} are accepted"
        )
        self.size = size
        self.limit = limit

    def __reduce__(self) -> tuple[type[FrameTooBig], tuple[int, int]]:
        # Without this method, unpickling in another process would call __init__ with
        # the message.
        return FrameTooBig, (self.size, self.limit)


class MalformedEnvelope(RemoteError):
    """The frame is not a valid broker frame.

    Attributes:
        message_id: The frame's id, or 0 if it could not be read.
    """

    def __init__(self, message: str, message_id: int = 0) -> None:
        super().__init__(message)
        self.message_id = message_id


class ExtensionTooDeep(MalformedEnvelope):
    """The frame's extension has too many levels; the rest of the frame may be readable."""


class UndecodablePayload(RemoteError):
    """The payload does not fit the codec in the header."""


class AuthenticationError(RemoteError, multiprocessing.AuthenticationError):
    """The handshake failed; the message names the side that refused, and the reason."""


class KeyRejected(AuthenticationError):
    """The peer does not accept the key used here, for the name given if there is one."""


class TlsError(AuthenticationError, ConnectionError):
    """The TLS channel failed or could not be made; the message says what would be
    right.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        # Code that reports an OSError shows strerror.
        self.strerror = message


class Refused(BrokerdError):
    """The broker, or the other client of a request, refused a message.

    Attributes:
        code: The error code on the wire, such as ``offline``.
        name: The recipient that the error concerns, or "".
        message_id: The id of the refused message, or 0 if the broker could not read it.
        seq: The number of the message in the mailbox ``name``, if it was stored and this
            became of it later; else 0.
        names: The mailboxes that did not store the event, if there are several.
    """

    code = "refused"

    def __init__(
        self,
        message: str,
        *,
        name: str = "",
        message_id: int = 0,
        code: str | None = None,
        seq: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.name = name
        self.message_id = message_id
        self.seq = seq
        self.names = names
        if code is not None:
            self.code = code


class NoSuchClient(Refused):
    """The configuration has no client with that name."""

    code = "no_such_client"


class Offline(Refused):
    """The client exists and is not connected."""

    code = "offline"


class Abandoned(Refused):
    """The request was delivered, but its recipient disconnected before it answered."""

    code = "abandoned"


class Denied(Refused):
    """The sender's rules do not allow the message or operation."""

    code = "denied"


class Full(Refused):
    """The recipient's queue or mailbox has no room, or the disk of the mailboxes.

    An event for several mailboxes is stored in those that are not among ``names``.
    """

    code = "full"


class TooLarge(Refused):
    """The message is longer than the broker's ``limits.max_message``."""

    code = "too_large"


class Expired(Refused):
    """The message's time to live ran out before it could be delivered."""

    code = "expired"


class Cancelled(Refused):
    """The request was cancelled before it was answered."""

    code = "cancelled"


class RateLimited(Refused):
    """The sender exceeded the rate its configuration allows."""

    code = "rate_limited"


class Malformed(Refused):
    """The broker could not read the frame, and closed the connection."""

    code = "malformed"


class Unsupported(Refused):
    """The broker does not know this operation, kind or flag."""

    code = "unsupported"


class ShuttingDown(Refused):
    """The broker is draining, and accepts nothing new."""

    code = "shutting_down"


class StoreInDoubt(Refused, OutcomeUnknown):
    """The broker does not know whether the message was stored or delivered.

    Its store, or the host of the recipient, was lost while the message was under way.
    To a mailbox, send it again with the same ``dedup_key``; without a key it may be
    stored twice. A live message, or a request, may have been delivered or not. A host
    that was frozen may still deliver it, but never twice.
    """

    code = "in_doubt"


class StoreFailed(Refused):
    """The disk of the broker's mailboxes has failed; nothing is stored until a restart."""

    code = "store_failed"


class Elsewhere(Refused):
    """Another host of the cluster has the other client, or the mailbox.

    The library connects to that host by itself. It raises this if it can't: no address
    is known, or the client uses TLS and that host advertises no tls:// address.

    Attributes:
        host: The name of that host.
        addresses: Where clients can connect to it.
    """

    code = "elsewhere"
    host = ""
    addresses: tuple[str, ...] = ()


class NameTaken(Refused):
    """The client already has all the connections that it may have; the broker closes
    this one.
    """

    code = "name_taken"


class Replaced(Refused):
    """A newer connection of the same client has replaced this connection."""

    code = "replaced"


class KeyRemoved(Refused):
    """The configuration no longer accepts this key; the broker closes its connections."""

    code = "key_removed"


class DisconnectedByOperator(Refused):
    """An administrator has disconnected this connection."""

    code = "disconnected"


class RequestFailed(Refused):
    """The other client answered a request with an error; the code is that client's own."""

    code = "failed"


class CallFailed(RequestFailed):
    """The method that a proxy called raised an exception, of a type not known here."""

    code = "raised"

    @property
    def type_name(self) -> str:
        """The name of the exception's type."""
        return str(self).partition(": ")[0]

    @property
    def text(self) -> str:
        """The text of the exception."""
        return str(self).partition(": ")[2]


class NoSuchMethod(RequestFailed):
    """The other client's service has no method of that name; nothing was called."""

    code = "no_such_method"


class WrongArguments(RequestFailed, TypeError):
    """The method does not take these arguments; it was not called."""

    code = "wrong_arguments"


class Disconnected(BrokerdError, ConnectionError):
    """The connection to the broker is lost, or was never made.

    Attributes:
        message_id: The id of the message that was therefore not sent. It is 0 if the
            error is not about a message.
    """

    def __init__(self, message: str, *, message_id: int = 0) -> None:
        super().__init__(message)
        self.message_id = message_id


class InDoubt(Disconnected, OutcomeUnknown):
    """The connection was lost before the outcome of this send was known.

    The message may or may not have been delivered; the library never repeats it.

    Attributes:
        message_id: The id of the message.
    """


class Closed(BrokerdError, OSError):
    """The object was used after its close()."""


class TimedOut(BrokerdError, TimeoutError):
    """The caller's timeout ran out."""


class BufferTooShort(BrokerdError, multiprocessing.BufferTooShort):
    """The buffer given to recv_bytes_into is too small; args[0] is the whole message."""


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
        Cancelled,
        RateLimited,
        Malformed,
        Unsupported,
        ShuttingDown,
        StoreInDoubt,
        StoreFailed,
        NameTaken,
        Replaced,
        KeyRemoved,
        DisconnectedByOperator,
        Elsewhere,
    )
}


def refusal(
    code: str,
    message: str,
    *,
    name: str = "",
    message_id: int = 0,
    seq: int = 0,
    names: tuple[str, ...] = (),
    host: str = "",
    addresses: tuple[str, ...] = (),
) -> Refused:
    """Return the exception for an error code; for an unknown code it is RequestFailed.

    Args:
        code: The error code on the wire.
        message: The text of the error.
        name: The recipient that the error concerns, or "".
        message_id: The id of the refused message, or 0.
        seq: The number of the stored message in its mailbox, or 0.
        names: The mailboxes that the error concerns, if there are several.
        host: The host where the client or mailbox is, for the code ``elsewhere``.
        addresses: Where clients can connect to that host.

    Returns:
        The exception, which is not raised.
    """
    cls = _BY_CODE.get(code)
    if cls is None:
        return RequestFailed(
            message, name=name, message_id=message_id, code=code, seq=seq, names=names
        )
    error = cls(message, name=name, message_id=message_id, seq=seq, names=names)
    if isinstance(error, Elsewhere):
        error.host, error.addresses = host, addresses
    return error
