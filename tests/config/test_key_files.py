"""Keys: where they may be stored, which users may read them, when they are valid."""

from __future__ import annotations

import os
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from brokerd.config.file_reader import Unreadable
from brokerd.config.key_files import MAX_KEY, read_key_file
from brokerd.config.lint import lint_warnings
from brokerd.config.load import ConfigError, load, load_text
from brokerd.config.values import Key

LISTEN = "listen: [/run/b.sock]\n"

posix_modes = pytest.mark.skipif(os.name != "posix", reason="no POSIX file modes here")


def key_file(path: Path, content: bytes = b"the key\n", mode: int = 0o600) -> Path:
    """Write a key file."""
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refusal(text: str, environ: dict[str, str] | None = None) -> str:
    """Return the one line that a text is refused with."""
    with pytest.raises(ConfigError) as refused:
        load_text(text, "f", environ if environ is not None else {})
    (line,) = str(refused.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"k", b"k"),
        (b"k\n", b"k"),
        (b"k\r\n", b"k"),
        (b"k\n\n", b"k\n"),
        (b" k \xff\0\n", b" k \xff\0"),
        (b"k\r", b"k\r"),
    ],
)
def test_key_file_one_trailing_newline_is_removed(
    tmp_path: Path, content: bytes, key: bytes
) -> None:
    """The bytes of a key file are the key, whatever they are. Only one newline at their
    end is removed.
    """
    assert read_key_file(str(key_file(tmp_path / "key", content)), {}) == key


def test_key_file_above_largest_size_is_refused(tmp_path: Path) -> None:
    """A key file of 64 KiB is accepted. One byte more is refused, as the file can't be
    a key.
    """
    path = str(key_file(tmp_path / "key", b"k" * MAX_KEY))
    assert len(read_key_file(path, {})) == MAX_KEY

    key_file(tmp_path / "key", b"k" * (MAX_KEY + 1))
    with pytest.raises(
        Unreadable, match=r"larger than 64 KiB \(give the file that holds the key\)"
    ):
        read_key_file(path, {})


@posix_modes
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o660, 0o666, 0o440])
def test_key_file_open_to_other_users_error_gives_working_chmod(tmp_path: Path, mode: int) -> None:
    """A key file that other users can read or write is refused. The command in the
    error repairs it, run as it is.
    """
    path = key_file(tmp_path / "it's a key", mode=mode)
    text = LISTEN + f'clients: {{a: {{key_file: "{path}"}}}}\n'

    line = refusal(text)

    assert line.startswith(
        "f:2:25: clients.a.key_file: users other than its owner can read or write "
    )
    assert f"mode {mode:04o}" in line
    command = line[line.index("(") + 1 : -1]
    assert command == f"chmod 600 {shlex.quote(str(path))}"
    subprocess.run(["sh", "-c", command], check=True)
    assert load_text(text, "f").clients["a"].keys[0].value == b"the key"


@posix_modes
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700, 0o611])
def test_key_file_private_to_owner_is_accepted(tmp_path: Path, mode: int) -> None:
    """A key file that only its owner can read and write is accepted."""
    assert read_key_file(str(key_file(tmp_path / "key", mode=mode)), {}) == b"the key"


@posix_modes
def test_config_inline_keys_in_file_open_to_other_users_are_refused(tmp_path: Path) -> None:
    """A file with inline keys that other users can read is one error, however many keys
    it holds. The error stands at the first key.
    """
    file = tmp_path / "b.yaml"
    file.write_text(LISTEN + "clients:\n  a: {key: one}\n  b: {keys: [{key: two}]}\n")
    file.chmod(0o644)

    with pytest.raises(ConfigError) as refused:
        load(file)

    assert (
        str(refused.value)
        == f"{file}:3:12: clients.a.key: this file holds a key, and users other than its owner can"
        f" read or write {file}, mode 0644 (chmod 600 {file})"
    )
    file.chmod(0o600)
    assert len(load(file).clients) == 2


