"""The key that both ends of a connection know, in the forms a caller may give it.

Never shown, never kept elsewhere.
"""

from __future__ import annotations

import contextlib
from multiprocessing import current_process
from typing import TypeAlias

from brokerd_client.errors import InvalidKey

__all__ = ["Key", "chosen_key", "key_bytes"]

Key: TypeAlias = bytes | bytearray | memoryview | str


def key_bytes(key: Key) -> bytes:
    """Return the key as bytes; text is taken as UTF-8. Raises TypeError for what is not
    a key, InvalidKey.

    An empty key authenticates, as in the standard library from Python 3.13 on. Older
    listeners of the standard library take it for no authentication.
    """
    if not isinstance(key, (bytes, bytearray, memoryview, str)):
        raise TypeError(f"authkey should be a byte string or a string, not {type(key).__name__}")
    if not isinstance(key, str):
        return bytes(key)
    # The error about a text that is not valid holds the whole key, and is not to be
    # another error's context either.
    with contextlib.suppress(UnicodeEncodeError):
        return key.encode()
    raise InvalidKey("the key can't be written in UTF-8: give it as bytes")


def chosen_key(authenticate: object, authkey: Key | None) -> bytes | None:
    """Return the key that the two arguments mean, or None for no authentication.

    authenticate: true or false, as in ``processing.connection``; or the key, where the
    caller follows the order of
        ``multiprocessing.connection``, which has the key in its place. The type tells.
    authkey: the key. None with a true ``authenticate`` means the key of the current
    process.
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
