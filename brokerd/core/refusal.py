"""A refused operation, and the checks of arguments that several operations share."""

from __future__ import annotations

from typing import Any, Final

from brokerd_client.wire.envelope import BROKER, ErrorCode

__all__ = ["LONGEST", "Refusal", "text_of"]

#: Most characters per argument: more than any name, address, topic or pattern has. A
#: longer argument is neither examined nor repeated in an answer or the log.
LONGEST: Final = 255


class Refusal(Exception):
    """A refused operation.

    Attributes:
        code: The code of the ERROR.
        name: The name that it is about, or "".
        topic: The topic that it is about, or "".
        field: The rules that do not allow the operation, by their name in the entry.
        host, addresses: Where it is possible, for the code ``elsewhere``.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        name: str = "",
        *,
        topic: str = "",
        field: str = "",
        host: str = "",
        addresses: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.name = name
        self.topic = topic
        self.field = field
        self.host = host
        self.addresses = addresses


def text_of(arguments: dict[str, Any], key: str) -> str:
    """Return a text among the arguments. Raises Refusal if it is not one."""
    value = arguments.get(key)
    if not isinstance(value, str) or len(value) > LONGEST:
        message = f"the operation needs {key}, a string of at most {LONGEST} characters"
        raise Refusal(ErrorCode.UNSUPPORTED, message, BROKER)
    return value
