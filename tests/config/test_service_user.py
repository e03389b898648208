"""Keys that the service's user can't read, found by a check that root runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from brokerd.config.load import load_text
from brokerd.config.model import Config
from brokerd.config.service_user import unreadable_warnings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="users of POSIX")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A configuration with the key of bob; all files are the service's user's, and the
    check is run by root.
    """
    user = SimpleNamespace(pw_uid=tmp_path.stat().st_uid, pw_gid=tmp_path.stat().st_gid)
    monkeypatch.setattr("pwd.getpwnam", lambda name: user)
    monkeypatch.setattr("os.getgrouplist", lambda name, group: [group])
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (tmp_path / "keys").mkdir()
    key, main = tmp_path / "keys" / "bob", tmp_path / "b.yaml"
    key.touch(mode=0o600)
    main.touch(mode=0o600)
    config = load_text("listen: [b.sock]\nclients: {bob: {key: k}}\n")
    yield replace(config, path=str(main), private={str(main): str(main), str(key): "b.yaml:2:3"})
    (tmp_path / "keys").chmod(0o700)


def test_service_user_who_can_read_every_file_gives_no_warning(config: Config) -> None:
    """The check is silent where nothing is wrong."""
    assert list(unreadable_warnings(config)) == []


@pytest.mark.parametrize("closed", ["keys/bob", "keys"])
def test_service_user_closed_file_or_directory_gives_warning(
    config: Config, tmp_path: Path, closed: str
) -> None:
    """The warning has the place, the key file, and the command for what is closed."""
    (tmp_path / closed).chmod(0o077)

    (warning,) = unreadable_warnings(config)

    assert warning == (
        f"b.yaml:2:3: the service's user 'brokerd' can't read {tmp_path / 'keys' / 'bob'}"
        f" (chown brokerd {tmp_path / closed}, or chmod u+rX where it owns that)"
    )


def test_service_user_of_other_configuration_gives_no_warning(
    config: Config, tmp_path: Path
) -> None:
    """A main file that is closed to the service's user is not the service's."""
    for closed in ("b.yaml", "keys/bob"):
        (tmp_path / closed).chmod(0o077)

    assert list(unreadable_warnings(config)) == []


def test_service_user_is_not_considered_by_other_users(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user other than root has found out by reading the files."""
    (tmp_path / "keys" / "bob").chmod(0o077)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)

    assert list(unreadable_warnings(config)) == []
