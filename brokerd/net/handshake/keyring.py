"""The keyring: finds the key that made a handshake's answer, and so the client's
identity.

An answer with a name is checked against that client's keys only. Without a name, the
keys are tried, most recently used first, within a limit. A search is a sequence of
small slices, so that the caller can do other work in between. Source: docs/protocol.md,
"Identity".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Final, cast

from brokerd.config.values import ClientConfig, Key
from brokerd.net.handshake import key_search
from brokerd.net.handshake.tls import NO_TLS, TlsPeer
from brokerd_client.wire.channel_binding import BROKER, CLIENT, bound_key
from brokerd_client.wire.handshake import Proof

__all__ = ["Credential", "Identity", "KeySearch", "Keyring", "key_on"]

#: Keys tried in one slice of a search that ``key_search`` can't do: those of digests
#: other than SHA-256, and keys bound to a channel.
_SLICE: Final = 32


@dataclass(frozen=True, slots=True)
class Credential:
    """One key of one client.

    prepared: the key in the form that ``key_search`` needs; b"" outside of a keyring.
    """

    client: ClientConfig
    key: Key
    prepared: bytes = field(default=b"", repr=False, compare=False)


def _credential(client: ClientConfig, key: Key) -> Credential:
    return Credential(client, key, key_search.prepare(key.value))


#: Tried in the place of a missing key. It has no client, because no answer can ever
#: have been made with it.
_NOBODYS: Final = _credential(cast("ClientConfig", None), Key(os.urandom(32)))


@dataclass(unsafe_hash=True, slots=True)
class Identity:
    """The result of a search.

    credential: the credential whose key made the answer, or None.
    refusal: why the credential may not be used, or "".
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
        #: By prepared key, most recently used last. A dict is listed in less than half the
        #: time of an OrderedDict, and a search without a name lists a thousand keys.
        self._order: dict[bytes, Credential] = {}
        self._by_client: dict[str, list[Credential]] = {}
        for client in clients:
            self._by_client[client.name] = [
                _credential(client, key) for key in client.keys or [_public(client)]
            ]
        # Until keys are used, those that the file names first are tried first.
        for credentials in reversed(self._by_client.values()):
            for credential in reversed(credentials):
                self._order[credential.prepared] = credential
        self.limit = limit
        #: When each key last authenticated a connection since the broker started, in
        #: seconds since the epoch; the latest last.
        self._last_used: dict[tuple[str, bytes], float] = {}
        #: Every search by name tries as many keys as the client with the most keys has.
        #: After the client's own keys it tries random keys without a client. So neither
        #: the time nor the code path reveals anything about the name.
        self._nobodys = [_NOBODYS] * max(map(len, self._by_client.values()), default=1)

    def __len__(self) -> int:
        return len(self._order)

    def candidates(self, start: int, stop: int) -> list[bytes]:
        """Return prepared keys to try, most recently used first: a part of the list."""
        return list(islice(reversed(self._order), start, stop))

    def owner(self, prepared: bytes) -> Credential:
        """Return the credential of a prepared key, which is one of the candidates."""
        return self._order[prepared]

    def named(self, name: str) -> list[Credential]:
        """Return the credentials of one client."""
        return self._by_client.get(name, [])

    def tried_for(self, name: str) -> list[Credential]:
        """Return the credentials to try for a name: equally many for every name, known
        or not.
        """
        credentials = self._by_client.get(name, self._nobodys)
        return credentials + self._nobodys[len(credentials) :]

    def adopt_uses(self, other: Keyring) -> None:
        """Copy the uses of another keyring and the order of its keys; unused keys come
        last.

        A second call copies only the uses since the first one, which takes no time.
        """
        since: list[tuple[tuple[str, bytes], float]] = []
        # One call copies the uses, so that this can be done in a thread.
        for used, when in reversed(other.moments().items()):
            if self._last_used.get(used) == when:
                break
            since.append((used, when))
        for (name, value), when in reversed(since):
            self._last_used.pop((name, value), None)
            if any(credential.key.value == value for credential in self.named(name)):
                self._last_used[name, value] = when
                self._move_to_end(key_search.prepare(value))

    def credentials(self) -> list[list[Credential]]:
        """Return the credentials of each client."""
        return list(self._by_client.values())

    def moments(self) -> dict[tuple[str, bytes], float]:
        """Return when each key last authenticated a connection, as an argument for
        ``uses``.
        """
        return dict(self._last_used)

    def uses(
        self, before: Mapping[tuple[str, bytes], float] | None = None
    ) -> list[tuple[str, str, float]]:
        """Return (client's name, id of the key, time of last use) of used keys, latest
        first.

        before: uses that it contains are left out.
        """
        if not before:
            last_uses = (
                (credential, self.last_used(credential))
                for credential in reversed(self._order.values())
            )
            return [
                (credential.client.name, credential.key.key_id, when)
                for credential, when in last_uses
                if when is not None
            ]
        uses: list[tuple[str, str, float]] = []
        for (name, value), when in reversed(self._last_used.items()):
            if before.get((name, value)) == when:
                break
            uses += [
                (name, credential.key.key_id, when)
                for credential in self.named(name)
                if credential.key.value == value
            ]
        return uses

    def take_uses(self, uses: Iterable[tuple[str, str, float]]) -> None:
        """Restore the uses that ``uses`` of another keyring returned."""
        for name, key_id, when in reversed(list(uses)):
            credential = self.find(name, key_id)
            if credential is not None:
                self.used(credential)
                self.let_in(credential, when)

    def find(self, name: str, key_id: str) -> Credential | None:
        """Return the client's credential with the key of that id, or None."""
        return next(
            (credential for credential in self.named(name) if credential.key.key_id == key_id), None
        )

    def holds(self, credential: Credential) -> bool:
        """Return whether the key still belongs to the client of that name."""
        return any(
            current.key.value == credential.key.value
            for current in self.named(credential.client.name)
        )

    def let_in(self, credential: Credential, now_wall: float) -> None:
        """Record that the key has authenticated a connection.

        now_wall: the time of day, in seconds since the epoch.
        """
        used = credential.client.name, credential.key.value
        self._last_used.pop(used, None)
        self._last_used[used] = now_wall

    def last_used(self, credential: Credential) -> float | None:
        """Return when the key was last used, or None if not since the broker started."""
        return self._last_used.get((credential.client.name, credential.key.value))

    def used(self, credential: Credential) -> None:
        """Move the key to the front, so that it is tried first from now on."""
        if credential.prepared in self._order:
            self._move_to_end(credential.prepared)

    def _move_to_end(self, prepared: bytes) -> None:
        self._order[prepared] = self._order.pop(prepared)


