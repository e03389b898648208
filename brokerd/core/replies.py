"""The broker's own frames to a session: answers, refusals and receipts.

This is the lowest part of the broker that writes to sessions. Delivery, events and
operations use it, and it calls none of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from brokerd.core.log_events import LogEvents
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
)
from brokerd_client.wire.framing import frame as make_frame
from brokerd_client.wire.layout import ACK_FLAG, RECEIPT_FLAG

if TYPE_CHECKING:
    from brokerd.core.requests import Requests
    from brokerd.core.session import Session

__all__ = ["OUTCOME_RESERVE", "Replies"]

#: Bytes of the broker's own answers that may wait for one client beyond its queue
#: quota. A client with more waiting than that is not read from.
OUTCOME_RESERVE: Final = 256 * 1024
#: Kinds that answer a request.
_ANSWERS: Final = (Kind.REPLY, Kind.ERROR)


class Replies:
    """The broker's answers to sessions, and the counts of what it refused.

    Attributes:
        touched: Sessions with bytes to write, or to be closed.
        log_events: Events to write to the log.
        refused: Refusals by error code.
        dropped: Messages dropped without a report.
        returned: Messages left by closed sessions: ``reported`` to their senders,
            ``passed_on`` to other pool members, or ``lost``.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.touched: list[Session] = []
        self.log_events = LogEvents()
        self.refused: Counter[str] = Counter()
        self.dropped = 0
        self.returned: Counter[str] = Counter()

    def touch(self, session: Session) -> None:
        """List the session in ``touched``, to have it written to or closed."""
        if not session.outbox.touched:
            session.outbox.touched = True
            self.touched.append(session)

    def close(
        self, session: Session, reason: str, *, cut: bool = False, code: ErrorCode | None = None
    ) -> None:
        """Mark the session to be closed once its outbox is written.

        cut: close it at once, whether its outbox is written or not.
        code: the code of an ERROR with the id 0 that its client receives last.
        """
        if not session.closing:
            session.closing_code = code
        session.closing = session.closing or reason
        session.cut = session.cut or cut
        self.touch(session)

    def pass_on(self, target: Session, frame: bytes) -> None:
        """Queue a whole frame for a session, whatever its quota is."""
        target.outbox.append(frame)
        self.touch(target)

    def answer(self, source: Session, envelope: Envelope) -> None:
        """Send the broker's own frame to a session."""
        if source.open and not source.mute:
            self.pass_on(source, make_frame(encode(envelope)))

    def confirm(self, source: Session, message_id: int) -> None:
        """Send a RECEIPT to a session."""
        self.answer(source, Envelope(Kind.RECEIPT, message_id, BROKER))

    def reply(self, source: Session, message_id: int, reply: Mapping[str, Any]) -> None:
        """Send the REPLY to an operation."""
        self.reply_json(source, message_id, json.dumps(reply).encode())

    def reply_json(self, source: Session, message_id: int, payload: bytes) -> None:
        """Send the REPLY to an operation. payload: a JSON object."""
        self.answer(source, Envelope(Kind.REPLY, message_id, BROKER, payload, codec=CodecId.JSON))

    def refuse(
        self, source: Session, message_id: int, code: ErrorCode, message: str, name: str = ""
    ) -> None:
        """Send an ERROR to a session. name: the recipient that it is about."""
        if source.mute:
            # The message cannot be delivered, and its sender cannot be told.
            if name != BROKER:
                self.lose(source, name, code, message)
            return
        self.refused[code] += 1
        source.errors_in += 1
        self.log_events.note("message.refused", source, name, code, message)
        payload = error_payload(code, message, name)
        self.answer(source, Envelope(Kind.ERROR, message_id, BROKER, payload, codec=CodecId.JSON))

    def malformed(self, source: Session, message_id: int, message: str) -> RoutingResult:
        """Refuse a malformed frame; close its connection once the ERROR is written."""
        self.refuse(source, message_id, ErrorCode.MALFORMED, message)
        self.close(source, "malformed")
        return RoutingResult.CLOSE

    def refuse_frame(
        self,
        source: Session,
        envelope: Envelope,
        code: ErrorCode,
        message: str,
        name: str | None = None,
    ) -> RoutingResult:
        """Send the sender of a frame an ERROR about it.

        An ERROR frame that cannot be delivered is not answered by another ERROR, unless
        its sender asked for a receipt. The requester that waits for a refused answer
        receives an ERROR as well.
        """
        self.fail_request(source, envelope.kind, envelope.name, envelope.id, code, message)
        if envelope.kind is Kind.ERROR and not envelope.flags & RECEIPT_FLAG:
            self.drop(source, envelope.name, code, f"an ERROR that cannot be delivered: {message}")
        else:
            self.refuse(source, envelope.id, code, message, envelope.name if name is None else name)
        return RoutingResult.CONSUMED

    def fail_request(
        self,
        answerer: Session,
        kind: int,
        requester: str,
        message_id: int,
        code: ErrorCode,
        message: str,
    ) -> None:
        """End the request whose answer was refused, and send its requester an ERROR.

        kind: of the refused frame, which may not be an answer.
        """
        if kind not in _ANSWERS:
            return
        session = answerer.incoming_requests.get((requester, message_id))
        if session is not None:
            self._requests.end(session, message_id, answerer)
            reason = f"the answer of {answerer.address} was refused: {message}"
            self.refuse(session, message_id, code, reason, answerer.address)

    def revoke(
        self, holder: Session, requester: Session, message_id: int, code: ErrorCode, message: str
    ) -> None:
        """Tell the connection that holds a request that the request is over.

        A connection that has not asked for it, or that does not read, is not told.
        """
        if holder.cancels and not (holder.finished or self.reads_nothing(holder)):
            payload = error_payload(code, message, holder.address)
            self.answer(
                holder,
                Envelope(
                    Kind.ERROR,
                    message_id,
                    requester.address,
                    payload,
                    codec=CodecId.JSON,
                    flags=ACK_FLAG,
                ),
            )

    def drop(self, session: Session, other: str, code: str, reason: str) -> None:
        """Count a message that is dropped without a report, and log it."""
        self.dropped += 1
        self.log_events.note("message.dropped", session, other, code, reason)

    def lose(self, session: Session, other: str, code: str, reason: str) -> None:
        """Drop a message that was to be returned to its sender."""
        self.returned["lost"] += 1
        self.drop(session, other, code, reason)

    @property
    def reserve(self) -> int:
        """Bytes of the broker's answers that may wait for a client beyond its queue."""
        return OUTCOME_RESERVE

    def reads_nothing(self, source: Session) -> bool:
        """Return whether more waits for a client than queue and reserve allow."""
        return source.outbox.waiting > source.outbox.limit + OUTCOME_RESERVE
