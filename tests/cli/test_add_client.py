"""A client added by a command: both files or none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from brokerd.cli import add_client as add_client_module
from brokerd.cli.add_client import NotAdded, add_client
from brokerd.config.load import ConfigError, load

MAIN = 'listen: [b.sock]\nclients: {ops: {key: k}}\ninclude: ["clients.d/*.yaml"]\n'


def main_file(directory: Path, text: str = MAIN) -> Path:
    file = directory / "brokerd.yaml"
    file.write_text(text)
    file.chmod(0o600)
    return file


def everything(directory: Path) -> dict[str, bytes | None]:
    """Return every file and directory below, temporary ones among them."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


@pytest.mark.parametrize("name", ["alice", "on", "123", "a.b-c", "2026-01-01", "null"])
def test_a_client_is_added(tmp_path: Path, name: str) -> None:
    """The entry names the key file, the key is 43 characters for its owner alone, and
    nothing else is left.
    """
    file = main_file(tmp_path)

    added = add_client(name, file)

    (key,) = load(file).clients[name].keys
    assert added.key.read_bytes() == key.value + b"\n"
    assert len(key.value) == 43
    assert set(everything(tmp_path)) == {
        "brokerd.yaml",
        "clients.d",
        f"clients.d/{name}.yaml",
        "keys",
        f"keys/{name}",
    }
    if os.name == "posix":
        assert stat.S_IMODE(added.key.stat().st_mode) == 0o600
        assert stat.S_IMODE(added.key.parent.stat().st_mode) == 0o700
        assert not added.entry.stat().st_mode & 0o022


def test_each_client_gets_a_key_of_its_own(tmp_path: Path) -> None:
    """Directories that are there are used."""
    file = main_file(tmp_path)

    add_client("a", file)
    add_client("b", file)

    clients = load(file).clients
    assert clients["a"].keys[0].value != clients["b"].keys[0].value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("ops", MAIN, "client 'ops' is configured already, at "),
        ("a", "listen: [b.sock]\n", 'add this line to it: include: ["clients.d/*.yaml"]'),
        ("a", 'listen: [b.sock]\ninclude: ["other*.yaml"]\n', "does not include"),
        ("a", 'listen: [b.sock]\ninclude: ["clients.d/*.yml"]\n', "does not include"),
    ],
)
def test_what_is_in_the_way_is_said(tmp_path: Path, name: str, text: str, says: str) -> None:
    """With what would be right; nothing is written."""
    file = main_file(tmp_path, text)
    before = everything(tmp_path)

    with pytest.raises(NotAdded) as refused:
        add_client(name, file)

    assert says in str(refused.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "include", ["clients.d/a.yaml", "*/*.yaml", "./clients.d/[ab].yaml", "x/../clients.d/*"]
)
def test_any_pattern_that_reads_the_entry_will_do(tmp_path: Path, include: str) -> None:
    """A plain path, which must exist and so is empty now, is a file that is there
    already; patterns are fine.
    """
    (tmp_path / "x").mkdir()
    plain = "*" not in include and "[" not in include
    if plain:
        (tmp_path / "clients.d").mkdir()
        (tmp_path / "clients.d" / "a.yaml").write_text("# nothing yet\n")
    file = main_file(tmp_path, f'listen: [b.sock]\ninclude: ["{include}"]\n')

    if plain:
        with pytest.raises(NotAdded, match="exists already"):
            add_client("a", file)
    else:
        add_client("a", file)
        assert "a" in load(file).clients


def test_an_include_of_an_included_file_counts(tmp_path: Path) -> None:
    """It need not be the main file that reads clients.d."""
    (tmp_path / "more.yaml").write_text('include: ["clients.d/*.yaml"]\n')
    file = main_file(tmp_path, "listen: [b.sock]\ninclude: [more.yaml]\n")

    add_client("a", file)

    assert "a" in load(file).clients


@pytest.mark.parametrize("there", ["keys/a", "clients.d/a.yaml"])
@pytest.mark.parametrize("dangling", [False, True])
def test_no_file_is_ever_replaced(tmp_path: Path, there: str, dangling: bool) -> None:
    """A file, or a link to nowhere, that has one of the names stays as it is, and the
    other file is not made.
    """
    path = tmp_path / there
    path.parent.mkdir()
    if dangling:
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text("# mine\n")
    file = main_file(tmp_path)
    before = everything(tmp_path)

    with pytest.raises((NotAdded, ConfigError), match=r"exists already|there is no file"):
        add_client("a", file)

    assert everything(tmp_path) == before


def test_a_file_made_at_the_same_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's entry, made after the look and before the write, stays, and the
    key is taken back.
    """
    file = main_file(tmp_path)
    right = add_client_module._make_directory

    def slow(path: Path, *rest: object) -> None:
        right(path, *rest)  # type: ignore[arg-type]
        if path.name == "clients.d":
            (path / "a.yaml").write_text("# theirs\n")

    monkeypatch.setattr(add_client_module, "_make_directory", slow)

    with pytest.raises(NotAdded, match="exists already"):
        add_client("a", file)

    assert (tmp_path / "clients.d" / "a.yaml").read_text() == "# theirs\n"
    assert not (tmp_path / "keys").exists()


def test_everything_is_taken_back_if_the_whole_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the configuration with the new files has a mistake, none of them is left."""
    file = main_file(tmp_path)
    monkeypatch.setattr(add_client_module.secrets, "token_urlsafe", lambda size: "k")
    before = everything(tmp_path)

    with pytest.raises(ConfigError, match="has the same key as client"):
        add_client("a", file)

    assert everything(tmp_path) == before


def test_a_file_system_without_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are the same there, and still none is replaced."""
    file = main_file(tmp_path)

    def unknown(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(add_client_module.os, "link", unknown)

    add_client("a", file)

    assert "a" in load(file).clients
    assert set(everything(tmp_path)) == {
        "brokerd.yaml",
        "clients.d",
        "clients.d/a.yaml",
        "keys",
        "keys/a",
    }


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system at the second file takes the first one back."""
    file = main_file(tmp_path)
    before = everything(tmp_path)
    right = os.link

    def full(source: Path, target: Path) -> None:
        if target.suffix == ".yaml":
            raise OSError(28, "No space left on device", str(target))
        right(source, target)

    monkeypatch.setattr(add_client_module.os, "link", full)

    with pytest.raises(NotAdded, match="No space left on device"):
        add_client("a", file)

    assert everything(tmp_path) == before
