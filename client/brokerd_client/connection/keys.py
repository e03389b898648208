"""The key that both ends of a connection know, in the forms that a caller may give it.

A key is never shown, and never stored elsewhere.
"""

from __future__ import annotations

import contextlib
from multiprocessing import current_process
from typing import Union

from brokerd_client.errors import InvalidKey

__all__ = ["Key", "choose_key", "key_bytes"]

Key = Union[bytes, bytearray, memoryview, str]


def key_bytes(key: Key) -> bytes:
    """Return the key as bytes; text is encoded in UTF-8.

    An empty key authenticates, as in the standard library from Python 3.13 on. With an
    empty key, older listeners of the standard library do not authenticate.

    Raises:
        TypeError: It is not text or a bytes-like object.
        InvalidKey: The text can't be written in UTF-8.
    """
    if not isinstance(key, (bytes, bytearray, memoryview, str)):
        raise TypeError(f"authkey should be a byte string or a string, not {type(key).__name__}")
    if not isinstance(key, str):
        return bytes(key)
    # A UnicodeEncodeError holds the whole key, so it must not become the context of
    # another error either.
    with contextlib.suppress(UnicodeEncodeError):
        return key.encode()
    raise InvalidKey("the key can't be written in UTF-8: give it as bytes")


def choose_key(authenticate: object, authkey: Key | None) -> bytes | None:
    """Return the key that the two arguments mean, or None for no authentication.

    Args:
        authenticate: True or false, as in ``processing.connection``. It may also be the
            key, which has this place in ``multiprocessing.connection``.
        authkey: The key. None with a true ``authenticate`` means the key of the current
            process.

    Raises:
        TypeError: Two keys were given, or an argument has the wrong type.
        InvalidKey: The key is text that can't be written in UTF-8.
    """
    if isinstance(authenticate, (bytes, bytearray, memoryview, str)):
        if authkey is not None:
            raise TypeError(
                "two keys given: one in the place of `authenticate` and one as `authkey`"
            )
        return key_bytes(authenticate)
    if authenticate is not None and not isinstance(authenticate, int):
        raise TypeError(
            f"authenticate should be true, false or a key, not {type(authenticate).__name__}"
        )
    if authkey is not None:
        return key_bytes(authkey)
    return key_bytes(current_process().authkey) if authenticate else None
