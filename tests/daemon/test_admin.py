"""Commands of administrators to a running daemon."""

from __future__ import annotations

import json

import pytest
from support.raw_client import JSON, REQUEST, packed
from support.running_daemon import configuration, running_daemon

from brokerd.daemon import admin


def test_admin_long_answers_above_limit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a limited number of long answers may wait. The next request is refused, and
    succeeds when repeated later.
    """
    monkeypatch.setattr(admin, "_MOST_LONG", 2)
    monkeypatch.setattr(admin, "_ENTRIES", 1)
    with (
        running_daemon(configuration("127.0.0.1:0", {"ops": {"admin": True}, "bob": {}})) as daemon,
        daemon.login("ops") as ops,
    ):
        question = json.dumps({"op": "keys"}).encode()
        ops.write(
            b"".join(
                packed(REQUEST, "$broker", question, message_id=number, codec=JSON)
                for number in (1, 2, 3)
            )
        )
        answers = {answer.id: answer for answer in (ops.recv() for _ in range(3))}
        assert answers[3].code == "full"
        for number in (1, 2):
            assert [client["name"] for client in answers[number].json["clients"]] == ["ops", "bob"]
            assert answers[number].json["since"] > 0
        assert len(ops.ask("keys").json["clients"]) == 2
