"""The command brokerd, as it is typed: its output, its exit status, and what it must
not do.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import trustme
import yaml
from click.testing import CliRunner, Result

from brokerd import __version__
from brokerd.cli.main import main
from brokerd.config.load import load
from brokerd.core.compiled import why_sources
from brokerd.daemon import process

GOOD = "listen: [b.sock]\nclients:\n  alice: {key: a}\n  bob: {key: b}\n"
BAD = "listen: [b.sock]\nclients:\n  alice: {kye: a}\n  bob: {key: b, send_to: [alcie]}\n"


def brokerd(*arguments: str | Path, **environ: str) -> Result:
    """Run the command in this process, with no configuration in the environment unless
    it is given.
    """
    env = {"BROKERD_CONFIG": None, "BROKERD_CONFIG_YAML": None, **environ}
    return CliRunner().invoke(main, list(map(str, arguments)), env=env)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """Write a configuration that only its owner can read."""
    path.write_text(text)
    path.chmod(mode)
    return path


def test_check_valid_file_prints_ok_and_addresses(tmp_path: Path) -> None:
    """It prints one line on standard output, and one for each address; the exit status
    is 0.
    """
    file = write(tmp_path / "b.yaml", GOOD)

    result = brokerd("check", file)

    expected = (
        f"{file}: ok, 2 clients, 1 listener\n  listens at {tmp_path}/b.sock (Unix socket, mode"
        " 0600)\n"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected, "")


def test_check_lists_every_kind_of_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is printed as an absolute one, so that a file in the wrong place
    is noticed.
    """
    monkeypatch.chdir(tmp_path)
    authority = trustme.CA()
    issued = authority.issue_cert("broker.example")
    Path("key.pem").touch(mode=0o600)
    issued.private_key_pem.write_to_path("key.pem")
    issued.cert_chain_pems[0].write_to_path("cert.pem")
    tls = "{address: '[::1]:6001', tls: {certificate: cert.pem, key: key.pem}}"
    text = (
        "listen: [./6000, {address: run/b, mode: '0660'}, localhost:6000, '@b', %s]\nmonitor: %s\n"
    )

    for monitor, shown in (("127.0.0.1:6060", "127.0.0.1:6060"), ("./page", f"{tmp_path}/page")):
        write(Path("b.yaml"), text % (tls, monitor) + "clients: {a: {key: k}}\n")
        assert brokerd("check", "b.yaml").stdout.splitlines() == [
            "b.yaml: ok, 1 client, 5 listeners",
            f"  listens at {tmp_path}/6000 (Unix socket, mode 0600)",
            f"  listens at {tmp_path}/run/b (Unix socket, mode 0660)",
            "  listens at localhost:6000 (TCP)",
            "  listens at @b (Unix socket without a file)",
            "  listens at [::1]:6001 (TLS)",
            f"  monitor at {shown} (HTTP)",
        ]


def test_check_names_include_pattern_without_files(tmp_path: Path) -> None:
    """That is no mistake, and stands with the addresses, not with the warnings."""
    (tmp_path / "clients.d").mkdir()
    file = write(tmp_path / "b.yaml", GOOD + "include: ['clients.d/*.yml']\n")

    result = brokerd("check", file)

    assert (result.exit_code, result.stderr) == (0, "")
    expected = f"  {file}:5:11: no file matches clients.d/*.yml"
    assert result.stdout.splitlines()[-1] == expected


def test_check_warns_of_address_where_broker_can_not_listen(tmp_path: Path) -> None:
    """The warning has the place of the address, and the exit status is 0."""
    (tmp_path / "b.sock").touch()
    file = write(tmp_path / "b.yaml", GOOD)

    result = brokerd("check", file)

    assert result.exit_code == 0
    warning = f"warning: {file}:1: can't listen at {tmp_path / 'b.sock'}: a file that is not"
    assert result.stderr.startswith(warning)


def test_check_ambiguous_address_is_refused(tmp_path: Path) -> None:
    """A port alone, a host alone and a path behind a scheme do not become socket files.
    Each error says what is missing.
    """
    file = write(
        tmp_path / "b.yaml",
        'listen: ["6000", localhost, 127.0.0.1, "unix:/run/b.sock", {address: sock}]\n'
        "monitor: localhost\nclients: {a: {key: k}}\n",
    )

    result = brokerd("check", file)

    assert (result.exit_code, result.stdout) == (78, "")
    assert [line.split(": ", 1)[1] for line in result.stderr.splitlines()] == [
        "listen[0]: 6000 is a port without a host (give HOST:6000, such as localhost:6000)",
        (
            "listen[1]: 'localhost' has no port (give localhost:PORT, or ./localhost for the path"
            " of a Unix socket)"
        ),
        (
            "listen[2]: '127.0.0.1' has no port (give 127.0.0.1:PORT, or ./127.0.0.1 for the path"
            " of a Unix socket)"
        ),
        "listen[3]: 'unix:/run/b.sock' is not a valid address (give /run/b.sock without 'unix:')",
        (
            "listen[4].address: 'sock' has no port (give sock:PORT, or ./sock for the path of a"
            " Unix socket)"
        ),
        (
            "monitor: 'localhost' has no port (give localhost:PORT, or ./localhost for the path of"
            " a Unix socket)"
        ),
    ]


