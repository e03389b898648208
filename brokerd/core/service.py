"""The broker as a client: the `$broker` operations.

Each is a REQUEST whose payload is a JSON object ``{"op": NAME, ...}``; its REPLY is a JSON object, a
refusal an ERROR (docs/protocol.md, "Operations"). An operation is a function that returns the reply;
one that returns None is answered later, by the daemon.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.config.values import Rule
from brokerd.core.parting import DRAINING, part
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    check_pattern,
    is_name,
    split_address,
)

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.session import Session

__all__ = ["PROTOCOL_VERSION", "reply_to", "serve", "stats"]

PROTOCOL_VERSION: Final = 1

#: Longest operation, in bytes of JSON: some milliseconds' work, where what one message may hold would be seconds'.
_LARGEST: Final = 128 * 1024
#: Clients that are listed in the time that a frame takes.
_CLIENTS: Final = 32
#: Tokens of a pattern for which the tree of subscriptions grows, or is cut, in that time.
_TOKENS: Final = 16
#: Searches under way that are told of a subscription in that time.
_SEARCHES: Final = 4
#: Connections that are described in that time.
_CONNECTIONS: Final = 4
#: More than any name, address, topic or pattern has. What is longer is not looked at, and repeated nowhere.
_LONGEST: Final = 255

_Arguments: TypeAlias = dict[str, Any]
_Operation: TypeAlias = "Callable[[Broker, Session, int, _Arguments], _Arguments | None]"


class _Refusal(Exception):
    """An operation says no."""

    def __init__(self, code: ErrorCode, message: str, name: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name


def serve(broker: Broker, source: Session, request: Envelope, payload: bytes) -> None:
    """Carry out one request to ``$broker`` and answer it."""
    try:
        op, arguments = _read(payload)
        operation = _OPEN.get(op)
        if operation is None and op in _ADMIN:
            if not source.client.policy.admin:
                raise _Refusal(ErrorCode.DENIED, f"the operation {op} is for clients with admin: true", BROKER)
            operation = _ADMIN[op]
            whom = arguments.get("address")
            broker.happenings.note("admin.asked", source, whom[:_LONGEST] if isinstance(whom, str) else "", op)
        if operation is None:
            known = ", ".join(sorted((*_OPEN, *_ADMIN)))
            raise _Refusal(ErrorCode.UNSUPPORTED, f"there is no operation {op[:64]!r}: {known}", BROKER)
        reply = operation(broker, source, request.id, arguments)
    except _Refusal as refusal:
        broker.refuse(source, request.id, refusal.code, str(refusal), refusal.name)
    else:
        if reply is not None:
            reply_to(broker, source, request.id, reply)


def reply_to(broker: Broker, source: Session, id: int, reply: _Arguments) -> None:
    """Send the REPLY to an operation."""
    payload = json.dumps(reply).encode()
    broker.answer(source, Envelope(Kind.REPLY, id, BROKER, payload, codec=CodecId.JSON))


def _read(payload: bytes) -> tuple[str, _Arguments]:
    if len(payload) > _LARGEST:
        message = f"an operation of {len(payload)} bytes; $broker takes at most {_LARGEST}"
        raise _Refusal(ErrorCode.UNSUPPORTED, message, BROKER)
    try:
        arguments = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise _Refusal(
            ErrorCode.UNSUPPORTED, "an operation is a JSON object with an op; this is no JSON", BROKER
        ) from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get("op"), str):
        raise _Refusal(ErrorCode.UNSUPPORTED, 'an operation is a JSON object such as {"op": "whoami"}', BROKER)
    return arguments.pop("op"), arguments


def _text(arguments: _Arguments, key: str) -> str:
    value = arguments.get(key)
    if not isinstance(value, str) or len(value) > _LONGEST:
        message = f"the operation needs {key}, a string of at most {_LONGEST} characters"
        raise _Refusal(ErrorCode.UNSUPPORTED, message, BROKER)
    return value


# Open to everyone


def _whoami(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    return {
        "name": source.client.name,
        "address": source.address,
        "version": broker.version,
        "protocol": PROTOCOL_VERSION,
        "limits": {"max_message": broker.limits.max_message, "queue": source.client.config.queue},
    }


def _ping(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    return {}


def _clients(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    may_see = source.client.policy.sending
    broker.spend(len(broker.exchange.clients) // _CLIENTS)
    return {
        "clients": [
            {"name": client.name, "online": client.online, "since": client.changed_at}
            for client in broker.exchange.clients.values()
            if may_see(client.name) is not None
        ]
    }


def _subscription(broker: Broker, arguments: _Arguments) -> tuple[str, str | None]:
    topic, group = _text(arguments, "topic"), arguments.get("group")
    broker.spend(topic.count(".") // _TOKENS + broker.topics.searches // _SEARCHES)
    try:
        check_pattern(topic)
    except InvalidName as error:
        raise _Refusal(ErrorCode.UNSUPPORTED, str(error), BROKER) from error
    if group is not None and not (isinstance(group, str) and is_name(group)):
        raise _Refusal(ErrorCode.UNSUPPORTED, "a group is named as a client is", BROKER)
    return topic, group


def _subscribe(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    topic, group = _subscription(broker, arguments)
    if source.retired:
        raise _Refusal(ErrorCode.SHUTTING_DOWN, "the broker closes this connection", BROKER)
    if source.client.policy.subscribing(topic) is None:
        raise _Refusal(ErrorCode.DENIED, f"{source.client.name} may not subscribe to {topic}", BROKER)
    config = source.client.config
    if len(source.subscriptions) >= config.subscriptions and (topic, group) not in source.subscriptions:
        message = f"no more than {config.subscriptions} subscriptions (clients.{config.name}.subscriptions)"
        raise _Refusal(ErrorCode.FULL, message, BROKER)
    broker.topics.add(topic, source, group)
    source.subscriptions.add((topic, group))
    return {"topic": topic, "group": group}


def _unsubscribe(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    topic, group = _subscription(broker, arguments)
    broker.topics.discard(topic, source, group)
    source.subscriptions.discard((topic, group))
    return {"topic": topic, "group": group}


def _goaway(broker: Broker, source: Session, id: int, arguments: _Arguments) -> None:
    source.goaway = True
    reply_to(broker, source, id, {})
    if broker.draining:
        part(broker, source)


def _finished(broker: Broker, source: Session, id: int, arguments: _Arguments) -> None:
    if not (source.goaway and source.told):
        raise _Refusal(ErrorCode.UNSUPPORTED, f"{DRAINING} and goaway come before finished", BROKER)
    if source.finishing is not None:
        raise _Refusal(ErrorCode.UNSUPPORTED, "finished has been asked already", BROKER)
    source.finishing = id
    broker.finishing[source] = None


# For clients with admin: true


def _stats(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    return stats(broker)


def stats(broker: Broker) -> _Arguments:
    """Return the broker's counters since it started."""
    sessions = list(broker.exchange.sessions())
    sums = {
        counter: broker.totals[counter] + sum(getattr(session, counter) for session in sessions)
        for counter in ("messages_in", "bytes_in", "messages_out", "bytes_out")
    }
    return {
        "version": broker.version,
        "routing": broker.routing,
        "started_at": broker.started_at,
        "upgrades": broker.upgrades,
        "draining": broker.draining,
        "clients": len(broker.exchange.clients),
        "online": sum(client.online for client in broker.exchange.clients.values()),
        "connections": len(sessions),
        "subscriptions": len(broker.topics),
        "waiting_bytes": sum(session.outbox.waiting for session in sessions),
        "dropped": broker.dropped,
        "refused": dict(broker.refused),
        **sums,
    }


