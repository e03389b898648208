"""Users at the other end of a Unix socket. Users outside the namespace can't be told
apart, and match no peer_uid.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.raw_client import Rejected
from support.running_daemon import configuration, running_daemon

from brokerd.net.handshake import peer_uid as users

#: The map of systemd's PrivateUsers=yes: root and the service's own user.
PRIVATE = "         0          0          1\n       997        997          1\n"


def test_peer_uid_outside_user_namespace_is_not_seen() -> None:
    """With PrivateUsers=yes root and the service's own user are seen. 65534 then stands
    for all others, and is not taken for the user `nobody`.
    """
    seen = users.ranges_of(PRIVATE)
    assert [uid for uid in (0, 1, 996, 997, 998, 1000, 65534) if users.is_seen(uid, seen)] == [
        0,
        997,
    ]
    everybody = users.ranges_of("0 0 4294967295\n")
    assert users.is_seen(65534, everybody)


def test_peer_uid_unseen_users_of_clients_are_found() -> None:
    """The result has the clients with such users in peer_uid, and those users only."""
    config = configuration(
        "127.0.0.1:0",
        {"root": {"peer_uid": [0]}, "team": {"peer_uid": [0, 1000, 65534]}, "keyed": None},
    )
    assert users.unseen(config.clients, users.ranges_of(PRIVATE)) == {"team": [1000, 65534]}


def test_peer_uid_unseen_user_is_warned_of(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, and after a reload, the log names clients that no user can be."""
    monkeypatch.setattr(users, "_seen", lambda: users.ranges_of("997 997 1"))
    with running_daemon(
        configuration(str(socket_dir / "s"), {"team": {"peer_uid": [1000]}})
    ) as broker:
        (warning,) = broker.log.wait("client.users_unseen")
        assert warning.fields["name"] == "team"
        assert warning.fields["peer_uid"] == [1000]
        assert "PrivateUsers=no" in warning.fields["reason"]


def test_peer_uid_of_unseen_user_is_rejected(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that the system gives for every unseen user is not accepted as a user."""
    with running_daemon(
        configuration(str(socket_dir / "s"), {"own": {"peer_uid": [os.getuid()]}})
    ) as broker:
        with broker.raw() as seen:
            seen.log_in(b"own", b"own")
        monkeypatch.setattr(users, "_seen", lambda: users.ranges_of("4000000 997 1"))
        with broker.raw() as unseen, pytest.raises(Rejected):
            unseen.log_in(b"own", b"own")
