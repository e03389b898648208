"""XmlListener and XmlClient: objects travel as XML-RPC values, not as pickles.

Only numbers, text, lists, dictionaries and None can be sent. Receiving a value runs no
code that the peer chooses.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from brokerd_client.connection.client import Client
from brokerd_client.connection.listener import Listener
from brokerd_client.connection.stream import Connection
from brokerd_client.errors import UndecodablePayload

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["XmlClient", "XmlConnection", "XmlListener"]


class XmlConnection:
    """A connection whose send and recv use XML; the rest is the connection's own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        if name == "_connection":  # not yet set
            raise AttributeError(name)
        return getattr(self._connection, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()

    def send(self, obj: Any) -> None:
        """Send an object.

        Args:
            obj: A value of XML-RPC.

        Raises:
            TypeError: XML-RPC has no such type.
            OverflowError: The number is too large for XML-RPC.
            OSError: The connection is closed or broken.
        """
        # Not at the top of the module: it imports http and ssl, which takes long.
        import xmlrpc.client

        self._connection.send_bytes(xmlrpc.client.dumps((obj,), allow_none=True).encode())

    def recv(self) -> Any:
        """Return the next object.

        Raises:
            UndecodablePayload: The message is not one value of XML-RPC. The next call
                returns the next message.
            EOFError: As Connection.recv_bytes.
            OSError: As Connection.recv_bytes.
        """
        return _decoded(self._connection.recv_bytes())


def _decoded(data: bytes) -> Any:
    import xml.parsers.expat
    import xmlrpc.client

    if b"<!DOCTYPE" in data:
        # Entities declared in a document type could grow to gigabytes.
        raise UndecodablePayload(
            "the message declares a document type, which a value of XML-RPC never does"
        )
    try:
        values, method = xmlrpc.client.loads(data.decode())
        if method is not None:
            raise ValueError("a method call")
        (obj,) = values
    # The errors of the standard library's parser for malformed XML. None of them is an
    # OSError.
    except (
        xml.parsers.expat.ExpatError,
        xmlrpc.client.Error,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UndecodablePayload(f"the message is not a value of XML-RPC: {error}") from error
    return obj


class XmlListener(Listener):
    """A Listener whose connections speak XML."""

    def accept(self, timeout: float | None = None) -> XmlConnection:  # type: ignore[override]
        """Return the next connection.

        Args:
            timeout: Seconds to wait; None for no limit.

        Raises:
            TimedOut: No connection was ready in time.
            Closed: As Listener.accept.
            AuthenticationError: As Listener.accept.
        """
        return XmlConnection(super().accept(timeout))


def XmlClient(*args: Any, **kwargs: Any) -> XmlConnection:  # noqa: N802 - the standard library's name
    """Connect to an XmlListener; the parameters, results and errors are Client's."""
    return XmlConnection(Client(*args, **kwargs))