def _connections(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    sessions = list(broker.exchange.sessions())
    broker.spend(len(sessions) // _CONNECTIONS)
    return {
        "connections": [
            {
                "address": session.address,
                "name": session.client.name,
                "peer": session.peer,
                "since": session.since,
                "messages_in": session.messages_in,
                "bytes_in": session.bytes_in,
                "messages_out": session.messages_out,
                "bytes_out": session.bytes_out,
                "errors": session.errors_in,
                "waiting_bytes": session.outbox.waiting,
                "queue": session.outbox.limit,
                "slow": session.outbox.blocked,
                "held": session.held_by is not None,
                "subscriptions": len(session.subscriptions),
                "owed": len(session.owed),
            }
            for session in sessions
        ]
    }


def _disconnect(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    address = _text(arguments, "address")
    name, instance = split_address(address)
    session = broker.exchange.find(address)
    client = broker.exchange.resolve(name)
    if client is None:
        raise _Refusal(ErrorCode.NO_SUCH_CLIENT, f"there is no client {address}", address)
    found = [session] if session is not None else [] if instance else list(client.sessions.values())
    if not found:
        raise _Refusal(ErrorCode.OFFLINE, f"{address} is not connected", address)
    for each in found:
        broker.close(each, f"disconnected by {source.client.name}")
    return {"disconnected": [each.address for each in found]}


def _can(broker: Broker, source: Session, id: int, arguments: _Arguments) -> _Arguments:
    sender, verb, target = (_text(arguments, key) for key in ("sender", "verb", "target"))
    client = broker.exchange.resolve(sender)
    if client is None:
        raise _Refusal(ErrorCode.NO_SUCH_CLIENT, f"there is no client {sender}", sender)
    policy = client.policy
    if verb == "send" and target == BROKER:
        return {"allowed": True, "rule": None, "where": None, "why": "everyone may ask the broker"}
    if verb == "publish" and target.startswith("$"):
        why = "topics that begin with $ are the broker's own"
        return {"allowed": False, "rule": None, "where": None, "why": why}
    if verb == "send":
        rule, rules = policy.sending(target.partition("/")[0]), client.config.send_to
        if rule is not None and broker.exchange.resolve(target.partition("/")[0]) is None:
            return {"allowed": False, "rule": None, "where": None, "why": f"there is no client {target}"}
    elif verb == "publish":
        rule, rules = policy.publishing(target), client.config.publish
    elif verb == "subscribe":
        rule, rules = policy.subscribing(target), client.config.subscribe
    else:
        raise _Refusal(ErrorCode.UNSUPPORTED, "verb is send, publish or subscribe", BROKER)
    if rule is not None:
        return {"allowed": True, "rule": rule.pattern, "where": _where(rule), "why": f"{rule.pattern} allows it"}
    given = ", ".join(each.pattern for each in rules) or "nothing"
    where = _where(rules[0]) if rules else None
    return {"allowed": False, "rule": None, "where": where, "why": f"none of its rules matches: {given}"}


def _where(rule: Rule) -> str:
    return "default" if rule.source is None else str(rule.source)


def _reload(broker: Broker, source: Session, id: int, arguments: _Arguments) -> None:
    if not isinstance(arguments.get("dry_run", False), bool):
        raise _Refusal(ErrorCode.UNSUPPORTED, "dry_run is true or false", BROKER)
    broker.order("reload", source, id, arguments)


def _order(op: str) -> _Operation:
    def order(broker: Broker, source: Session, id: int, arguments: _Arguments) -> None:
        broker.order(op, source, id, arguments)

    return order


_OPEN: Final[dict[str, _Operation]] = {
    "whoami": _whoami,
    "ping": _ping,
    "clients": _clients,
    "subscribe": _subscribe,
    "unsubscribe": _unsubscribe,
    "goaway": _goaway,
    "finished": _finished,
}
_ADMIN: Final[dict[str, _Operation]] = {
    "stats": _stats,
    "connections": _connections,
    "disconnect": _disconnect,
    "can": _can,
    "keys": _order("keys"),
    "reload": _reload,
    "upgrade": _order("upgrade"),
    "drain": _order("drain"),
    "log_level": _order("log_level"),
}
