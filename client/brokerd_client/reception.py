"""What the broker says to a client, and whom it concerns: outcomes, events, the end of a subscription. No I/O.

Rules: docs/protocol.md, "Order and outcome" and "Topics". An answer is somebody's only if its id and who it comes from,
or is about, fit: see brokerd_client.awaiting.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

from brokerd_client import presence
from brokerd_client.awaiting import Awaiting, Pending, Purpose
from brokerd_client.batch import Batch
from brokerd_client.errors import BrokerdError, Denied, MalformedEnvelope, RequestFailed, refusal
from brokerd_client.incoming import Incoming
from brokerd_client.message import Message, Owner, Receipt
from brokerd_client.routes import Route, Routes
from brokerd_client.wire.envelope import BROKER, Envelope, Kind

__all__ = ["Reception"]

M = TypeVar("M", bound=Message)

_EVENT_KIND: Final = int(Kind.EVENT)


class Reception(Generic[M]):
    """The receiving half of a dialog: who waits for what, and what becomes of it.

    message: the class of what is received.
    """

    def __init__(self, message: type[M]) -> None:
        #: Replies and receipts that came after their caller had given up, and own answers that came too late.
        self.late = 0
        #: Events that fit no subscription any more.
        self.unrouted = 0
        #: Sends that failed and that nobody waited for.
        self.undelivered = 0
        self.awaiting = Awaiting()
        self.routes = Routes()
        self._watches: dict[presence.Watch, list[Route]] = {}
        self._incoming = Incoming(message)

    def _read(self, data: bytes, owner: Owner, batch: Batch[M], now: float) -> None:
        """Take in every whole frame."""

        def other(frame: M | Envelope) -> None:
            if not isinstance(frame, Envelope):
                if frame._kind == _EVENT_KIND:
                    self._on_event(frame, batch)
                else:
                    self._on_reply(frame, batch, now)
            elif frame.kind is Kind.ERROR:
                self._on_error(frame, batch)
            elif frame.kind is Kind.RECEIPT:
                self._on_receipt(frame.id, batch)
            else:
                raise MalformedEnvelope("the broker sends no ACK", frame.id)

        batch.size += self._incoming.read(data, owner, batch.messages, other)

    def _on_event(self, message: M, batch: Batch[M]) -> None:
        routes = self.routes.of(message.topic)
        if not routes:
            self.unrouted += 1
        for route in routes:
            for sink in route.takers():
                if not isinstance(sink, presence.Watch):
                    batch.events.append((sink, message))
                elif (change := sink.event(message.topic)) is not None:
                    batch.events.append((sink.sink, change))

    def _on_receipt(self, id: int, batch: Batch[M]) -> None:
        pending = self.awaiting.get(id)
        if pending is None or pending.purpose is not Purpose.RECEIPT:
            self.late += 1
            return
        self.awaiting.pop(id)
        batch.outcomes.append((pending.waiter, Receipt(id, pending.to or pending.about)))

    def _on_reply(self, message: M, batch: Batch[M], now: float) -> None:
        pending = self.awaiting.get(message.id)
        if pending is None or pending.purpose is Purpose.RECEIPT or not pending.answered_by(message.sender):
            self.late += 1
            return
        self.awaiting.pop(message.id)
        if pending.purpose is Purpose.REQUEST:
            batch.outcomes.append((pending.waiter, message))
            return
        answer = _json_object(message.body)
        if answer is None:
            raise MalformedEnvelope("the broker's answer is no JSON object", message.id)
        if pending.purpose is Purpose.WHOAMI:
            self._on_introduction(answer, now)
        elif pending.purpose in (Purpose.WATCH, Purpose.RESYNC):
            self._on_snapshot(pending.sink, answer, batch)
        if pending.waiter is not None:
            batch.outcomes.append((pending.waiter, answer))

    def _on_snapshot(self, watch: presence.Watch, answer: dict[str, Any], batch: Batch[M]) -> None:
        try:
            changes = watch.snapshot(presence.client_list(answer))
        except (KeyError, TypeError) as error:
            raise MalformedEnvelope("the broker's list of clients is none") from error
        if watch in self._watches:
            batch.events += [(watch.sink, change) for change in changes]

    def _on_error(self, envelope: Envelope, batch: Batch[M]) -> None:
        said = _json_object(envelope.payload) or {}
        code, text, name = (str(said.get(field, "")) for field in ("code", "message", "name"))
        pending = self.awaiting.get(envelope.id)
        if envelope.name != BROKER:
            if pending is None or pending.purpose is not Purpose.REQUEST or not pending.answered_by(envelope.name):
                self.late += 1
                return
            self.awaiting.pop(envelope.id)
            # The broker's codes are the broker's to say: a client's error is a failed request whatever it says.
            failed = RequestFailed(text, name=envelope.name, id=envelope.id, code=code or None)
            batch.outcomes.append((pending.waiter, failed))
            return
        error = refusal(code, text or code, name=name, id=envelope.id)
        if pending is None or not pending.concerned_by(name):
            if code == Denied.code and self._has_answered(envelope.id):
                # The requester has its outcome, or has left: nothing was lost.
                self.late += 1
                return
            self.undelivered += 1
            batch.undelivered.append(error)
            return
        self.awaiting.pop(envelope.id)
        self._on_refusal(pending, error, batch)

    def _on_refusal(self, pending: Pending, error: BrokerdError, batch: Batch[M]) -> None:
        """The broker has said no to this one."""
        self._forget_subscription(pending)
        if pending.purpose is Purpose.WHOAMI:
            batch.broken = error
        elif pending.purpose is Purpose.RESUBSCRIBE:
            assert pending.route is not None
            self._end(list(pending.route.sinks), pending.route, error, batch)
        elif pending.purpose is Purpose.RESYNC:
            self._end([pending.sink], None, error, batch)
        elif pending.waiter is not None:
            batch.outcomes.append((pending.waiter, error))

    def _end(self, sinks: Sequence[object], route: Route | None, error: BrokerdError, batch: Batch[M]) -> None:
        """Tell the sinks that there will be nothing more."""
        for sink in sinks:
            if not isinstance(sink, presence.Watch):
                assert route is not None
                self.routes.discard(route, sink)
                batch.ended.append((sink, error))
            elif sink in self._watches:
                self._drop_watch(sink)
                batch.ended.append((sink.sink, error))

    def _forget_subscription(self, pending: Pending) -> None:
        """Undo it here; the broker needs not be told."""
        if pending.purpose is Purpose.SUBSCRIBE:
            assert pending.route is not None
            self.routes.discard(pending.route, pending.sink)
        elif pending.purpose is Purpose.WATCH:
            self._drop_watch(pending.sink)

    def _drop_watch(self, watch: presence.Watch) -> None:
        for route in self._watches.pop(watch, ()):
            self.routes.discard(route, watch)

    def _has_answered(self, id: int) -> bool:
        """Return whether the id is not one of this client's own, so that only an answer can have had it."""
        raise NotImplementedError

    def _on_introduction(self, answer: dict[str, Any], now: float) -> None:
        """The broker has said who we are."""
        raise NotImplementedError


def _json_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object in the bytes, or None where there is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
