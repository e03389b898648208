"""Calls of another client's methods: a service's side, and a proxy's side.

A call is a request: its extension names the method, and its payload holds the
arguments. The proxies and handlers of both faces use this module, which does no I/O.
docs/rpc.md describes the calls.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partialmethod
from typing import Any, Final

from brokerd_client.errors import (
    CallFailed,
    NoSuchMethod,
    RequestFailed,
    UndecodablePayload,
    WrongArguments,
    WrongUse,
)
from brokerd_client.message import Message

__all__ = ["Interface", "Service", "call_failure", "call_payload", "current_request", "is_call"]

#: The key of a call's extension that names the method.
_METHOD: Final = "rpc.method"
#: Characters of an exception's text that are sent.
_MAX_TEXT: Final = 10_000
#: Built-in exceptions that a proxy raises by their name. Those that end iterations would
#: end the caller's.
_BUILT_IN: Final[Mapping[str, type[Exception]]] = {
    name: cls
    for name, cls in vars(builtins).items()
    if isinstance(cls, type)
    and issubclass(cls, Exception)
    and not issubclass(cls, (StopIteration, StopAsyncIteration))
}
#: The errors of a proxy's calls, by their codes.
_BY_CODE: Final[Mapping[str, type[RequestFailed]]] = {
    cls.code: cls for cls in (CallFailed, NoSuchMethod, WrongArguments)
}

_request: ContextVar[Message] = ContextVar("brokerd_client.rpc.request")


def current_request() -> Message:
    """Return the request whose method runs now.

    It has the caller's authenticated name (``sender``), ``cancelled`` and ``deadline``.

    Raises:
        WrongUse: The calling code was not called by a service.
    """
    request = _request.get(None)
    if request is None:
        raise WrongUse("no current request: this code was not called by a service")
    return request


def is_call(request: Message) -> bool:
    """Return whether a request is a call of a method."""
    return request.extension is not None and _METHOD in request.extension


def call_payload(
    method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, str]]:
    """Return the payload and the extension of the request that calls a method."""
    return [list(args), kwargs], {_METHOD: method}


def call_failure(error: BaseException) -> tuple[str, str]:
    """Return the text and the code of the answer to a call that raised this."""
    kind = type(error).__name__
    # The text of a KeyError would have quotes around it, and get more in the caller.
    text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
    return f"{kind}: {text[:_MAX_TEXT]}", CallFailed.code


class Service:
    """The methods that a client serves.

    Args:
        allow_async: Whether a method may be a coroutine function.
        methods: Each method by its name, with its signature.
        raises: Exceptions that are answers and not failures; they are not logged.
    """

    def __init__(
        self,
        *,
        allow_async: bool,
        methods: Mapping[str, tuple[Callable[..., Any], inspect.Signature]] | None = None,
        raises: tuple[type[Exception], ...] = (),
    ) -> None:
        self._allow_async = allow_async
        self._methods = methods or {}
        self.raises = raises

    def extended(
        self, target: Any, methods: Iterable[str] | None, raises: Iterable[type[Exception]]
    ) -> Service:
        """Return a service with more methods.

        Args:
            target: An object, a class, which is instantiated, or a function.
            methods: The names to serve; None for the public methods that the body of the
                class defines.
            raises: Exceptions that are answers and not failures.

        Returns:
            The new service; the present service is not changed.

        Raises:
            TypeError: The target has no such method, or none.
            ValueError: A name begins with an underscore, or is served already.
        """
        declared = _exceptions(raises).values()
        found: dict[str, Any]
        if inspect.isroutine(target):
            found = {target.__name__: target}
        else:
            served = target() if inspect.isclass(target) else target
            names = _public_methods(type(served)) if methods is None else _listed(methods)
            found = {name: getattr(served, name, None) for name in names}
        added = {}
        for name, method in found.items():
            if not name.isidentifier() or name.startswith("_"):
                raise ValueError(f"{name!r} can't be served: give it a public name")
            if name in self._methods:
                raise ValueError(f"a method {name!r} is served already")
            if not callable(method) or inspect.isclass(method):
                raise TypeError(f"{target!r} has no method {name!r}")
            if inspect.iscoroutinefunction(method) and not self._allow_async:
                raise TypeError(
                    f"{name} is a coroutine function, and this client is blocking: connect an"
                    " asyncio client"
                )
            added[name] = (method, inspect.signature(method))
        if not added:
            raise TypeError(
                f"{target!r} has no public method of its own: give a class, an object or a"
                " function, and methods= for inherited methods"
            )
        return Service(
            allow_async=self._allow_async,
            methods={**self._methods, **added},
            raises=(*self.raises, *declared),
        )

    def find(self, request: Message) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        """Return the method that a request calls, and its arguments.

        Raises:
            NoSuchMethod: No method of that name is served.
            WrongArguments: The method does not take these arguments.
        """
        name = (request.extension or {}).get(_METHOD)
        found = self._methods.get(name) if isinstance(name, str) else None
        if found is None:
            raise NoSuchMethod(
                f"no method is named {name!r:.80}; this service has"
                f" {', '.join(sorted(self._methods))}"
            )
        method, signature = found
        try:
            args, kwargs = _arguments(request.payload)
            signature.bind(*args, **kwargs)
        except (TypeError, UndecodablePayload) as error:
            raise WrongArguments(f"{name}(): {error}") from error
        return method, args, kwargs

    @contextmanager
    def serving(self, request: Message) -> Iterator[None]:
        """Make a request the current one."""
        token = _request.set(request)
        try:
            yield
        finally:
            _request.reset(token)


class Interface:
    """The methods of a service as a proxy knows them, and the exceptions that it raises.

    Args:
        methods: A class with the methods; None if they are not known.
        raises: Exceptions that are raised by the names of their types, beside built-in
            ones.
    """

    def __init__(self, methods: object, raises: Iterable[type[Exception]]) -> None:
        self._methods = methods
        self._raises = {**_BUILT_IN, **_exceptions(raises)}

    def check(self, name: str) -> None:
        """Raise AttributeError if the interface does not have that method."""
        if self._methods is not None and not callable(getattr(self._methods, name, None)):
            raise AttributeError(
                f"{getattr(self._methods, '__name__', self._methods)} has no method {name!r}"
            )

    def error(self, failed: RequestFailed) -> Exception:
        """Return the exception to raise for the error that answered a call."""
        cls = _BY_CODE.get(failed.code)
        if cls is None:
            # The answer of a handler, or of the library.
            return failed
        error = cls(str(failed), name=failed.name, message_id=failed.message_id)
        if isinstance(error, CallFailed) and error.type_name in self._raises:
            # A constructor that takes other arguments may raise anything.
            with suppress(Exception):
                return self._raises[error.type_name](error.text)
        return error


def _arguments(payload: object) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call. Raises TypeError if the payload holds something else."""
    if isinstance(payload, list) and len(payload) == 2:
        args, kwargs = payload
        if isinstance(args, list) and isinstance(kwargs, dict):
            return args, kwargs
    raise TypeError("the payload of a call is [[argument, ...], {name: argument, ...}]")


def _exceptions(classes: Iterable[type[Exception]]) -> dict[str, type[Exception]]:
    """Return exception classes by name. Raises TypeError if they are something else."""
    found: dict[str, type[Exception]] = {}
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, Exception)):
            raise TypeError(f"raises takes classes of exceptions, not {cls!r:.80}")
        found[cls.__name__] = cls
    return found


def _listed(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError("methods takes several names: give a list, even for a single name")
    return list(names)


def _public_methods(cls: type) -> list[str]:
    """Return the names of the public methods that the body of the class defines."""
    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and not inspect.isclass(value)
        and (callable(value) or isinstance(value, (staticmethod, classmethod, partialmethod)))
    ]
