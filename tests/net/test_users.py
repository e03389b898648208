"""Users at the other end of a Unix socket: those that can't be told apart are nobody in
particular.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.raw_client import Rejected
from support.running_daemon import configuration, running_daemon

from brokerd.net.handshake import peer_uid as users

#: As systemd's PrivateUsers=yes makes it: root and the service's own user.
PRIVATE = "         0          0          1\n       997        997          1\n"


def test_users_outside_the_map_are_not_seen() -> None:
    """With PrivateUsers=yes root and the own user are seen; nobody is taken for 65534,
    which then stands for all.
    """
    seen = users.ranges_of(PRIVATE)
    assert [uid for uid in (0, 1, 996, 997, 998, 1000, 65534) if users.is_seen(uid, seen)] == [
        0,
        997,
    ]
    everybody = users.ranges_of("0 0 4294967295\n")
    assert users.is_seen(65534, everybody)


def test_clients_that_count_on_unseen_users_are_found() -> None:
    """The clients with such users in peer_uid are named, with those users alone."""
    config = configuration(
        "127.0.0.1:0",
        {"root": {"peer_uid": [0]}, "team": {"peer_uid": [0, 1000, 65534]}, "keyed": None},
    )
    assert users.unseen(config.clients, users.ranges_of(PRIVATE)) == {"team": [1000, 65534]}


def test_it_is_warned_of(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, and after a reload, the log names clients that nobody can be."""
    monkeypatch.setattr(users, "_seen", lambda: users.ranges_of("997 997 1"))
    with running_daemon(
        configuration(str(socket_dir / "s"), {"team": {"peer_uid": [1000]}})
    ) as broker:
        (warning,) = broker.log.wait("client.users_unseen")
        assert warning.fields["name"] == "team"
        assert warning.fields["peer_uid"] == [1000]
        assert "PrivateUsers=no" in warning.fields["reason"]


def test_an_unseen_user_is_not_let_in_by_its_number(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that the system gives for everybody unseen is not accepted as a user."""
    with running_daemon(
        configuration(str(socket_dir / "s"), {"own": {"peer_uid": [os.getuid()]}})
    ) as broker:
        with broker.raw() as seen:
            seen.log_in(b"own", b"own")
        monkeypatch.setattr(users, "_seen", lambda: users.ranges_of("4000000 997 1"))
        with broker.raw() as unseen, pytest.raises(Rejected):
            unseen.log_in(b"own", b"own")
