"""The administrator that a user is without a key, by the main file."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokerd.config.admin_user import LocalAdmin, local_admin

OPS = "clients:\n  ops: {peer_uid: [0, 7], admin: true}\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("listen: [/run/b.sock]\n" + OPS, "ops"),
        ("listen: [/run/b.sock]\n" + OPS + "  bob: {kye: k}\nlimts: {}\n", "ops"),
        ("listen: [/run/b.sock]\n" + OPS.replace("admin: true", "key: k, admin: true"), None),
        ("listen: [/run/b.sock]\n" + OPS.replace(", admin: true", ""), None),
        ("listen: [/run/b.sock]\n" + OPS.replace("7", "8"), None),
        ("listen: ['127.0.0.1:6000']\n" + OPS, None),
        ("listen: [/run/b.sock]\nclients: [ops]\n", None),
        ("- a list\n", None),
    ],
)
def test_local_admin_is_client_with_user_and_without_key(
    tmp_path: Path, text: str, name: str | None
) -> None:
    """A mistake elsewhere in the file does not matter."""
    file = tmp_path / "b.yaml"
    file.write_text(text)

    found = local_admin(str(file), {}, 7)

    assert found == (None if name is None else LocalAdmin(name, "/run/b.sock"))


def test_local_admin_without_file_is_none(tmp_path: Path) -> None:
    """A machine without a broker's configuration has none."""
    assert local_admin(str(tmp_path / "none.yaml"), {}, 0) is None
