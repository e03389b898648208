"""JSON for values of more types: dates, times, dataclasses, and types of the users' own.

A client that is given a :class:`JsonCodec` sends such values as tagged JSON objects. A
client with the same types in its codec gets equal values of the same types back. Only
registered types are made from received bytes: nothing is unpickled, and no class is
looked up by a received name.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final, NamedTuple, TypeVar, cast
from uuid import UUID

from brokerd_client.errors import PayloadError, UndecodablePayload

__all__ = ["JsonCodec"]

T = TypeVar("T")

#: The two keys of a tagged object, and the name of a dict that is written as pairs.
_TYPE: Final = "$type"
_VALUE: Final = "value"
_DICT: Final = "dict"
#: Types of values that JSON carries unchanged and that hold no other values.
_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_TEXT: Final = frozenset({str})
_to_text: Final = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False
).encode


class _Type(NamedTuple):
    """A registered type: its name in JSON, and the functions from and to its values."""

    name: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]


class JsonCodec:
    """The types of values that a client sends as JSON beside JSON's own.

    It knows date, datetime, time, timedelta, Decimal, UUID, bytes, tuple, set and
    frozenset, and dicts whose keys are not text. Other types have to be registered, at
    both ends. Pass it to ``connect(codec=...)``. Several clients may share it.
    """

    def __init__(self) -> None:
        self._types: dict[type[Any], _Type] = {}
        self._decoders: dict[str, Callable[[Any], object]] = {_DICT: dict}
        self.register(date, encode=date.isoformat, decode=date.fromisoformat)
        self.register(datetime, encode=datetime.isoformat, decode=datetime.fromisoformat)
        self.register(time, encode=time.isoformat, decode=time.fromisoformat)
        self.register(timedelta, encode=_from_timedelta, decode=lambda parts: timedelta(*parts))
        self.register(Decimal, encode=str, decode=Decimal)
        self.register(UUID, encode=str, decode=UUID)
        self.register(bytes, encode=_from_bytes, decode=_to_bytes)
        self.register(tuple, encode=list, decode=tuple)
        self.register(set, encode=list, decode=set)
        self.register(frozenset, encode=list, decode=frozenset)

    def register(
        self,
        cls: type[T],
        /,
        *,
        name: str | None = None,
        encode: Callable[[T], object] | None = None,
        decode: Callable[[Any], T] | None = None,
    ) -> type[T]:
        """Register a type; can be used as a decorator of a dataclass or an Enum.

        Values of a subclass are not values of this type: register each class. A dataclass
        travels as its fields, and its constructor is called with them. An Enum's member
        travels as its name.

        Args:
            cls: The class.
            name: Its name in JSON, the same at both ends; None for the class's own name.
            encode: Returns a value that JSON or this codec can write. Needed for classes
                that are neither dataclasses nor Enums.
            decode: Returns the value of the class from what ``encode`` has returned. It
                has to check it, because the peer may send anything.

        Returns:
            The class.

        Raises:
            TypeError: The class is not a dataclass or Enum, and encode or decode is missing.
            ValueError: The class is registered already, or another class of that name is.
        """
        if (encode is None) is not (decode is None):
            raise TypeError("give both encode and decode, or neither")
        name = cls.__name__ if name is None else name
        if cls in self._types or cls in _SCALARS or cls in (dict, list):
            raise ValueError(f"{cls.__name__} is known already: a type is registered once")
        if name in self._decoders:
            raise ValueError(f"a type with the name {name!r} is registered already: give name=")
        if encode is None or decode is None:
            encode, decode = _converters(cls)
        self._types[cls] = _Type(name, encode, decode)
        self._decoders[name] = decode
        return cls

    def encode(self, payload: object) -> bytes:
        """Return a payload as JSON.

        Args:
            payload: A value of JSON's or this codec's types, of any depth.

        Returns:
            The JSON, in UTF-8.

        Raises:
            PayloadError: The payload holds a value that neither JSON nor a registered type
                carries unchanged.
        """
        try:
            return _to_text(self._tagged(payload)).encode()
        # UnicodeEncodeError, a ValueError: a lone surrogate has no UTF-8.
        except (ValueError, RecursionError) as error:
            raise PayloadError(f"the payload can't be written as JSON ({error})") from error

    def decode(self, body: bytes) -> Any:
        """Return the payload that :meth:`encode` has written.

        Args:
            body: The JSON.

        Returns:
            The payload.

        Raises:
            UndecodablePayload: The body is not JSON, or holds a type that is not
                registered. Or a type refuses its value.
        """
        try:
            return json.loads(body, object_hook=self._restored)
        # RecursionError: json raises it for deep nesting.
        except (ValueError, RecursionError) as error:
            raise UndecodablePayload(
                "the payload is not valid JSON, although its codec is JSON"
            ) from error

    def _tagged(self, value: Any) -> object:
        """Return a value that JSON can write, with its registered types tagged."""
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is list:
            # The usual items are found by one call of C code, not by a loop.
            if _SCALARS.issuperset(map(type, value)):
                return value
            return [self._tagged(item) for item in value]
        if kind is dict:
            if not _TEXT.issuperset(map(type, value)) or _TYPE in value:
                pairs = [[self._tagged(key), self._tagged(item)] for key, item in value.items()]
                return {_TYPE: _DICT, _VALUE: pairs}
            if _SCALARS.issuperset(map(type, value.values())):
                return value
            return {key: self._tagged(item) for key, item in value.items()}
        registered = self._types.get(kind)
        if registered is None:
            raise PayloadError(
                f"a value of type {kind.__name__} is not JSON, and its type is not registered in"
                f" the client's codec: convert it, or call codec.register({kind.__name__}, ...)"
                " at both ends"
            )
        try:
            inner = registered.encode(value)
        except Exception as error:
            # A user's function may raise anything.
            raise PayloadError(
                f"a {kind.__name__} can't be encoded: {type(error).__name__}: {error}"
            ) from error
        return {_TYPE: registered.name, _VALUE: self._tagged(inner)}

    def _restored(self, read: dict[str, Any]) -> object:
        """Return the value of a tagged object; other objects are returned as they are."""
        if len(read) != 2 or _TYPE not in read or _VALUE not in read:
            return read
        name = read[_TYPE]
        decode = self._decoders.get(name) if isinstance(name, str) else None
        if decode is None:
            raise UndecodablePayload(
                f"the payload has the type {name!r:.80}, which is not registered in this client's"
                " codec: register it as its sender does; .body holds the bytes"
            )
        try:
            return decode(read[_VALUE])
        except Exception as error:
            # A user's function may raise anything, for a peer may send anything.
            raise UndecodablePayload(
                f"a value of the type {name!r:.80} can't be restored: {type(error).__name__}"
            ) from error


def _converters(cls: type[T]) -> tuple[Callable[[T], object], Callable[[Any], T]]:
    """Return the functions from and to the values of a dataclass or an Enum."""
    if issubclass(cls, Enum):
        return lambda member: member.name, lambda name: cls[name]
    if not is_dataclass(cls):
        raise TypeError(
            f"{cls.__name__} is neither a dataclass nor an Enum: give encode= and decode="
        )
    names = [each.name for each in fields(cls)]
    if names != list(inspect.signature(cls).parameters):
        raise TypeError(
            f"the constructor of {cls.__name__} does not take exactly its fields: give encode="
            " and decode="
        )
    return (
        lambda value: {name: getattr(value, name) for name in names},
        lambda values: cast("T", cls(**values)),
    )


def _from_timedelta(value: timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _from_bytes(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _to_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
