"""Paths of a configuration, as errors and lists show them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from brokerd.config.load import load
from brokerd.config.paths import joined, shortened


@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("/etc/b/clients.d/../keys/bob", "/etc/b/keys/bob"),
        ("clients.d/../keys/bob", "keys/bob"),
        ("../keys/bob", "../keys/bob"),
        ("./keys/bob", "./keys/bob"),
        ("keys/..bob", "keys/..bob"),
        ("a/../b\0", "a/../b\0"),
    ],
)
def test_paths_shortened_removes_parent_directories(path: str, short: str) -> None:
    """Only ``..`` is removed, where that can be done."""
    assert shortened(path) == short


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege there")
def test_paths_shortened_through_link_stays_the_same_file(tmp_path: Path) -> None:
    """Behind a link, ``..`` is the parent of the link's target."""
    (tmp_path / "far" / "clients.d").mkdir(parents=True)
    (tmp_path / "clients.d").symlink_to(tmp_path / "far" / "clients.d")
    path = f"{tmp_path}/clients.d/../keys/bob"

    assert shortened(path) == path
    assert joined(f"{tmp_path}/far/clients.d", "../keys/bob") == f"{tmp_path}/far/keys/bob"


def test_paths_of_key_in_included_file_are_shortened(tmp_path: Path) -> None:
    """The key's origin has no detour through the directory of the included file."""
    for folder in ("clients.d", "keys"):
        (tmp_path / folder).mkdir()
    (tmp_path / "keys" / "bob").write_text("k")
    (tmp_path / "keys" / "bob").chmod(0o600)
    (tmp_path / "clients.d" / "bob.yaml").write_text("clients: {bob: {key_file: ../keys/bob}}\n")
    main = tmp_path / "b.yaml"
    main.write_text("listen: [b.sock]\ninclude: ['clients.d/*.yaml']\n")

    (key,) = load(main).clients["bob"].keys

    assert key.source == f"key_file {tmp_path / 'keys' / 'bob'}"