class KeySearch:
    """The search for the key that made one answer.

    allow_md5: whether the listener allows HMAC-MD5 for every client.
    uid: the user at the other end of a Unix socket, None elsewhere.
    now: the time of day, for the keys' validity periods.
    tls_peer: the facts that TLS proved about the peer, and the binding of its key.
    """

    __slots__ = (
        "_allow_md5",
        "_candidates",
        "_channel",
        "_now",
        "_proof",
        "_ring",
        "_uid",
        "tried",
    )

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
        self._candidates: list[bytes] = []
        self.tried = 0

    def step(self) -> Identity | None:
        """Try some keys; return the result, or None if there are more keys to try."""
        if self._proof.name:
            return self._among_named()
        size = key_search.SLICE if self._is_plain else _SLICE
        begin, limit = self.tried, self._ring.limit
        if not begin:
            # A key that was used lately is in the first slice, and needs no longer list.
            self._candidates = self._ring.candidates(0, min(size, limit))
        position = self._find(begin, begin + size)
        if position >= 0:
            self.tried = position + 1
            return self._judge(self._ring.owner(self._candidates[position]))
        if not begin:
            # The order has not changed since.
            self._candidates += self._ring.candidates(size, limit)
        self.tried = min(begin + size, len(self._candidates))
        return Identity(refusal="unknown key") if self.tried == len(self._candidates) else None

    @property
    def _is_plain(self) -> bool:
        """Whether the answer is an HMAC-SHA256 made with the key itself."""
        return self._proof.digest == "sha256" and not self._channel.bound

    def _find(self, begin: int, end: int) -> int:
        """Return the position of the candidate whose key made the answer, or -1."""
        proof = self._proof
        if self._is_plain:
            return key_search.find(self._candidates, begin, end, proof.challenge, proof.mac)
        keys = (self._ring.owner(prepared).key.value for prepared in self._candidates[begin:end])
        position = proof.maker(key_on(self._channel, key, CLIENT) for key in keys)
        return -1 if position is None else begin + position

    def _among_named(self) -> Identity:
        """Try the keys of a name: as many for a wrong key as for an unknown name."""
        credentials = self._ring.tried_for(self._proof.name.decode(errors="replace"))
        self.tried = len(credentials)
        match = self._maker_among(credentials)
        return (
            Identity(refusal="wrong key for the given name")
            if match is None or match is _NOBODYS
            else self._judge(match)
        )

    def _maker_among(self, credentials: list[Credential]) -> Credential | None:
        """Return the credential whose key made the answer, or None after a try of every key."""
        proof, match = self._proof, None
        if self._is_plain:
            prepared = [credential.prepared for credential in credentials]
            position = key_search.find(prepared, 0, self.tried, proof.challenge, proof.mac)
            return None if position < 0 else credentials[position]
        for credential in credentials:
            if proof.made_with(key_on(self._channel, credential.key.value, CLIENT)):
                match = credential
        return match

    def _judge(self, credential: Credential) -> Identity:
        client = credential.client
        if not credential.key.valid_at(self._now):
            return Identity(credential, "key is not valid now (see not_before and not_after)")
        if self._proof.digest == "md5" and not (self._allow_md5 or client.allow_md5):
            return Identity(
                credential,
                "peer supports only HMAC-MD5 (set allow_md5 for the client or the listener)",
            )
        if client.peer_uid is not None and self._uid not in client.peer_uid:
            return Identity(credential, "peer is not a user in peer_uid at a Unix socket")
        refusal = self._channel.refusal(client)
        if refusal:
            return Identity(credential, refusal)
        self._ring.used(credential)
        return Identity(credential)


def key_on(tls_peer: TlsPeer, key: bytes, direction: str = BROKER) -> bytes:
    """Return the key with which CLIENT or BROKER answers, with the peer's channel
    binding.
    """
    kind = tls_peer.bound
    return bound_key(key, kind, tls_peer.bindings[kind], direction) if kind else key


def _public(client: ClientConfig) -> Key:
    """Return the key of a client without keys: its name, which is not a secret.

    The client's user id is checked instead.
    """
    return Key(client.name.encode(), source="the name; peer_uid says who may use it")