@posix_modes
def test_config_without_inline_keys_may_be_readable_by_all(tmp_path: Path) -> None:
    """A configuration that only names key files needs no protection. A file with inline
    keys that it includes does.
    """
    key_file(tmp_path / "key")
    file = tmp_path / "b.yaml"
    file.write_text(LISTEN + "clients: {a: {key_file: key}}\ninclude: [c.yaml]\n")
    file.chmod(0o644)
    included = tmp_path / "c.yaml"
    included.write_text("clients: {b: {key: inline}}\n")
    included.chmod(0o640)

    with pytest.raises(ConfigError) as refused:
        load(file)

    assert str(refused.value).startswith(f"{included}:1:20: clients.b.key: ")
    assert str(refused.value).endswith(f"(chmod 600 {included})")


def test_key_env_variable_bytes_are_key() -> None:
    """key_env uses the variable's bytes unchanged. A missing or empty variable is an
    error.
    """
    text = LISTEN + "clients: {a: {key_env: A_KEY}}\n"

    assert load_text(text, "f", {"A_KEY": "k\n\udcff"}).clients["a"].keys[0].value == b"k\n\xff"
    assert (
        refusal(text)
        == "f:2:24: clients.a.key_env: the environment has no variable A_KEY (set it, or give"
        " key_file)"
    )
    assert "the environment variable A_KEY is empty" in refusal(text, {"A_KEY": ""})


@posix_modes
@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600])
def test_key_credential_of_systemd_is_accepted_by_name_and_as_file(
    tmp_path: Path, mode: int
) -> None:
    """A file in $CREDENTIALS_DIRECTORY is accepted with every mode that a version of
    systemd gives it. It may be given by name or as a key file.
    """
    path = key_file(tmp_path / "ops", mode=mode)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}

    by_name = load_text(LISTEN + "clients: {a: {key_credential: ops}}\n", "f", environ)
    as_file = load_text(LISTEN + f"clients: {{a: {{key_file: {path}}}}}\n", "f", environ)

    assert by_name.clients["a"].keys[0].value == as_file.clients["a"].keys[0].value == b"the key"


@posix_modes
@pytest.mark.parametrize("mode", [0o444, 0o460])
def test_key_credential_open_beyond_group_read_is_refused(tmp_path: Path, mode: int) -> None:
    """The only permission that a credential may have beyond a key file's is reading by
    the group.
    """
    key_file(tmp_path / "ops", mode=mode)

    line = refusal(
        LISTEN + "clients: {a: {key_credential: ops}}\n", {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    )

    assert f"chmod 600 {tmp_path / 'ops'}" in line


@posix_modes
@pytest.mark.parametrize("mode", [0o444, 0o644, 0o440, 0o600])
def test_key_file_in_sealed_directory_may_be_readable_by_all(tmp_path: Path, mode: int) -> None:
    """A file in $BROKERD_SEALED_DIRECTORY may be readable by all users: as a key file,
    by name, and as a configuration.
    """
    path = key_file(tmp_path / "ops", mode=mode)
    file = key_file(tmp_path / "b.yaml", (LISTEN + "clients: {b: {key: inline}}\n").encode(), mode)
    environ = {"BROKERD_SEALED_DIRECTORY": str(tmp_path)}

    as_file = load_text(LISTEN + f"clients: {{a: {{key_file: {path}}}}}\n", "f", environ)
    by_name = load_text(LISTEN + "clients: {a: {key_credential: ops}}\n", "f", environ)

    assert as_file.clients["a"].keys[0].value == by_name.clients["a"].keys[0].value == b"the key"
    assert load(file, environ).clients["b"].keys[0].value == b"inline"


@posix_modes
@pytest.mark.parametrize("mode", [0o464, 0o446, 0o666])
def test_key_file_writable_or_outside_sealed_directory_is_refused(
    tmp_path: Path, mode: int
) -> None:
    """Only reading is allowed to other users, and only inside that directory."""
    path = key_file(tmp_path / "ops", mode=mode)
    text = LISTEN + f"clients: {{a: {{key_file: {path}}}}}\n"

    assert f"chmod 600 {path}" in refusal(text, {"BROKERD_SEALED_DIRECTORY": str(tmp_path)})
    path.chmod(0o444)
    assert f"chmod 600 {path}" in refusal(text, {"BROKERD_SEALED_DIRECTORY": f"{tmp_path}/secrets"})
    assert f"chmod 600 {path}" in refusal(text, {"BROKERD_SEALED_DIRECTORY": ""})


@posix_modes
def test_key_credential_path_outside_directory_is_refused(tmp_path: Path) -> None:
    """A path that leaves the credentials' directory doesn't get the wider permissions
    of a credential. This holds for '..' in a key file's path and for a path given as a
    name.
    """
    (tmp_path / "credentials").mkdir()
    key_file(tmp_path / "key", mode=0o440)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}

    by_file = refusal(
        LISTEN + f"clients: {{a: {{key_file: {tmp_path}/credentials/../key}}}}\n", environ
    )
    by_name = refusal(LISTEN + "clients: {a: {key_credential: ../key}}\n", environ)

    assert "chmod 600" in by_file
    assert "is not a valid credential name" in by_name


