"""Incidents: refusals, drops and disconnects of late, which `brokerctl why` shows.

The core notes log events anyway, and counts what repeats itself. The incidents are made
of these counts, once for each time that they are taken. So a flood of refusals costs
nothing more here. Only a bounded number of incidents is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from brokerd.config.values import ClientConfig, RateConfig, Rule
from brokerd_client.wire.envelope import ErrorCode

if TYPE_CHECKING:
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.log_events import LogEvent
    from brokerd.core.session import Session

__all__ = ["MOST", "MOST_OF_ONE", "Incident", "Incidents"]

#: Most incidents kept for all clients, and for each client. An incident takes up to two
#: KiB: see config.memory_bound.
MOST: Final = 4096
MOST_OF_ONE: Final = 32
#: Most message ids kept per incident, the newest.
_IDS: Final = 16
#: Most characters kept of a reason, and of a rule.
_LONGEST: Final = 300
#: Most patterns of a rule that are shown.
_PATTERNS: Final = 8
#: The log events that are incidents.
_KINDS: Final = frozenset(
    {
        "message.refused",
        "message.dropped",
        "message.unreported",
        "client.slow",
        "client.held",
        "client.unsubscribed",
    }
)
#: The incidents of stored messages, and their codes. Such an event has no session, but
#: the mailbox, and the sender's address as its code.
_OF_MAILBOX: Final = {"mailbox.dead": "dead", "mailbox.expired": "expired"}
#: The incidents whose session is the recipient of a message, not its sender.
_OF_RECIPIENT: Final = frozenset({"message.dropped", "client.slow"})


@dataclass(slots=True)
class Incident:
    """Something that went wrong once or several times.

    Attributes:
        event: The name of the log event.
        sender: The address of the message's sender, or "".
        recipient: The address or topic that it was for, or the client that it happened to.
        code: The reason for programs, or "".
        reason: The reason for people, as it was last.
        rule: The setting that decided, or "".
        where: The place of that setting in the configuration, or "".
        first_at, last_at: Times in seconds since the epoch.
        ids: Ids of the messages, the newest.
        change: The number of its last change, in the order of all changes.
    """

    event: str
    sender: str
    recipient: str
    code: str
    reason: str
    rule: str
    where: str
    first_at: float = 0.0
    last_at: float = 0.0
    times: int = 0
    ids: tuple[int, ...] = ()
    change: int = 0

    def concerns(self, name: str) -> bool:
        """Return whether a client sent the message, should have had it, or was hit."""
        return name in (_name_of(self.sender), _name_of(self.recipient))

    def as_object(self) -> dict[str, Any]:
        """Return the incident as the operation ``why`` shows it."""
        return {
            "event": self.event,
            "sender": self.sender or None,
            "recipient": self.recipient or None,
            "code": self.code or None,
            "reason": self.reason,
            "rule": self.rule or None,
            "where": self.where or None,
            "first": self.first_at,
            "last": self.last_at,
            "count": self.times,
            "ids": list(self.ids),
        }


class Incidents:
    """The last incidents of each client, oldest first."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        #: By client, the one with the newest incident last; each as what makes it
        #: different from other incidents of that client.
        self._kept: OrderedDict[str, OrderedDict[tuple[str, str, str], Incident]] = OrderedDict()
        self._count = 0
        #: The number of the last change of any incident.
        self.last_change = 0

    def __len__(self) -> int:
        return self._count

    def add(self, log_events: Iterable[LogEvent], now_wall: float) -> None:
        """Keep those of the core's log events that are incidents."""
        for event in log_events:
            session, key = event.session, (event.event, event.other, str(event.code))
            if event.event in _OF_MAILBOX:
                owner, code = event.other, _OF_MAILBOX[event.event]
            elif event.event in _KINDS and session is not None:
                owner = session.client.name
            else:
                continue
            incident = self._find(owner, key)
            if incident is None:
                made = (
                    Incident(event.event, event.code, event.other, code, "", "", "")
                    if session is None
                    else self._made_of(event, session)
                )
                incident = self._keep(owner, key, made)
                incident.first_at = now_wall
            incident.reason = event.reason[:_LONGEST]
            incident.ids = (*incident.ids, *event.ids)[-_IDS:]
            self._note(incident, event.times, now_wall)

    def add_disconnect(self, name: str, address: str, reason: str, now_wall: float) -> None:
        """Keep the end of a client's connection."""
        self._add_own("client.disconnected", name, address, reason, now_wall)

    def add_rejection(self, name: str, reason: str, now_wall: float) -> None:
        """Keep a refused connection of a client, or of a peer that claimed to be it."""
        if self._exchange.resolve(name) is not None:
            self._add_own("client.refused", name, name, reason, now_wall)

    def add_refused_channel(
        self,
        caller: str,
        recipient: str,
        code: str,
        reason: str,
        message_id: int,
        now_wall: float,
    ) -> None:
        """Keep an OPEN that was refused. recipient: the name that it was for, or ""."""
        client = self._exchange.resolve(caller)
        if client is None:
            return
        key = ("channel.refused", recipient, code)
        incident = self._find(caller, key)
        if incident is None:
            rule, where = self._rule_of_channel(client, recipient, code)
            new = Incident("channel.refused", caller, recipient, code, "", rule, where, now_wall)
            incident = self._keep(caller, key, new)
        incident.reason = reason[:_LONGEST]
        incident.ids = (*incident.ids, message_id)[-_IDS:]
        self._note(incident, 1, now_wall)

    def _limits_of_mailbox(self, name: str) -> tuple[str, str]:
        """Return the limits of a client's mailbox as a configuration has them."""
        client = self._exchange.resolve(name)
        limits = None if client is None else client.config.mailbox
        if client is None or limits is None:
            return "", ""
        rule = (
            f"mailbox: messages: {limits.messages}, size: {limits.size},"
            f" when_full: {limits.when_full}"
        )
        return rule, str(client.config.source)

    def _rule_of_channel(self, caller: Client, name: str, code: str) -> tuple[str, str]:
        """Return the rules that do not allow a channel, and their place; "" for others."""
        recipient = self._exchange.resolve(name)
        if code != ErrorCode.DENIED:
            return "", ""
        if recipient is None or caller.policy.sending(name) is None:
            return _rules_of(caller.config, "send_to")
        return _rules_of(recipient.config, "open_from")

    def newest(self, name: str, sender: str = "", message_id: int | None = None) -> list[Incident]:
        """Return the incidents that concern a client, the newest first.

        Args:
            sender: Only those of messages from this client.
            message_id: Only those of messages with this id.
        """
        found = [
            incident
            for incidents in self._kept.values()
            for incident in incidents.values()
            if incident.concerns(name)
            and (not sender or _name_of(incident.sender) == sender)
            and (message_id is None or message_id in incident.ids)
        ]
        return sorted(found, key=lambda incident: incident.last_at, reverse=True)

    # Upgrades

    def changed_since(self, change: int) -> list[list[Any]]:
        """Return the incidents with a later change as plain values, oldest change first."""
        found: list[tuple[int, list[Any]]] = []
        # The client, and the incident of each client, that changed last comes first.
        for owner, own in reversed(self._kept.items()):
            before = len(found)
            for key, incident in reversed(own.items()):
                if incident.change <= change:
                    break
                found.append((incident.change, [owner, list(key), *_values(incident)]))
            if len(found) == before:
                break
        return [row for _, row in sorted(found)]

    def restore(self, rows: Iterable[Sequence[Any]]) -> None:
        """Take over incidents that ``changed_since`` returned in another process."""
        for owner, (event, other, code), *values, ids in rows:
            key = (event, other, code)
            if self._find(owner, key) is not None:
                self._remove(owner, key)
            self.last_change += 1
            incident = Incident(*values)
            incident.ids, incident.change = tuple(ids), self.last_change
            self._keep(owner, key, incident)

    def _add_own(self, event: str, name: str, address: str, reason: str, now_wall: float) -> None:
        """Keep an incident of a client's own connection."""
        reason = reason[:_LONGEST]
        key = (event, "", reason)
        incident = self._find(name, key)
        if incident is None:
            incident = self._keep(name, key, Incident(event, "", address, "", reason, "", ""))
            incident.first_at = now_wall
        incident.recipient = address
        self._note(incident, 1, now_wall)

    def _note(self, incident: Incident, times: int, now_wall: float) -> None:
        """Note that an incident has happened."""
        incident.last_at = now_wall
        incident.times += times
        self.last_change += 1
        incident.change = self.last_change

    def _find(self, owner: str, key: tuple[str, str, str]) -> Incident | None:
        """Return an incident of a client, which is its newest from now on; or None."""
        own = self._kept.get(owner)
        if own is None or key not in own:
            return None
        self._kept.move_to_end(owner)
        own.move_to_end(key)
        return own[key]

    def _keep(self, owner: str, key: tuple[str, str, str], incident: Incident) -> Incident:
        """Add an incident, in place of the oldest one where there are too many."""
        own = self._kept.setdefault(owner, OrderedDict())
        self._kept.move_to_end(owner)
        own[key] = incident
        self._count += 1
        if len(own) > MOST_OF_ONE:
            self._drop_oldest(owner)
        elif self._count > MOST:
            self._drop_oldest(next(iter(self._kept)))
        return incident

    def _drop_oldest(self, owner: str) -> None:
        self._remove(owner, next(iter(self._kept[owner])))

    def _remove(self, owner: str, key: tuple[str, str, str]) -> None:
        own = self._kept[owner]
        del own[key]
        self._count -= 1
        if not own:
            del self._kept[owner]

    def _made_of(self, event: LogEvent, session: Session) -> Incident:
        """Return the incident that a log event of a session tells of."""
        address = session.address
        own = session.client.config
        rule = where = ""
        if event.field == "mailbox":
            rule, where = self._limits_of_mailbox(_name_of(event.other))
        elif event.field:
            rule, where = _rules_of(own, event.field)
        elif event.code == ErrorCode.RATE_LIMITED:
            rule, where = f"rate: {_shown(own.rate)}", str(own.source)
        elif event.event in _OF_RECIPIENT or event.code == ErrorCode.FULL:
            other = self._exchange.resolve(_name_of(event.other))
            is_own = event.event in _OF_RECIPIENT or other is None
            config = own if is_own or other is None else other.config
            rule = f"queue: {config.queue}, when_full: {config.when_full}"
            where = str(config.source)
        sender, recipient = (
            (event.other, address) if event.event in _OF_RECIPIENT else (address, event.other)
        )
        return Incident(event.event, sender, recipient, str(event.code), "", rule, where)


