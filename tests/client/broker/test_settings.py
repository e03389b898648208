"""What connect() is given, and what it finds in the environment."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from brokerd_client.errors import AddressError, InvalidKey, InvalidName
from brokerd_client.settings import DEFAULT_ADDRESS, Settings, resolve


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the one who runs the tests is seen."""
    for name in ("ADDRESS", "NAME", "KEY_FILE"):
        monkeypatch.delenv(f"BROKERD_{name}", raising=False)


def settle(**given: Any) -> Settings:
    """Resolve with defaults."""
    defaults = {"address": None, "name": None, "key": None, "key_file": None, "timeout": 1.0}
    options = {"reconnect": True, "allow_pickle_from": (), "inbox": 100}
    return resolve(**{**defaults, **options, **given})


def test_settings_without_environment_are_defaults() -> None:
    """The system's socket, no name, the key given."""
    found = settle(key="k")
    assert (str(found.addresses[0]), found.name, found.key) == (DEFAULT_ADDRESS, "", b"k")


def test_settings_argument_overrides_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A variable is used where the argument is missing, and only there."""
    (tmp_path / "key").write_bytes(b"from file\n\n")
    monkeypatch.setenv("BROKERD_ADDRESS", "localhost:6000")
    monkeypatch.setenv("BROKERD_NAME", "alice")
    monkeypatch.setenv("BROKERD_KEY_FILE", str(tmp_path / "key"))
    found = settle()
    assert (str(found.addresses[0]), found.name, found.key) == (
        "localhost:6000",
        "alice",
        b"from file\n",
    )
    found = settle(address="@x", name="bob", key=b"k")
    assert (str(found.addresses[0]), found.name, found.key) == ("@x", "bob", b"k")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({}, InvalidKey, "BROKERD_KEY_FILE"),
        ({"key": ""}, InvalidKey, "empty"),
        ({"key": "k", "key_file": "f"}, InvalidKey, "not both"),
        ({"key_file": "/nowhere/at/all"}, InvalidKey, "/nowhere/at/all"),
        ({"key": "k", "name": "-"}, InvalidName, "client name"),
        ({"key": "k", "address": "[:"}, AddressError, "address"),
        ({"key": "k", "inbox": 0}, ValueError, "inbox"),
        ({"key": "k", "allow_pickle_from": "bob"}, TypeError, "list"),
    ],
)
def test_settings_mistake_is_named_before_connecting(
    given: dict[str, Any], error: type[Exception], says: str
) -> None:
    """Each mistake is refused before anything is opened, and the message says what
    would be right.
    """
    with pytest.raises(error, match=says):
        settle(**given)


def test_key_that_is_path_of_file_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly always key_file was meant; a key that is no path may have a slash."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "worker").write_text("secret")
    path = str(Path("keys", "worker"))
    with pytest.raises(InvalidKey, match="give key_file=PATH") as caught:
        settle(key=path)
    assert "worker" not in str(caught.value)
    assert settle(key="keys/nobody").key == b"keys/nobody"


@pytest.mark.parametrize("content", [b"k", b"k\n", b"k\r\n"])
def test_key_file_final_newline_is_removed(tmp_path: Path, content: bytes) -> None:
    """One newline is cut, that of Windows too, as the daemon does; another one belongs
    to the key.
    """
    (tmp_path / "key").write_bytes(content)
    assert settle(key_file=tmp_path / "key").key == b"k"
    (tmp_path / "key").write_bytes(b"\n" + content)
    assert settle(key_file=tmp_path / "key").key == b"\nk"


@pytest.mark.parametrize(
    "key",
    [
        "pV8k3Jz-0aQ_9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA",
        "pV8k3Jz/0aQ+9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA=",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "hunter2",
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_settings_key_given_for_its_file_is_not_shown(
    key: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in the place of the path of its file stands neither in the error nor in
    what led to it.
    """
    if by == "environment":
        monkeypatch.setenv("BROKERD_KEY_FILE", key)

    with pytest.raises(
        InvalidKey, match=r"the key file can't be read: .* \(give the path"
    ) as refused:
        settle(key_file=key if by == "argument" else None)

    assert key not in "".join(traceback.format_exception(refused.type, refused.value, refused.tb))


def test_key_file_empty_raises(tmp_path: Path) -> None:
    """A file that holds nothing but a newline holds no key."""
    (tmp_path / "key").write_bytes(b"\n")
    with pytest.raises(InvalidKey, match="is empty"):
        settle(key_file=tmp_path / "key")


def test_settings_repr_shows_no_key() -> None:
    """A repr of the settings can be logged."""
    assert "sesame" not in repr(settle(key="sesame"))


def test_key_of_invalid_text_raises_without_repeating_it() -> None:
    """An environment variable of other bytes is such a text: neither the error nor its
    context holds the key.
    """
    with pytest.raises(InvalidKey, match="give it as bytes") as refused:
        settle(key="a canary\udcff")
    assert refused.value.__cause__ is refused.value.__context__ is None


def test_key_number_raises() -> None:
    """bytes(5) would be five zeros."""
    with pytest.raises(TypeError, match="bytes or text, not int"):
        settle(key=5)