def test_key_credential_without_systemd_error_names_load_credential() -> None:
    """Where no credentials exist, the error says how systemd provides them."""
    assert (
        refusal(LISTEN + "clients: {a: {key_credential: ops}}\n")
        == "f:2:31: clients.a.key_credential: CREDENTIALS_DIRECTORY is not set "
        "(run under systemd with LoadCredential=NAME:PATH)"
    )


def test_key_file_missing_empty_or_invalid_is_one_error_line(tmp_path: Path) -> None:
    """A missing key file, a directory, an empty key file and an invalid path are one
    line each.
    """
    (tmp_path / "dir").mkdir()
    key_file(tmp_path / "empty", b"\n")

    def line(path: str) -> str:
        text = LISTEN + f'clients: {{a: {{key_file: "{path}"}}}}\n'
        return (
            refusal(text).removeprefix("f:2:25: clients.a.key_file: ").replace(f"{tmp_path}/", "")
        )

    assert line(f"{tmp_path}/no") == "there is no file no (make one: umask 077; brokerd key > no)"
    assert line(f"{tmp_path}/dir") == "dir is a directory (give the file that holds the key)"
    assert line(f"{tmp_path}/empty") == "empty is empty (write a key into it: brokerd key > empty)"
    assert line("a\\0b") == "is not a valid path (give the file that holds the key)"


def warnings(text: str, environ: dict[str, str] | None = None) -> list[str]:
    """Return the warnings for a text that is accepted."""
    return lint_warnings(load_text(text, "f", environ or {}), datetime.now(UTC))


AGAIN = "(write the key again: brokerd key > FILE)"


@pytest.mark.parametrize(
    ("content", "odd"),
    [
        (
            b"the key\n\n",
            (f"ends with a line break besides the one that is cut, and is used as it is {AGAIN}"),
        ),
        (
            b"the key\r",
            (f"ends with a line break besides the one that is cut, and is used as it is {AGAIN}"),
        ),
        (b"the key \n", f"ends with white space, and is used as it is {AGAIN}"),
        (b"the key\t", f"ends with white space, and is used as it is {AGAIN}"),
        (b" the key\n", f"begins with white space, and is used as it is {AGAIN}"),
        (b" \n", f"is only white space, and is used as it is {AGAIN}"),
        (
            b"\xef\xbb\xbfthe key\n",
            f"begins with a byte order mark, and is used as it is {AGAIN}",
        ),
        ("the key\n".encode("utf-16"), f"is UTF-16, and is used as it is {AGAIN}"),
        ("the key\n".encode("utf-16-le"), f"is UTF-16, and is used as it is {AGAIN}"),
        ("the key\n".encode("utf-16-be"), f"is UTF-16, and is used as it is {AGAIN}"),
        (
            "\ufeffthe key\r\n".encode("utf-16-be"),
            f"is UTF-16, and is used as it is {AGAIN}",
        ),
        (b"the key\n", ""),
        (b"the key\r\n", ""),
        (b"the key", ""),
        ("schl\u00fcssel\n".encode(), ""),
        (b"\xff\xfe\x00\xd8\x00\xd8 random", ""),
        (b"\x80random bytes may end so\n\n", ""),
        (b"a\0b\0\0\0c\0", ""),
        (b"a\0b", ""),
    ],
)
def test_key_file_with_stray_bytes_is_warned_of(tmp_path: Path, content: bytes, odd: str) -> None:
    """An editor or a shell may have added bytes to a key file. The configuration is
    accepted, but no client has that key, so a warning names the place.
    """
    key_file(tmp_path / "key", content)

    found = warnings(LISTEN + f"clients: {{a: {{key_file: {tmp_path}/key}}}}\n")

    assert found == ([f"f:2:25: a key of client 'a' {odd}"] if odd else [])
    assert "the key of" not in "".join(found)


