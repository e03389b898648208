"""Whose key made an answer: the identity behind a handshake.

An answer with a name is checked against that client's keys only. Without one the keys are tried, most
recently used first, within a limit; a search is a sequence of small slices, so that the one who runs it
can let others go first. Source: docs/protocol.md, "Identity".
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Final, cast

from brokerd.config.values import ClientConfig, Key
from brokerd.net.handshake.tls import NO_TLS, TlsPeer
from brokerd_client.wire.channel_binding import BROKER, CLIENT, bound_key
from brokerd_client.wire.handshake import Proof

__all__ = ["SLICE", "Credential", "Identity", "KeySearch", "Keyring", "key_on"]

#: Keys tried before others get their turn: some 60 microseconds of work.
SLICE: Final = 32


@dataclass(frozen=True, slots=True)
class Credential:
    """One key of one client."""

    client: ClientConfig
    key: Key


#: What is tried in the place of a key that is not there. It has no client: nobody can ever have made an answer with it.
_NOBODYS: Final = Credential(cast("ClientConfig", None), Key(os.urandom(32)))


@dataclass(frozen=True, slots=True)
class Identity:
    """What a search found.

    credential: whose key made the answer, or None. refusal: why it may not be used, or "".
    """

    credential: Credential | None = None
    refusal: str = ""

    @property
    def accepted(self) -> Credential | None:
        """The credential, if it may be used."""
        return None if self.refusal else self.credential


class Keyring:
    """All keys, in the order of their last use."""

    def __init__(self, clients: Iterable[ClientConfig], limit: int = 1000) -> None:
        #: Most recently used last: that is the cheap end of an OrderedDict to move to.
        self._order: OrderedDict[bytes, Credential] = OrderedDict()
        self._by_client: dict[str, list[Credential]] = {}
        for client in clients:
            self._by_client[client.name] = [Credential(client, key) for key in client.keys or [_public(client)]]
        # Until they are used, those that the file names first are tried first.
        for credentials in reversed(self._by_client.values()):
            self._order.update((credential.key.value, credential) for credential in reversed(credentials))
        self.limit = limit
        #: When each key last let somebody in since the broker started, in seconds since the epoch; the latest last.
        self._last_used: dict[tuple[str, bytes], float] = {}
        #: Every named search tries as many keys as the client with the most keys has: those of its own, and then
        #: keys of nobody, so that neither the time nor the path taken says anything about the name.
        self._nobodys = [_NOBODYS] * max(map(len, self._by_client.values()), default=1)

    def __len__(self) -> int:
        return len(self._order)

    def candidates(self, limit: int) -> Iterator[bytes]:
        """Yield keys to try, most recently used first; not to be used across a change of the order."""
        return islice(reversed(self._order), limit)

    def owner(self, key: bytes) -> Credential:
        """Return whose key it is; it is one of the candidates."""
        return self._order[key]

    def named(self, name: str) -> list[Credential]:
        """Return the keys of one client."""
        return self._by_client.get(name, [])

    def tried_for(self, name: str) -> list[Credential]:
        """Return what to try for a name: equally many keys for every name, known or not."""
        credentials = self._by_client.get(name, self._nobodys)
        return credentials + self._nobodys[len(credentials) :]

    def adopt_uses(self, other: Keyring) -> None:
        """Know of the uses of another keyring, and try keys in their order; those never used come last."""
        for (name, value), when in other._last_used.items():
            if any(each.key.value == value for each in self.named(name)):
                self._last_used[name, value] = when
                self._order.move_to_end(value)

    def moments(self) -> dict[tuple[str, bytes], float]:
        """Return when each key last let somebody in, to be given to ``uses`` later."""
        return dict(self._last_used)

    def uses(self, before: Mapping[tuple[str, bytes], float] | None = None) -> list[tuple[str, str, float]]:
        """Return (client's name, id of the key, when it last let somebody in) of keys used, the latest one first.

        before: uses from before that are left out.
        """
        if not before:
            found = ((each, self.last_used(each)) for each in reversed(self._order.values()))
            return [(each.client.name, each.key.key_id, when) for each, when in found if when is not None]
        uses: list[tuple[str, str, float]] = []
        for (name, value), when in reversed(self._last_used.items()):
            if before.get((name, value)) == when:
                break
            uses += [(name, each.key.key_id, when) for each in self.named(name) if each.key.value == value]
        return uses

    def take_uses(self, uses: Iterable[tuple[str, str, float]]) -> None:
        """Know of what ``uses`` of another keyring returned, as ``adopt_uses`` does."""
        for name, key_id, when in reversed(list(uses)):
            credential = self.find(name, key_id)
            if credential is not None:
                self.used(credential)
                self.let_in(credential, when)

    def find(self, name: str, key_id: str) -> Credential | None:
        """Return the client's key of that id, or None."""
        return next((each for each in self.named(name) if each.key.key_id == key_id), None)

    def holds(self, credential: Credential) -> bool:
        """Return whether the key still belongs to the client of that name."""
        return any(each.key.value == credential.key.value for each in self.named(credential.client.name))

    def let_in(self, credential: Credential, now_wall: float) -> None:
        """Note that the key has let somebody in. now_wall: in seconds since the epoch."""
        used = credential.client.name, credential.key.value
        self._last_used.pop(used, None)
        self._last_used[used] = now_wall

    def last_used(self, credential: Credential) -> float | None:
        """Return when the key last let somebody in, None for not since the broker started."""
        return self._last_used.get((credential.client.name, credential.key.value))

    def used(self, credential: Credential) -> None:
        """Have the key tried first from now on."""
        if credential.key.value in self._order:
            self._order.move_to_end(credential.key.value)


class KeySearch:
    """The search for the key that made one answer.

    allow_md5: whether the listener allows HMAC-MD5 for every client. uid: the user at the other end of a
    Unix socket, None elsewhere. now: the time of day, for the keys' windows. channel: how the peer came, and what its
    key is bound to.
    """

    __slots__ = ("_allow_md5", "_channel", "_now", "_proof", "_rest", "_ring", "_uid", "tried")

    def __init__(
        self,
        ring: Keyring,
        proof: Proof,
        *,
        allow_md5: bool,
        uid: int | None,
        now: datetime,
        tls_peer: TlsPeer = NO_TLS,
    ) -> None:
        self._ring = ring
        self._proof = proof
        self._allow_md5 = allow_md5
        self._uid = uid
        self._now = now
        self._channel = tls_peer
        self._rest: list[bytes] | None = None
        self.tried = 0

    def step(self) -> Identity | None:
        """Try some keys; return what was found, or None if there are more to try."""
        if self._proof.name:
            return self._among_named()
        if self._rest is None:
            batch = list(self._ring.candidates(min(SLICE, self._ring.limit)))
        else:
            batch, self._rest = self._rest[:SLICE], self._rest[SLICE:]
        bound = self._channel.bound
        position = self._proof.maker([key_on(self._channel, key, CLIENT) for key in batch] if bound else batch)
        if position is not None:
            self.tried += position + 1
            return self._judge(self._ring.owner(batch[position]))
        self.tried += len(batch)
        if self._rest is None:
            self._rest = list(self._ring.candidates(self._ring.limit))[SLICE:]
        return None if self._rest else Identity(refusal="unknown key")

    def _among_named(self) -> Identity:
        """Try a name's keys: all of them, and always equally many."""
        found: Credential | None = None
        for credential in self._ring.tried_for(self._proof.name.decode(errors="replace")):
            self.tried += 1
            if (
                self._proof.made_with(key_on(self._channel, credential.key.value, CLIENT))
                and credential is not _NOBODYS
            ):
                found = credential
        return Identity(refusal="wrong key for the name it gave") if found is None else self._judge(found)

    def _judge(self, credential: Credential) -> Identity:
        client = credential.client
        if not credential.key.valid_at(self._now):
            return Identity(credential, "the key is outside its not_before and not_after")
        if self._proof.digest == "md5" and not (self._allow_md5 or client.allow_md5):
            return Identity(credential, "it can only do HMAC-MD5: set allow_md5 for the client or the listener")
        if client.peer_uid is not None and self._uid not in client.peer_uid:
            return Identity(credential, "it does not come from a Unix socket and a user named in peer_uid")
        refusal = self._channel.refusal(client)
        if refusal:
            return Identity(credential, refusal)
        self._ring.used(credential)
        return Identity(credential)


def key_on(tls_peer: TlsPeer, key: bytes, direction: str = BROKER) -> bytes:
    """Return the key with which CLIENT or BROKER answers on the channel."""
    kind = tls_peer.bound
    return bound_key(key, kind, tls_peer.bindings[kind], direction) if kind else key


def _public(client: ClientConfig) -> Key:
    """Return the key of a client that needs none: its name, which is no secret. Its user is what counts."""
    return Key(client.name.encode(), source="the name; peer_uid says who may use it")
