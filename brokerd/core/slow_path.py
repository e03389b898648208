"""The slow path: the handling of every frame that leaves the routing loop.

Such a frame is too long, too short, malformed, not whole yet, or for the broker to
judge. Both routing loops call it, so that they treat these frames alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from brokerd.core.routing_result import RoutingResult
from brokerd_client.errors import BadLength
from brokerd_client.wire.envelope import is_address
from brokerd_client.wire.framing import frame_span
from brokerd_client.wire.layout import EVENT_KIND, HEADER, MAX_TOPIC

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.session import Session

__all__ = ["handle_slow_path"]

_HEADER_SIZE: Final = HEADER.size
#: Bytes by which an EVENT may exceed max_message: its topic and the topic's length byte
#: do not count as payload.
_TOPIC_ALLOWANCE: Final = 1 + MAX_TOPIC
# Until Python 3.12, reading a member of an enumeration takes as long as ten attributes.
_CONSUMED: Final = RoutingResult.CONSUMED
_CLOSE: Final = RoutingResult.CLOSE


def handle_slow_path(
    broker: Broker, source: Session, buffer: memoryview, position: int, end: int, now: float
) -> tuple[int, RoutingResult]:
    """Handle the one frame at ``position``; return the same pair as feed does."""
    if not broker.turn.budget:
        return position, RoutingResult.YIELD
    broker.turn.budget -= 1
    try:
        span = frame_span(buffer, position, end)
    except BadLength as error:
        return end, broker.replies.malformed(source, 0, str(error))
    if span is None:
        return _await_rest(broker, position)
    first, size = span
    stop = first + size
    if size < _HEADER_SIZE:
        return end, broker.replies.malformed(
            source, 0, f"a broker frame has at least {_HEADER_SIZE} bytes; this one has {size}"
        )
    if end - first < _HEADER_SIZE:
        return _await_rest(broker, position)
    kind, _, _, name_size, message_id = HEADER.unpack_from(buffer, first)
    payload = size - _HEADER_SIZE - name_size
    if payload - (_TOPIC_ALLOWANCE if kind == EVENT_KIND else 0) > broker.status.limits.max_message:
        name_end = first + _HEADER_SIZE + name_size
        if end < name_end:
            return _await_rest(broker, position)
        name = str(buffer[first + _HEADER_SIZE : name_end], "ascii", "replace")
        result = broker.too_large(
            source, kind, message_id, name if is_address(name) else "", payload
        )
        if result is not RoutingResult.CONSUMED:
            return position, result
        position = min(stop, end)
        source.bytes_to_skip = stop - position
        return position, RoutingResult.CONSUMED
    if stop > end:
        return _await_rest(broker, position)
    result = broker.handle(source, buffer[first:stop], now)
    is_over = result is _CONSUMED or result is _CLOSE
    return (stop if is_over else position), result


def _await_rest(broker: Broker, position: int) -> tuple[int, RoutingResult]:
    """Leave a frame that has not arrived whole; it takes nothing of the turn."""
    broker.turn.budget += 1
    return position, _CONSUMED
