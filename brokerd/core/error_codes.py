"""The code in the payload of an ERROR that a client sends."""

from __future__ import annotations

import json
from typing import Final

from brokerd_client.wire.envelope import ErrorCode

__all__ = ["BACK", "code_of", "is_cancel"]

#: The code with which a pool member returns a request that it has not begun.
BACK: Final = "back"
#: Most bytes of a payload that is examined for its code: some microseconds' work.
_LARGEST: Final = 4096


def code_of(payload: memoryview) -> str:
    """Return the code in the payload of an ERROR; "" if it has none."""
    if len(payload) > _LARGEST:
        return ""
    try:
        fields = json.loads(bytes(payload))
    except (ValueError, RecursionError):
        return ""
    code = fields.get("code") if isinstance(fields, dict) else None
    return code if isinstance(code, str) else ""


def is_cancel(payload: memoryview) -> bool:
    """Return whether an ERROR to the broker cancels a request."""
    return code_of(payload) == ErrorCode.CANCELLED