def _values(incident: Incident) -> list[Any]:
    """Return the parts of an incident as plain values, without its number."""
    return [
        incident.event,
        incident.sender,
        incident.recipient,
        incident.code,
        incident.reason,
        incident.rule,
        incident.where,
        incident.first_at,
        incident.last_at,
        incident.times,
        list(incident.ids),
    ]


def _rules_of(config: ClientConfig, field: str) -> tuple[str, str]:
    """Return a client's rules of one kind as a configuration has them, and their place."""
    rules: tuple[Rule, ...] = getattr(config, field)
    patterns = [each.pattern for each in rules[:_PATTERNS]]
    more = ["..."] * (len(rules) > _PATTERNS)
    rule = f"{field}: [{', '.join(patterns + more)}]"[:_LONGEST]
    return rule, place_of(rules) or str(config.source)


def place_of(rules: Sequence[Rule]) -> str:
    """Return the place of the first rule in the configuration; "" without rules."""
    if not rules:
        return ""
    return "default" if rules[0].source is None else str(rules[0].source)


def _shown(rate: RateConfig) -> str:
    """Return a rate as a configuration would have it."""
    limits = {"messages": rate.messages, "bytes": rate.bytes}
    return ", ".join(f"{name} {limit:g}/s" for name, limit in limits.items() if limit is not None)


def _name_of(address: str) -> str:
    return address.partition("/")[0]