def test_key_inline_or_env_with_stray_white_space_is_warned_of() -> None:
    """A block of text, and a variable that holds a line, end with a line break. The key
    then has it too.
    """
    text = (
        LISTEN + "clients:\n  a:\n    key: |\n      secret one\n  b: {key_env: B}\n"
        "  c: {keys: [{env: C}, {key: ' secret two'}]}\n"
    )

    assert warnings(text, {"B": "secret three\n", "C": "secret four"}) == [
        (
            "f:4:10: a key of client 'a' ends with a line break, and is used as it is "
            "(write it in one line, in quotes: not key: |)"
        ),
        (
            "f:6:16: a key of client 'b' ends with a line break, and is used as it is "
            "(set the variable to the key alone)"
        ),
        (
            "f:7:30: a key of client 'c' begins with white space, and is used as it is "
            "(write it in one line, in quotes: not key: |)"
        ),
    ]


@posix_modes
@pytest.mark.parametrize("mode", [0o440, 0o444])
def test_key_file_read_only_error_names_sealed_directory(tmp_path: Path, mode: int) -> None:
    """The mode of a mounted secret can't be changed by chmod. The error names the
    variable that allows it.
    """
    path = key_file(tmp_path / "key", mode=mode)

    line = refusal(LISTEN + f"clients: {{a: {{key_file: {path}}}}}\n")

    assert line.endswith(
        f"{path}, mode {mode:04o}, and it is not below BROKERD_SEALED_DIRECTORY, which is for"
        f" secrets that only this container sees (chmod 600 {path})"
    )


@posix_modes
def test_key_file_projected_by_kubernetes_error_names_sealed_directory(tmp_path: Path) -> None:
    """Kubernetes mounts secrets with mode 0644 by default, behind links that begin with
    dots.
    """
    (tmp_path / "..2026_01_01").mkdir()
    key_file(tmp_path / "..2026_01_01" / "key", mode=0o644)
    (tmp_path / "..data").symlink_to("..2026_01_01")
    (tmp_path / "key").symlink_to("..data/key")
    plain = key_file(tmp_path / "plain", mode=0o644)

    assert "BROKERD_SEALED_DIRECTORY" in refusal(
        LISTEN + f"clients: {{a: {{key_file: {tmp_path}/key}}}}\n"
    )
    assert "BROKERD_SEALED_DIRECTORY" not in refusal(
        LISTEN + f"clients: {{a: {{key_file: {plain}}}}}\n"
    )


