"""Adding a client by a command: both files are written, or none."""

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
    paths = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


@pytest.mark.parametrize("name", ["alice", "on", "123", "a.b-c", "2026-01-01", "null"])
def test_add_client_writes_entry_and_key_file(tmp_path: Path, name: str) -> None:
    """The entry names the key file. The key has 43 characters and is readable by its
    owner only. No other file is left.
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


def test_add_client_as_admin_makes_administrator(tmp_path: Path) -> None:
    """Another client is none."""
    file = main_file(tmp_path)

    add_client("a", file, admin=True)
    add_client("b", file)

    clients = load(file).clients
    assert (clients["a"].admin, clients["b"].admin) == (True, False)


def test_add_client_generates_own_key_for_each_client(tmp_path: Path) -> None:
    """Existing directories are used."""
    file = main_file(tmp_path)

    add_client("a", file)
    add_client("b", file)

    clients = load(file).clients
    assert clients["a"].keys[0].value != clients["b"].keys[0].value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ops", MAIN, "client 'ops' is configured already, at "),
        ("a", "listen: [b.sock]\n", 'add this line to it: include: ["clients.d/*.yaml"]'),
        ("a", 'listen: [b.sock]\ninclude: ["other*.yaml"]\n', "does not include"),
        ("a", 'listen: [b.sock]\ninclude: ["clients.d/*.yml"]\n', "does not include"),
    ],
)
def test_add_client_not_possible_says_reason_and_remedy(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    """The message says what would be right; no file is written."""
    file = main_file(tmp_path, text)
    before = everything(tmp_path)

    with pytest.raises(NotAdded) as refused:
        add_client(name, file)

    assert message in str(refused.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "include", ["clients.d/a.yaml", "*/*.yaml", "./clients.d/[ab].yaml", "x/../clients.d/*"]
)
def test_add_client_with_any_matching_include_pattern_works(tmp_path: Path, include: str) -> None:
    """A plain path must exist, so that it is an existing file, which is empty now;
    patterns are accepted.
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


def test_add_client_with_include_in_included_file_works(tmp_path: Path) -> None:
    """It need not be the main file that includes clients.d."""
    (tmp_path / "more.yaml").write_text('include: ["clients.d/*.yaml"]\n')
    file = main_file(tmp_path, "listen: [b.sock]\ninclude: [more.yaml]\n")

    add_client("a", file)

    assert "a" in load(file).clients


@pytest.mark.parametrize("existing", ["keys/a", "clients.d/a.yaml"])
@pytest.mark.parametrize("dangling", [False, True])
def test_add_client_never_replaces_existing_file(
    tmp_path: Path, existing: str, dangling: bool
) -> None:
    """A file with one of the names, or a link without a target, stays as it is. The
    other file is not written.
    """
    path = tmp_path / existing
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


def test_add_client_never_replaces_file_created_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program's entry, created after the check and before the write, stays, and
    the key is removed again.
    """
    file = main_file(tmp_path)
    make_directory = add_client_module._make_directory

    def slow(path: Path, *arguments: object) -> None:
        make_directory(path, *arguments)  # type: ignore[arg-type]
        if path.name == "clients.d":
            (path / "a.yaml").write_text("# theirs\n")

    monkeypatch.setattr(add_client_module, "_make_directory", slow)

    with pytest.raises(NotAdded, match="exists already"):
        add_client("a", file)

    assert (tmp_path / "clients.d" / "a.yaml").read_text() == "# theirs\n"
    assert not (tmp_path / "keys").exists()


def test_add_client_with_invalid_result_removes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the configuration with the new files has a mistake, none of them is left."""
    file = main_file(tmp_path)
    monkeypatch.setattr(add_client_module.secrets, "token_urlsafe", lambda size: "k")
    before = everything(tmp_path)

    with pytest.raises(ConfigError, match="has the same key as client"):
        add_client("a", file)

    assert everything(tmp_path) == before


def test_add_client_without_hard_links_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are the same on such a file system, and none is replaced there either."""
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


def test_add_client_on_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system error at the second file removes the first one again."""
    file = main_file(tmp_path)
    before = everything(tmp_path)
    link = os.link

    def full(source: Path, target: Path) -> None:
        if target.suffix == ".yaml":
            raise OSError(28, "No space left on device", str(target))
        link(source, target)

    monkeypatch.setattr(add_client_module.os, "link", full)

    with pytest.raises(NotAdded, match="No space left on device"):
        add_client("a", file)

    assert everything(tmp_path) == before
