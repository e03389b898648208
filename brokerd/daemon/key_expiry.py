"""The watch over keys: warns before a client's last key expires, and says which keys there are and who uses them.

Names keys by their id, never shows one, and disconnects nobody: a key's time is about being let in
(docs/operations.md, "Keys and rotation").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from brokerd.config.key_validity import ending, let_in_until, state_of
from brokerd.config.model import Config
from brokerd.config.values import ClientConfig, Key
from brokerd.log.api import Log
from brokerd.net.handshake.keyring import Credential, Keyring

__all__ = ["KeyExpiryMonitor", "uses_of"]

#: A warning is repeated after this time.
_AGAIN: Final = timedelta(days=1)
#: The time of day may be set while nobody looks; so somebody looks every hour.
_LOOK_AGAIN: Final = timedelta(hours=1)
#: Clients of which a look says something in an event of their own; the rest is counted.
_LINES: Final = 50
#: Clients that are looked at in one turn of the event loop: some milliseconds' work.
_SLICE: Final = 256


class Timer(Protocol):
    """Something that is to happen, and can be called off."""

    def cancel(self) -> None:
        """Call it off."""


class KeyExpiryMonitor:
    """Looks at the keys of a configuration when it comes into force, when one expires, and every hour.

    log: where warnings go. now: returns the time of day with its zone. call_later: calls a function after so many
    seconds, as an event loop's. credentials: returns the key of each connection there is.
    """

    def __init__(
        self,
        log: Log,
        now: Callable[[], datetime],
        call_later: Callable[[float, Callable[[], None]], Timer],
        credentials: Callable[[], Iterable[Credential]],
    ) -> None:
        self.log = log
        self._call_later = call_later
        self._now = now
        self._credentials = credentials
        self._clients: list[ClientConfig] = []
        self._warned_before = timedelta()
        #: Until when what was said of a client need not be said again.
        self._quiet_until: dict[tuple[str, str], datetime] = {}
        self._seen_at: datetime | None = None
        self._timer: Timer | None = None
        self._lines = 0
        #: How many connections use each key, counted when it is asked for during a look.
        self._using: Counter[tuple[str, bytes]] | None = None

    def watch(self, config: Config, clients: list[ClientConfig] | None = None) -> None:
        """Look at another configuration from now on, and say at once what there is to be said.

        clients: what ``ending`` returns of it, if that is known.
        """
        self._clients = ending(config.clients.values()) if clients is None else clients
        self._warned_before = timedelta(seconds=config.limits.expiry_warning)
        self._quiet_until.clear()
        self._seen_at = None
        self._look()

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expiries(self) -> dict[str, datetime]:
        """Return for each client that will be, or is, without a valid key the moment at which its last one is over.

        Clients whose keys have no end are not in it; so with keys that never expire it is empty.
        """
        now = self._now()
        ends = ((client.name, _last(client, now)) for client in self._clients)
        return {name: key.not_after for name, key in ends if key is not None and key.not_after is not None}

    def _look(self) -> None:
        self.close()
        now = self._now()
        before, self._seen_at = self._seen_at, now
        self._lines = 0
        self._using = None
        self._look_on(0, before, now, now + _LOOK_AGAIN)

    def _look_on(self, start: int, before: datetime | None, now: datetime, upcoming: datetime) -> None:
        """Look at some clients, and at the others in later turns. upcoming: when to look at all of them again."""
        some = self._clients[start : start + _SLICE]
        for client in some:
            self._look_at(client, before, now)
            for key in client.keys:
                if key.not_after is not None and now <= key.not_after < upcoming:
                    upcoming = key.not_after
        start += len(some)
        if start < len(self._clients):
            self._timer = self._call_later(0, lambda: self._look_on(start, before, now, upcoming))
            return
        if self._lines > _LINES:
            self.log.warning("key.expiring_more", count=self._lines - _LINES)
        # A moment later: at its last moment a key is still valid.
        wait = (upcoming - now).total_seconds() + 0.001
        self._timer = self._call_later(wait, self._look)

    def _look_at(self, client: ClientConfig, before: datetime | None, now: datetime) -> None:
        last = _last(client, now)
        for key in client.keys:
            if key is not last and before is not None and key.expired_at(now) and not key.expired_at(before):
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
        if self._using is None:
            self._using = Counter((each.client.name, each.key.value) for each in self._credentials())
        assert key.not_after is not None, "a key without an end does not expire"
        return {
            "name": client.name,
            "key": key.key_id,
            "source": key.source,
            "not_after": key.not_after.isoformat(),
            "connections": self._using[client.name, key.value],
        }


def _last(client: ClientConfig, now: datetime) -> Key | None:
    """Return the key with which the client's time ends or has ended; None where it has no end."""
    if all(key.expired_at(now) for key in client.keys):
        return max(client.keys, key=lambda key: key.not_after or now)
    return let_in_until(client.keys, now)


def uses_of(
    config: Config, keyring: Keyring, credentials: Iterable[Credential], now: datetime
) -> Iterator[dict[str, Any]]:
    """Yield for each client its keys: id, source, window, state, last use and connections. Never a key.

    Times are seconds since the epoch for uses, and text for windows. A client that its user vouches for has one
    entry without an id.
    """
    using = Counter((each.client.name, each.key.value) for each in credentials)
    return (
        {
            "name": client.name,
            "keys": [
                {
                    "id": credential.key.key_id if client.keys else None,
                    "source": credential.key.source,
                    "not_before": _text(credential.key.not_before),
                    "not_after": _text(credential.key.not_after),
                    "state": str(state_of(credential.key, now)),
                    "last_used": keyring.last_used(credential),
                    "connections": using[client.name, credential.key.value],
                }
                for credential in keyring.named(client.name)
            ],
        }
        for client in config.clients.values()
    )


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
