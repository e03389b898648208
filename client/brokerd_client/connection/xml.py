"""XmlListener and XmlClient: objects travel as XML-RPC values, not as pickles.

What can be sent is less (numbers, text, lists, dictionaries, None), and receiving it
runs nothing the peer says.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from brokerd_client.connection.client import Client
from brokerd_client.connection.listener import Listener
from brokerd_client.connection.stream import Connection
from brokerd_client.errors import UndecodablePayload

__all__ = ["XmlClient", "XmlConnection", "XmlListener"]


class XmlConnection:
    """A connection whose send and recv speak XML; all else is the connection's own."""

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
        """Send an object. Raises TypeError or OverflowError where XML-RPC has no such
        value.
        """
        # Here, not above: it brings the whole of http and ssl, which those who send no
        # XML need not wait for.
        import xmlrpc.client

        self._connection.send_bytes(xmlrpc.client.dumps((obj,), allow_none=True).encode())

    def recv(self) -> Any:
        """Return the next object.

        Raises UndecodablePayload: the message is not one value of XML-RPC; the
        connection goes on with the next one. Else as Connection.recv_bytes.
        """
        return _decoded(self._connection.recv_bytes())


def _decoded(data: bytes) -> Any:
    import xml.parsers.expat
    import xmlrpc.client

    if b"<!DOCTYPE" in data:
        # XML-RPC needs none. Entities declared in one could grow to gigabytes.
        raise UndecodablePayload(
            "the message declares a document type, as no value of XML-RPC does"
        )
    try:
        values, method = xmlrpc.client.loads(data.decode())
        if method is not None:
            raise ValueError("a method call")
        (obj,) = values
    # What the standard library's parser raises for XML of strange forms; none of it is
    # an OSError.
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
        """Return the next connection, as Listener.accept."""
        return XmlConnection(super().accept(timeout))


def XmlClient(*args: Any, **kwargs: Any) -> XmlConnection:  # noqa: N802 - the standard library's name
    """Return a connection that speaks XML; the parameters are Client's."""
    return XmlConnection(Client(*args, **kwargs))
