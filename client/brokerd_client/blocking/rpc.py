"""Calls of methods over requests: a proxy of another client's service, and its handler.

A part of the blocking face; the rules of calls are in :mod:`brokerd_client._common.rpc`.
"""

# Written by .ci/blocking_face.py from aio/rpc.py: change that file, and run `make faces`.
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from brokerd_client._common.rpc import Interface, Service, call_failure, call_payload
from brokerd_client.blocking.subscriptions import Message
from brokerd_client.errors import NoSuchMethod, RequestFailed, WrongArguments
from brokerd_client.wire.envelope import check_address

if TYPE_CHECKING:
    from brokerd_client.blocking.client import Client

__all__ = ["Proxy", "serve"]


class Proxy:
    """A stand-in for another client's service: its methods are called over the broker.

    A call sends a request and returns the result, or raises the exception of the method.
    docs/rpc.md describes the rest.
    """

    def __init__(
        self, client: Client, to: str, interface: Interface, timeout: float | None
    ) -> None:
        self._client = client
        self._to = check_address(to)
        self._interface = interface
        self._timeout = timeout

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{name!r} is not public, so no service serves it")
        self._interface.check(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            payload, extension = call_payload(name, args, kwargs)
            try:
                reply = self._client.request(
                    self._to, payload, timeout=self._timeout, extension=extension
                )
            except RequestFailed as failed:
                error = self._interface.error(failed)
                if error is failed:
                    raise
                raise error from failed
            return reply.payload

        return call

    def __repr__(self) -> str:
        return f"<Proxy of {self._to!r}>"


def serve(service: Service, request: Message) -> object:
    """Call the method that a request names; return its result."""
    try:
        method, args, kwargs = service.find(request)
    except (NoSuchMethod, WrongArguments) as error:
        request.fail(str(error), error.code)
        return None
    with service.serving(request):
        try:
            return method(*args, **kwargs)
        except service.raises as error:
            request.fail(*call_failure(error))
            return None
