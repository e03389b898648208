"""The search for the key of an answer: both of its forms against the standard library."""

from __future__ import annotations

import hmac
import random
from datetime import UTC, datetime
from types import ModuleType

import pytest
from support.keys import key_of
from support.running_daemon import configuration

from brokerd.net.handshake import _key_search_py, key_search
from brokerd.net.handshake.keyring import Identity, Keyring, KeySearch
from brokerd_client.wire.handshake import LIMIT, Proof


@pytest.fixture(params=["python", "compiled"])
def twin(request: pytest.FixtureRequest) -> ModuleType:
    """Each form of the search."""
    if request.param == "python":
        return _key_search_py
    module: ModuleType = pytest.importorskip(
        "brokerd.net.handshake._key_search_c", reason="the compiled search was not built"
    )
    return module


@pytest.mark.parametrize("size", [0, 1, 48, 55, 56, 63, 64, 119, 120, LIMIT])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 33])
def test_key_search_finds_each_key_at_its_position(twin: ModuleType, size: int, count: int) -> None:
    """Keys of every length, messages of one to several blocks, and lists that do not fill
    the last group of keys.
    """
    numbers = random.Random(size * count)
    message = numbers.randbytes(size)
    keys = [numbers.randbytes(numbers.choice((1, 32, 63, 64, 65, 200))) for _ in range(count)]
    keys = [key + bytes([position]) for position, key in enumerate(keys, 1)]
    prepared = [twin.prepare(key) for key in keys]

    macs = [hmac.digest(key, message, "sha256") for key in keys]

    assert [twin.find(prepared, 0, count, message, mac) for mac in macs] == list(range(count))
    assert twin.find(prepared, 0, count, message, bytes(32)) == -1


def test_key_search_looks_at_given_part_only(twin: ModuleType) -> None:
    """A slice of a search neither looks in front of its part nor behind it."""
    keys = [bytes([number]) for number in range(1, 21)]
    prepared = [twin.prepare(key) for key in keys]

    def find(start: int, stop: int, key: int) -> int:
        mac = hmac.digest(keys[key], b"message", "sha256")
        position: int = twin.find(prepared, start, stop, b"message", mac)
        return position

    assert [find(5, 12, key) for key in (4, 5, 11, 12)] == [-1, 5, 11, -1]
    assert [find(15, 99, key) for key in (14, 19)] == [-1, 19]
    assert find(20, 30, 19) == find(7, 7, 7) == -1


def test_key_search_compiled_refuses_what_it_can_not_read() -> None:
    """Neither a longer message than a handshake has, nor a key that is not prepared."""
    twin = pytest.importorskip("brokerd.net.handshake._key_search_c")
    with pytest.raises(ValueError, match="the message is too long"):
        twin.find([], 0, 0, bytes(1000), bytes(32))
    with pytest.raises(ValueError, match="the MAC has not 32 bytes"):
        twin.find([], 0, 0, b"", bytes(31))
    for item in (b"not prepared", None):
        with pytest.raises(TypeError, match="not a prepared key"):
            twin.find([item], 0, 1, b"", bytes(32))


def identity_of(ring: Keyring, name: str, digest: str = "sha256") -> tuple[Identity, int]:
    """Return the result of the search for the client of an answer, and its slices."""
    challenge = b"{sha256}" + bytes(40)
    proof = Proof(challenge, digest, hmac.digest(key_of(name), challenge, digest))
    search = KeySearch(ring, proof, allow_md5=True, uid=None, now=datetime.now(UTC))
    slices = 1
    while (identity := search.step()) is None:
        slices += 1
    return identity, slices


@pytest.mark.parametrize("digest", ["sha256", "sha384", "md5"])
def test_keyring_search_goes_on_slice_by_slice(
    monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    """Each key is found, in the slice in which its turn is, and then in the first one."""
    monkeypatch.setattr(key_search, "SLICE", 32)
    names = [f"c{number}" for number in range(100)]
    ring = Keyring(configuration("@unused", " ".join(names)).clients.values())

    results = [(name, identity_of(ring, name, digest)) for name in reversed(names)]

    for name, (identity, _) in results:
        assert identity.accepted is not None
        assert identity.accepted.client.name == name
    assert [slices for _, (_, slices) in results][:3] == [4, 4, 4]
    assert identity_of(ring, "c99", digest)[1] == 4
    assert identity_of(ring, "c99", digest)[1] == 1


def test_keyring_search_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key behind the limit is not found, and becomes the first when it is used."""
    monkeypatch.setattr(key_search, "SLICE", 32)
    names = [f"c{number}" for number in range(100)]
    ring = Keyring(configuration("@unused", " ".join(names)).clients.values(), limit=50)

    assert identity_of(ring, "c49")[0].accepted is not None
    # That moved it to the front, and all keys in front of it one place back.
    assert identity_of(ring, "c50") == (Identity(refusal="unknown key"), 2)
    assert Keyring([], limit=0).candidates(0, 1) == []
    assert identity_of(Keyring([], limit=0), "c1") == (Identity(refusal="unknown key"), 1)


@pytest.mark.parametrize("digest", ["sha256", "sha384"])
def test_keyring_search_by_name_finds_each_key_of_that_client_only(digest: str) -> None:
    """Each of many keys is found. A wrong key is tried as often as any for an unknown name."""
    own, other = [{"key": f"alice's key {number}"} for number in range(20)], "bob's key"
    clients = {"alice": {"keys": own}, "bob": {"key": other}}
    ring = Keyring(configuration("@unused", clients).clients.values())
    challenge = b"{sha256}" + bytes(40)

    def search(name: bytes, key: str) -> tuple[Identity | None, int]:
        mac = hmac.digest(key.encode(), challenge, digest)
        proof = Proof(challenge, digest, mac, name)
        search = KeySearch(ring, proof, allow_md5=True, uid=None, now=datetime.now(UTC))
        return search.step(), search.tried

    for number, entry in enumerate(own):
        identity, _ = search(b"alice", entry["key"])
        assert identity is not None
        assert identity.accepted is ring.named("alice")[number]
    wrong = Identity(refusal="wrong key for the given name"), 20
    assert search(b"alice", other) == search(b"bob", own[0]["key"]) == wrong
    assert search(b"nobody", other) == wrong