def served_from(home: Path, uid: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the warnings for a configuration with keys that this user would serve."""
    file = home / "b.yaml"
    key_file(
        file, b"listen: [./b.sock]\nclients:\n  a: {key_file: keys/a}\n  b: {key_file: keys/b}\n"
    )
    (home / "keys").mkdir(exist_ok=True)
    for name in ("a", "b"):
        key_file(home / "keys" / name, name.encode())
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    return [
        line.replace(f"{home}/", "") for line in lint_warnings(load(file, {}), datetime.now(UTC))
    ]


@posix_modes
def test_key_file_of_own_user_has_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the broker's own user, in directories of its own, give no warning. Nor
    do they when root checks them.
    """
    assert served_from(tmp_path, os.getuid(), monkeypatch) == []
    assert served_from(tmp_path, 0, monkeypatch) == []


@posix_modes
def test_key_file_of_other_owner_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of a file, or of its directory, can replace the key. Each directory and
    owner gives one warning.
    """
    stat = os.stat

    class Foreign:
        """The status of a file that belongs to another user."""

        def __init__(self, status: os.stat_result) -> None:
            self.st_mode, self.st_uid = status.st_mode, 4711

    def foreign(path: Any, **how: Any) -> Any:
        status = stat(path, **how)
        return Foreign(status) if str(path).startswith(f"{tmp_path}/keys/") else status

    monkeypatch.setattr(os, "stat", foreign)

    assert served_from(tmp_path, os.getuid(), monkeypatch) == [
        (
            "b.yaml:3:17: keys/a belongs, as 1 more there do, to user 4711, who can replace it "
            "(give it to root, or to the broker's user)"
        )
    ]


@posix_modes
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_key_file_in_directory_writable_by_all_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Every user could put another file there, even where the sticky bit is set. Each
    directory gives one warning.
    """
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys").chmod(mode)

    assert served_from(tmp_path, os.getuid(), monkeypatch) == [
        (
            "b.yaml:3:17: every user can write to the directory keys, which holds keys/a "
            "(move it to a directory of the broker's own)"
        )
    ]


@posix_modes
def test_config_below_directory_writable_by_all_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the sticky bit a directory on the way could be replaced. With it, only
    files directly in the open directory are at risk.
    """
    home = tmp_path / "open" / "home"
    home.mkdir(parents=True, mode=0o700)
    (tmp_path / "open").chmod(0o777)
    found = served_from(home, os.getuid(), monkeypatch)
    assert [f"the directory {tmp_path}/open, " in line for line in found] == [True]

    (tmp_path / "open").chmod(0o1777)
    assert served_from(home, os.getuid(), monkeypatch) == []


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root gives files away")
def test_key_file_of_other_user_in_root_directory_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For root, a file of another user in root's directory is suspect. A file in that
    user's own directory belongs to the broker's user.
    """
    assert served_from(tmp_path, 0, monkeypatch) == []
    os.chown(tmp_path / "keys" / "a", 4711, -1)
    (line,) = [
        line.replace(f"{tmp_path}/", "")
        for line in lint_warnings(load(tmp_path / "b.yaml", {}), datetime.now(UTC))
    ]
    assert line.startswith("b.yaml:3:17: keys/a belongs to user 4711, who can replace it")
    os.chown(tmp_path / "keys", 4711, -1)
    assert lint_warnings(load(tmp_path / "b.yaml", {}), datetime.now(UTC)) == []


def test_key_shared_by_two_clients_is_refused(tmp_path: Path) -> None:
    """Two clients with the same key are an error that names both. It doesn't matter
    where the keys come from or when they are valid.
    """
    key_file(tmp_path / "key", b"the same\n")
    text = (
        LISTEN + "clients:\n"
        f"  a: {{key_file: {tmp_path / 'key'}}}\n"
        "  b: {keys: [{key: fine}, {key: the same, not_after: 2001-01-01}]}\n"
    )

    assert (
        refusal(text) == "f:4:33: clients.b.keys[1].key: has the same key as client 'a' at f:3:17 "
        "(give each client a key of its own: brokerd key)"
    )


@pytest.mark.parametrize(
    "clients",
    ["  ops: {peer_uid: [0]}\n  a: {key: ops}\n", "  a: {key: ops}\n  ops: {peer_uid: [0]}\n"],
)
def test_key_equal_to_name_of_keyless_client_is_refused(clients: str) -> None:
    """A client without a key uses its name as one. Names aren't secret, so a client with
    that key could connect as the other.

    The key and the name are the same text, and the error doesn't contain it.
    """
    (line,) = refusal(LISTEN + "clients:\n" + clients).splitlines()

    place, where, what = line.split(": ", 2)
    a, ops = (3, 4) if "  a: {key: ops}\n" + "  ops" in clients else (4, 3)
    assert (place, where) == (f"f:{a}:12", "clients.a.key")
    assert (
        what == f"is the name of the client at f:{ops}:3, which has no key and uses its name: names"
        " are not secret (give each client a key of its own: brokerd key)"
    )


def test_key_equal_to_name_of_client_with_key_is_accepted() -> None:
    """Such a key is weak, but endangers no other client: only a client without a key
    uses its name.
    """
    assert (
        len(load_text(LISTEN + "clients: {ops: {key: k, peer_uid: [0]}, a: {key: ops}}\n").clients)
        == 2
    )


def test_key_repeated_by_one_client_is_accepted() -> None:
    """Two clients can't share a key, but one client may repeat its own."""
    config = load_text(
        LISTEN + "clients: {a: {keys: [{key: k, not_after: 2001-01-01}, {key: k}]}}\n"
    )

    assert len(config.clients["a"].keys) == 2


def test_key_within_validity_window_is_valid() -> None:
    """A key is valid from not_before to not_after, both included. Without them it is
    always valid.
    """
    now = datetime(2026, 6, 1, tzinfo=UTC)
    second = timedelta(seconds=1)

    assert Key(b"k").valid_at(now)
    assert Key(b"k", not_before=now, not_after=now).valid_at(now)
    assert not Key(b"k", not_before=now + second).valid_at(now)
    assert not Key(b"k", not_after=now - second).valid_at(now)
    assert Key(b"k", not_after=now - second).expired_at(now)
    assert not Key(b"k", not_before=now + second).expired_at(now)


def test_key_validity_time_without_zone_is_utc() -> None:
    """Times may have a zone, in YAML or as text. Without a zone they are UTC."""
    text = (
        "clients: {a: {keys: [{key: k, not_before: 2026-01-01 10:00:00, not_after:"
        " 2026-01-01T13:00:00+02:00},\n  {key: l, not_before: '2026-01-01', not_after:"
        " '2026-01-02T00:00Z'}]}}\n"
    )

    first, second = load_text(LISTEN + text).clients["a"].keys

    assert first.not_before == datetime(2026, 1, 1, 10, tzinfo=UTC)
    assert first.not_after == datetime(2026, 1, 1, 11, tzinfo=UTC)
    assert second.not_before == datetime(2026, 1, 1, tzinfo=UTC)
    assert second.not_after == datetime(2026, 1, 2, tzinfo=UTC)


def test_key_expired_stays_and_is_warned_of() -> None:
    """A client whose keys have all expired is kept, with a warning. A client with a
    valid key gives no warning.
    """
    now = datetime(2026, 6, 1, tzinfo=UTC)
    config = load_text(
        LISTEN + "clients:\n"
        "  a: {keys: [{key: k, not_after: 2026-01-01}, {key: l, not_after: 2026-02-01}]}\n"
        "  b: {keys: [{key: m, not_after: 2026-01-01}, {key: n}]}\n"
        "  c: {keys: [{key: o, not_before: 2027-01-01}, {key: p, not_after: 2026-01-01}]}\n",
        "f",
    )

    assert len(config.clients["a"].keys) == 2
    assert lint_warnings(config, now) == [
        (
            "f:3: client 'a' can't connect: its last key expired at 2026-02-01T00:00:00+00:00 (give"
            " it a new one)"
        ),
        (
            "f:5: client 'c' can't connect now: none of its keys is valid at this time (see"
            " not_before, not_after)"
        ),
    ]


def test_config_without_clients_or_with_unknown_group_is_warned_of() -> None:
    """A configuration without clients, or with a group that this machine doesn't have,
    is accepted with a warning.
    """
    config = load_text("listen: [{address: /run/b.sock, group: no such group}]\n", "f")

    assert lint_warnings(config, datetime.now(UTC)) == [
        "f:1: this machine has no group 'no such group' (make it, or give another)",
        "f: there are no clients, so no connection is accepted (add some to clients:)",
    ]


def test_key_id_differs_by_key_and_is_not_plain_digest() -> None:
    """The same key always has the same id, and different keys have different ids. The
    id is not a plain digest of the key.
    """
    import hashlib

    assert Key(b"k").key_id == Key(b"k", not_after=datetime.now(UTC)).key_id
    assert Key(b"k").key_id != Key(b"l").key_id
    assert len(Key(b"k").key_id) == 8
    assert not hashlib.sha256(b"k").hexdigest().startswith(Key(b"k").key_id)
