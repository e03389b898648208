"""Key expiry: warnings before a client's last key expires, and a report on keys and
their use.

Keys are named by their id and never shown. An expired key disconnects no client: a
key's validity matters only in the handshake (docs/operations.md, "Keys and rotation").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from structlog.typing import FilteringBoundLogger

from brokerd.config.key_validity import ending, let_in_until, state_of
from brokerd.config.model import Config
from brokerd.config.values import ClientConfig, Key
from brokerd.net.handshake.keyring import Credential, Keyring

__all__ = ["KeyExpiryMonitor", "uses_of"]

#: Time after which a warning is repeated.
_AGAIN: Final = timedelta(days=1)
#: Longest time between two checks: the time of day may be changed between them.
_LOOK_AGAIN: Final = timedelta(hours=1)
#: Clients per check that get a log event of their own; the rest is counted.
_LINES: Final = 50
#: Clients that are checked per turn of the event loop: some milliseconds' work.
_SLICE: Final = 256


class Timer(Protocol):
    """A scheduled call that can be cancelled."""

    def cancel(self) -> None:
        """Cancel the call."""


class KeyExpiryMonitor:
    """Checks a configuration's keys when it is loaded, when a key expires, and every
    hour.

    Args:
        log: Where warnings go.
        now: Returns the time of day with its zone.
        call_later: Calls a function after a delay in seconds, as an event loop's does.
        credentials: Returns the key that each connection of a client used.
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        now: Callable[[], datetime],
        call_later: Callable[[float, Callable[[], None]], Timer],
        credentials: Callable[[str], Iterable[Credential]],
    ) -> None:
        self.log = log
        self._call_later = call_later
        self._now = now
        self._credentials = credentials
        self._clients: list[ClientConfig] = []
        self._warned_before = timedelta()
        #: Until when a warning about a client is not repeated, by event and client.
        self._quiet_until: dict[tuple[str, str], datetime] = {}
        self._seen_at: datetime | None = None
        self._timer: Timer | None = None
        self._lines = 0

    def watch(self, config: Config, clients: list[ClientConfig] | None = None) -> None:
        """Check another configuration from now on, and log the first warnings at once.

        clients: the result of ``ending`` for it, if that is known.
        """
        self._clients = ending(config.clients.values()) if clients is None else clients
        self._warned_before = timedelta(seconds=config.limits.expiry_warning)
        self._quiet_until.clear()
        self._seen_at = None
        self._look()

    def close(self) -> None:
        """Stop checking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expiries(self) -> dict[str, datetime]:
        """Return, by client, the moment at which its last key expires or has expired.

        Clients whose keys have no end are not included; with keys that never expire it
        is empty.
        """
        now = self._now()
        ends = ((client.name, _last(client, now)) for client in self._clients)
        return {
            name: key.not_after
            for name, key in ends
            if key is not None and key.not_after is not None
        }

    def _look(self) -> None:
        self.close()
        now = self._now()
        before, self._seen_at = self._seen_at, now
        self._lines = 0
        self._look_on(0, before, now, now + _LOOK_AGAIN)

    def _look_on(
        self, start: int, before: datetime | None, now: datetime, upcoming: datetime
    ) -> None:
        """Check some clients now, and the rest in later turns.

        upcoming: when to check all of them again.
        """
        part = self._clients[start : start + _SLICE]
        for client in part:
            self._look_at(client, before, now)
            for key in client.keys:
                if key.not_after is not None and now <= key.not_after < upcoming:
                    upcoming = key.not_after
        start += len(part)
        if start < len(self._clients):
            self._timer = self._call_later(0, lambda: self._look_on(start, before, now, upcoming))
            return
        if self._lines > _LINES:
            self.log.warning("key.expiring_more", count=self._lines - _LINES)
        # A moment later: in its last moment a key is still valid.
        wait = (upcoming - now).total_seconds() + 0.001
        self._timer = self._call_later(wait, self._look)

    def _look_at(self, client: ClientConfig, before: datetime | None, now: datetime) -> None:
        last = _last(client, now)
        for key in client.keys:
            if (
                key is not last
                and before is not None
                and key.expired_at(now)
                and not key.expired_at(before)
            ):
                self.log.info("key.expired", **self._fields(client, key), last=False)
        if last is None or last.not_after is None:
            return
        if last.expired_at(now):
            self._say("key.expired", client, last, now, last=True)
        elif last.not_after - now <= self._warned_before:
            self._say("key.expiring", client, last, now)

    def _say(self, event: str, client: ClientConfig, key: Key, now: datetime, **more: Any) -> None:
        if now < self._quiet_until.get((event, client.name), now):
            return
        self._quiet_until[event, client.name] = now + _AGAIN
        self._lines += 1
        if self._lines <= _LINES:
            self.log.warning(event, **more, **self._fields(client, key))

    def _fields(self, client: ClientConfig, key: Key) -> dict[str, Any]:
        assert key.not_after is not None, "a key without an end does not expire"
        return {
            "name": client.name,
            "key": key.key_id,
            "source": key.source,
            "not_after": key.not_after.isoformat(),
            "connections": sum(
                credential.key.value == key.value for credential in self._credentials(client.name)
            ),
        }


def _last(client: ClientConfig, now: datetime) -> Key | None:
    """Return the key that expires or expired last; None if the client's keys have no
    end.
    """
    if all(key.expired_at(now) for key in client.keys):
        return max(client.keys, key=lambda key: key.not_after or now)
    return let_in_until(client.keys, now)


def uses_of(
    config: Config,
    keyring: Keyring,
    credentials: Callable[[str], Iterable[Credential]],
    now: datetime,
) -> Iterator[dict[str, Any]]:
    """Yield for each client its keys: id, source, window, state, last use and
    connections.

    Never the key itself. Times are seconds since the epoch for uses, and text for
    windows. A client authenticated by its operating-system user has one entry without
    an id.

    credentials: returns the key that each connection of a client used.
    """
    for client in config.clients.values():
        using = Counter(credential.key.value for credential in credentials(client.name))
        yield {
            "name": client.name,
            "keys": [
                {
                    "id": credential.key.key_id if client.keys else None,
                    "source": credential.key.source,
                    "not_before": _text(credential.key.not_before),
                    "not_after": _text(credential.key.not_after),
                    "state": str(state_of(credential.key, now)),
                    "last_used": keyring.last_used(credential),
                    "connections": using[credential.key.value],
                }
                for credential in keyring.named(client.name)
            ],
        }


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