def test_package_runs_like_command(tmp_path: Path) -> None:
    """``python -m brokerd`` is the command, name and exit status included."""
    this = [sys.executable, "-m", "brokerd"]
    version = subprocess.run(
        [*this, "--version"], capture_output=True, text=True, check=False, timeout=30
    )
    assert (version.returncode, version.stdout, version.stderr) == (
        0,
        brokerd("--version").stdout,
        "",
    )
    check = subprocess.run(
        [*this, "check", str(write(tmp_path / "b.yaml", BAD))],
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert check.returncode == 78


def test_check_invalid_file_prints_every_mistake_and_exits_78(tmp_path: Path) -> None:
    """The mistakes are lines on standard error, and nothing is on standard output."""
    file = write(tmp_path / "b.yaml", BAD)

    result = brokerd("check", file)

    assert (result.exit_code, result.stdout) == (78, "")
    assert result.stderr.splitlines() == [
        f"{file}:3:11: clients.alice.kye: unknown key 'kye' (did you mean 'key'?)",
        f"{file}:4:27: clients.bob.send_to[0]: there is no client 'alcie' (did you mean 'alice'?)",
    ]


def test_check_with_warnings_prints_them_and_exits_0(tmp_path: Path) -> None:
    """A setting that is odd but allowed is a warning on standard error."""
    file = write(
        tmp_path / "b.yaml",
        "listen: [b.sock]\nclients: {a: {keys: [{key: k, not_after: 2001-01-01}]}}\n",
    )

    result = brokerd("check", file)

    assert (result.exit_code, result.stdout.splitlines()[0]) == (
        0,
        f"{file}: ok, 1 client, 1 listener",
    )
    assert re.fullmatch(
        rf"warning: {re.escape(str(file))}:2: client 'a' can't connect: .* \(.*\)\n", result.stderr
    )


def test_check_file_comes_from_argument_then_option_then_environment(tmp_path: Path) -> None:
    """check takes FILE, then --config, then $BROKERD_CONFIG; without any,
    /etc/brokerd/brokerd.yaml.
    """
    files = [write(tmp_path / f"{name}.yaml", GOOD) for name in "abc"]
    argument, option, variable = map(str, files)

    def checked(*arguments: str, **environ: str) -> str:
        return brokerd(*arguments, **environ).stdout.partition(":")[0]

    assert checked("--config", option, "check", argument, BROKERD_CONFIG=variable) == argument
    assert checked("--config", option, "check", BROKERD_CONFIG=variable) == option
    assert checked("check", BROKERD_CONFIG=variable) == variable
    assert "/etc/brokerd/brokerd.yaml" in brokerd("--help").stdout


def test_check_with_memory_prints_limits_and_their_sum(tmp_path: Path) -> None:
    """It prints a line for each part and one for all. A bigger queue increases its part
    and the sum.
    """

    def sizes(queue: str) -> dict[str, int]:
        file = tmp_path / f"{queue}.yaml"
        file.touch(mode=0o600)
        file.write_text(f"listen: [./s]\nclients: {{a: {{key: k, queue: {queue}}}}}\n")
        lines = brokerd("check", "--memory", file).output.splitlines()[2:]
        return {line[:18].strip(): int(line.split()[-2].replace(",", "")) for line in lines}

    small, big = sizes("16MiB"), sizes("116MiB")
    assert big["queues"] - small["queues"] == big["at most"] - small["at most"] >= 100
    # Each number is rounded separately.
    assert abs(sum(small.values()) - 2 * small["at most"]) <= len(small)


def test_check_with_memory_counts_every_channel(tmp_path: Path) -> None:
    """Each holds a buffer in each direction. A channel counts for two clients, and all of
    them for `limits.channels`.
    """

    def size(each: int, all_: int) -> int:
        file = tmp_path / f"{each}-{all_}.yaml"
        file.touch(mode=0o600)
        clients = f"{{a: {{key: k, channels: {each}}}, b: {{key: l, channels: {each}}}}}"
        file.write_text(f"listen: [./s]\nclients: {clients}\nlimits: {{channels: {all_}}}\n")
        output = brokerd("check", "--memory", file).output
        [line] = [line for line in output.splitlines() if line.split()[0] == "channels"]
        return int(line.split()[-2].replace(",", ""))

    assert size(0, 1000) == 0
    assert size(200, 1000) == size(1000, 200) >= 200 * 2 * 256 // 1024


def test_check_opens_no_socket_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check leaves the directory unchanged and never opens a socket."""
    file = write(tmp_path / "b.yaml", GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", refuse)
    before = sorted(path.name for path in tmp_path.iterdir())

    assert brokerd("check", file).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_run_passes_configuration_to_daemon_and_returns_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a command the daemon runs with the file, and its exit status is the
    command's.
    """
    ran: list[Path] = []

    def run(path: Path) -> int:
        ran.append(path)
        return 7

    monkeypatch.setattr(process, "run", run)

    assert brokerd("--config", tmp_path / "a.yaml").exit_code == 7
    assert brokerd(BROKERD_CONFIG=str(tmp_path / "b.yaml")).exit_code == 7
    assert brokerd().exit_code == 7
    assert ran == [tmp_path / "a.yaml", tmp_path / "b.yaml", Path("/etc/brokerd/brokerd.yaml")]


@pytest.mark.parametrize(
    "arguments", [["--config", "b.yaml"], ["check", "b.yaml"], ["--config", "b.yaml", "check"]]
)
def test_run_and_check_invalid_file_exit_78_without_traceback(
    tmp_path: Path, arguments: list[str]
) -> None:
    """In a process of its own, each prints plain lines on standard error."""
    write(tmp_path / "b.yaml", BAD)

    done = subprocess.run(
        [sys.executable, "-m", "brokerd.cli.main", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout) == (78, "")
    assert [line.split(" ")[0] for line in done.stderr.splitlines()] == [
        "b.yaml:3:11:",
        "b.yaml:4:27:",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["b.yaml"]


def test_run_and_check_invalid_ip_address_exit_78(tmp_path: Path) -> None:
    """Brackets around an invalid IPv6 address, and four numbers that are not an IPv4
    address, are mistakes of the file.
    """
    write(
        tmp_path / "b.yaml",
        "listen: ['[zz]:5', 1.2.3.999:5]\nmonitor: 1.2.3.999:6\nclients: {a: {key: k}}\n",
    )

    for command in ([], ["check"]):
        result = CliRunner().invoke(main, ["--config", str(tmp_path / "b.yaml"), *command])
        assert result.exit_code == 78
        assert [line.split(" ", 1)[1].split(" (")[0] for line in result.stderr.splitlines()] == [
            "listen[0]: 'zz' is not a valid IPv6 address",
            "listen[1]: '1.2.3.999' is not a valid IPv4 address",
            "monitor: '1.2.3.999' is not a valid IPv4 address",
        ]


def test_run_and_check_missing_file_print_one_line_and_exit_78(tmp_path: Path) -> None:
    """A file that does not exist is one line and 78, for run and check."""
    for arguments in (["--config", tmp_path / "no.yaml"], ["check", tmp_path / "no.yaml"]):
        done = subprocess.run(
            [sys.executable, "-m", "brokerd.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 78
        assert re.fullmatch(
            r"\S+no\.yaml:1:1: \(file\): there is no file \S+ \(.*\)\n", done.stderr
        )


def test_key_prints_32_random_bytes() -> None:
    """brokerd key prints one line of base64url that is 32 bytes, another one each time."""
    keys = {brokerd("key").stdout for _ in range(5)}

    assert len(keys) == 5
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", key)
        assert len(base64.urlsafe_b64decode(key.strip() + "=")) == 32


@pytest.mark.skipif(os.name != "posix", reason="the command is for a shell")
@pytest.mark.parametrize("name", ["alice", "on", "123", "a.b-c"])
def test_key_with_name_prints_command_and_yaml_that_work(tmp_path: Path, name: str) -> None:
    """With a NAME it prints a shell command and YAML; pasted unchanged, they define a
    client with that key.
    """
    result = brokerd("key", name)

    key, _, text = result.stdout.partition("\n")
    command = re.search(r"#   (\(umask.*\))\n", text)
    assert command is not None
    subprocess.run(["sh", "-c", command[1]], cwd=tmp_path, check=True)
    file = write(tmp_path / "b.yaml", "listen: [b.sock]\n" + text, mode=0o644)
    config = load(file)
    assert [(client.name, client.keys[0].value) for client in config.clients.values()] == [
        (name, key.encode())
    ]
    assert list(yaml.safe_load(text)) == ["clients"]


def test_key_with_invalid_name_is_usage_error() -> None:
    """An invalid NAME is a mistake in the command, and no key is generated."""
    result = brokerd("key", "a b")

    assert result.exit_code == 2
    assert "'a b' is not a valid client name" in result.stderr
    assert result.stdout == ""


def test_schema_prints_valid_json_schema() -> None:
    """brokerd schema prints a valid JSON Schema and nothing else."""
    result = brokerd("schema")

    schema = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]) == {
        "listen",
        "clients",
        "include",
        "limits",
        "log",
        "monitor",
        "store",
        "cluster",
    }


def test_version_option_prints_version() -> None:
    """--version prints the version, and which routing loop runs."""
    version, routing = brokerd("--version").stdout.splitlines()

    assert version == f"brokerd, version {__version__}"
    assert routing.partition(":")[0] in ("routing=compiled", "routing=python")


def test_version_option_with_slow_loop_gives_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """--version says why the loop in Python runs: what was missing has a package."""
    monkeypatch.delenv("BROKERD_PURE", raising=False)
    monkeypatch.setattr("brokerd.core.WHY_SOURCES", why_sources("/nowhere"))

    routing = brokerd("--version").stdout.splitlines()[1]

    assert routing.startswith("routing=python: ")
    assert "apt install gcc python3-dev" in routing


def test_check_and_key_import_no_event_loop() -> None:
    """check and key start fast: neither imports asyncio nor the daemon."""
    for arguments in (["key"], ["check", "/nonexistent.yaml"]):
        code = (
            f"import sys\nfrom brokerd.cli.main import main\ntry: main({arguments!r})\nexcept"
            " SystemExit: pass\nprint([name for name in ('asyncio', 'brokerd.daemon.daemon',"
            " 'structlog', 'rich') if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_check_reads_configuration_from_environment() -> None:
    """BROKERD_CONFIG_YAML holds the configuration itself. Mistakes are reported under
    its name, and --config overrides it.
    """
    text = "listen: [b.sock]\nclients: {a: {key_env: A_KEY}}\n"

    good = brokerd("check", BROKERD_CONFIG_YAML=text, A_KEY="k")
    bad = brokerd("check", BROKERD_CONFIG_YAML=text)
    other = brokerd("--config", "/no/such", "check", BROKERD_CONFIG_YAML=text, A_KEY="k")

    first, where = good.stdout.splitlines()
    assert (good.exit_code, first) == (0, "$BROKERD_CONFIG_YAML: ok, 1 client, 1 listener")
    assert where == f"  listens at {Path.cwd()}/b.sock (Unix socket, mode 0600)"
    assert bad.exit_code == 78
    assert (
        bad.stderr
        == "$BROKERD_CONFIG_YAML:2:24: clients.a.key_env: the environment has no variable A_KEY "
        "(set it, or give key_file)\n"
    )
    assert "there is no file /no/such" in other.stderr


def test_check_with_file_and_text_in_environment_is_refused(tmp_path: Path) -> None:
    """A file and a text that are both set are refused; an empty text counts as not set."""
    file = write(tmp_path / "b.yaml", GOOD)

    both = brokerd("check", BROKERD_CONFIG=str(file), BROKERD_CONFIG_YAML=GOOD)
    empty = brokerd("check", BROKERD_CONFIG=str(file), BROKERD_CONFIG_YAML="")

    assert (both.exit_code, both.stderr) == (
        78,
        (
            "BROKERD_CONFIG and BROKERD_CONFIG_YAML are both set (keep one: a file, or the text"
            " itself)\n"
        ),
    )
    assert empty.exit_code == 0


@pytest.mark.skipif(
    Path("/etc/brokerd/brokerd.yaml").exists(), reason="this machine has a configuration of its own"
)
def test_run_without_configuration_names_every_way_to_give_one() -> None:
    """The message lists the places that are searched, and the exit status is 78."""
    result = brokerd()

    assert (result.exit_code, result.stdout) == (78, "")
    assert (
        result.stderr
        == "/etc/brokerd/brokerd.yaml:1:1: (file): there is no file /etc/brokerd/brokerd.yaml"
        " (write or mount one there, name another with --config or in BROKERD_CONFIG, or put its"
        " text into BROKERD_CONFIG_YAML; brokerd demo needs none)\n"
    )


@pytest.mark.parametrize("file", ["broker.yaml", "missing.yml", "there"])
def test_file_in_place_of_command_suggests_config_option(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`brokerd FILE` is answered with `brokerd --config FILE`; any other word is only
    an unknown command.
    """
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "there", GOOD)

    slip, other = brokerd(file), brokerd("chekc")

    assert (slip.exit_code, other.exit_code) == (2, 2)
    assert f"To run the broker with this file: brokerd --config {file}\n" in slip.stderr
    assert "--config" not in other.stderr.rpartition("Error:")[2]
