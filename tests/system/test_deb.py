"""The Debian package, as `make deb` builds it: installed, upgraded, removed and purged
on booted machines without a network.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support.system import machine as machines
from support.system.machine import ROOT, Machine, boot
from support.system.packages import install_missing

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

PLACE: Final = "/mnt/packages"
NEWER: Final = "0.1.0+1"
BUILD_TIMEOUT_S: Final = 800
#: Below them, nothing of the package may be left.
TREES: Final = ("/etc", "/usr", "/var", "/run", "/opt", "/srv")
#: What dpkg, apt, systemd and the journal themselves write.
ELSEWHERE: Final = (
    "/run/systemd|/run/log|/run/lock|/run/credentials|/run/user|/var/log|/var/cache|/var/lib/dpkg"
    "|/var/lib/apt|/var/lib/systemd/(timers|catalog|random)|/etc/(passwd|group|shadow|gshadow)"
    "|/etc/.pwd.lock|/usr/lib/python3"
)


#: Debian has in packages of its own what the RPM package needs.
RPM_OF_BASE: Final = """
Name: base
Version: 1
Release: 1
Summary: What the system has
License: MIT
BuildArch: noarch
Provides: /bin/sh, python(abi) = 3.13, systemd = 257
%description
What the system has.
%files
"""


def build() -> Path:
    """Return the package that `make deb` builds."""
    done = subprocess.run(
        ["make", "--no-print-directory", "deb"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ROOT / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The package as it is built, and one of a later version with the same files.

    With BROKERD_TEST_DEB in the environment, that package is taken.
    """
    machines.need()
    if not shutil.which("dpkg-deb"):
        pytest.skip("there is no dpkg-deb to build with")
    built = Path(os.environ.get("BROKERD_TEST_DEB") or build())
    folder = tmp_path_factory.mktemp("packages")
    folder.chmod(0o755)
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", built, tree], check=True, timeout=60)
    control = tree / "DEBIAN" / "control"
    text = control.read_text()
    control.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {NEWER}", text))
    newer = folder / "newer.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", tree, newer],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    shutil.rmtree(tree)
    return {"built": Path(shutil.copy(built, folder / "built.deb")), "newer": newer}


@pytest.fixture(scope="module", params=list(machines.PYTHONS))
def bare(request: pytest.FixtureRequest, packages: dict[str, Path]) -> Iterator[Machine]:
    """A booted Debian that has nothing of the project but the packages, in a directory."""
    with boot(request.param, project=False, binds={packages["built"].parent: PLACE}) as machine:
        yield machine


@pytest.fixture
def installed(bare: Machine) -> Iterator[Machine]:
    """The machine with the package installed; it is purged afterwards."""
    apt(bare, "install", f"{PLACE}/built.deb")
    yield bare
    apt(bare, "purge", "brokerd")


def apt(machine: Machine, *command: str) -> str:
    environment = ("env", "DEBIAN_FRONTEND=noninteractive")
    return machine.run(*environment, "apt-get", "-y", "-q", *command, timeout_s=300)


def files(machine: Machine) -> set[str]:
    """Return what is in the trees, without what the system itself writes there."""
    listed = machine.run("find", *TREES, "-xdev", "-print", status=None).splitlines()
    return {path for path in listed if not re.match(ELSEWHERE, path)}


def test_deb_install_gives_running_service_that_root_administers(installed: Machine) -> None:
    """`brokerctl ping` works at once for root, with the compiled loop; the broker starts
    at a boot; the configuration has no mistake and no warning.
    """
    assert "ops: " in installed.run("brokerctl", "ping")
    assert installed.run("systemctl", "is-enabled", "brokerd").strip() == "enabled"
    assert "routing=compiled" in installed.run("brokerd", "--version")
    assert "warning" not in installed.run("brokerd", "check")
    (started,) = installed.journal("brokerd.service", "BROKERD_EVENT=daemon.started")
    command = installed.run("systemctl", "show", "--property=ExecStart", "brokerd")
    assert "path=/usr/bin/brokerd " in command
    assert "compiled" in started["MESSAGE"]
    assert "uvloop" in started["MESSAGE"]
    assert installed.run("stat", "-c", "%a %U:%G", "/etc/brokerd").strip() == "750 root:brokerd"
    conffiles = installed.run("dpkg-query", "--showformat=${Conffiles}", "--show", "brokerd")
    assert conffiles.split()[0] == "/etc/brokerd/brokerd.yaml"


def test_deb_install_has_manual_pages_and_completions(installed: Machine) -> None:
    """Each command has its page, and a completion for each shell."""
    for name, section in (("brokerd", 8), ("brokerctl", 1)):
        page = installed.run("zcat", f"/usr/share/man/man{section}/{name}.{section}.gz")
        assert page.startswith(f".TH {name.upper()} {section} ")
    words = "COMP_WORDS='brokerctl pi' COMP_CWORD=1 _BROKERCTL_COMPLETE=bash_complete brokerctl"
    assert "ping" in installed.run("bash", "-c", words)
    script = "/usr/share/bash-completion/completions/brokerctl"
    assert "brokerctl" in installed.run("bash", "-c", f". {script} && complete -p brokerctl")


def test_deb_clients_are_added_and_removed_as_printed(installed: Machine) -> None:
    """Each command that `brokerd key` prints works as it stands."""
    added = installed.run("brokerd", "key", "--add", "alice").splitlines()
    assert added[1] == "Next: brokerctl reload"
    installed.run("brokerctl", "reload")
    assert "alice: " in installed.run("sh", "-c", added[-1])
    removed = installed.run("brokerd", "key", "--remove", "alice").splitlines()
    assert removed[1].endswith(": brokerctl reload")
    assert "- client alice" in installed.run("brokerctl", "reload")


def test_deb_check_by_root_warns_of_key_that_service_can_not_read(installed: Machine) -> None:
    """Root can read it, the broker can't: the reload would be refused."""
    installed.run("brokerd", "key", "--add", "alice")
    assert "warning" not in installed.run("brokerd", "check")

    installed.run("chown", "root:root", "/etc/brokerd/keys/alice")

    assert "the service's user 'brokerd' can't read /etc/brokerd/keys/alice" in installed.run(
        "brokerd", "check"
    )


def test_operations_page_install_commands_work_in_order(installed: Machine) -> None:
    """The commands of docs/operations.md, "Install", that follow the installation."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("\n## Install\n")[2].partition("\n## ")[0]
    first, second = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)

    assert first.splitlines()[-1] == "brokerctl ping"
    printed = installed.run("sh", "-e", "-c", second)

    assert "+ client alice" in printed
    assert "alice: " in printed
    assert "- client alice" in printed


#: Inside: stays connected as alice without reconnecting, and answers each line.
STAYS = """
import sys; sys.path.insert(0, "/usr/lib/brokerd/python%d.%d" % sys.version_info[:2])
import brokerd, brokerd_client
options = {"name": "alice", "key_file": "/etc/brokerd/keys/alice", "reconnect": False}
with brokerd_client.connect(**options) as alice:
    for line in sys.stdin:
        print(alice.request("$broker", {"op": "whoami"}, timeout=10).payload["address"], flush=True)
"""


@contextlib.contextmanager
def staying(machine: Machine) -> Iterator[Any]:
    """Yield a function that returns the address of one client that stays connected."""
    client = subprocess.Popen(
        machine.command("/usr/bin/python3", "-B", "-c", STAYS),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    stdin, stdout = client.stdin, client.stdout
    assert stdin is not None
    assert stdout is not None

    def ask() -> str:
        stdin.write("\n")
        stdin.flush()
        return stdout.readline().strip()

    with client:
        try:
            yield ask
        finally:
            client.kill()


@pytest.mark.parametrize("is_admin", [True, False], ids=["admin", "signal"])
def test_deb_upgrade_replaces_broker_without_disconnect(installed: Machine, is_admin: bool) -> None:
    """The process is another one, the connection is the same, and a changed
    configuration is kept. Without an administrator, a signal does it.
    """
    installed.run("brokerd", "key", "--add", "alice")
    installed.run("brokerctl", "reload")
    config = "/etc/brokerd/brokerd.yaml"
    if not is_admin:
        installed.run("sed", "-i", "/ops:/d; s/^clients:/# nobody/", config)
    before = installed.show("brokerd.service", "MainPID", "NRestarts")
    with staying(installed) as ask:
        assert ask() == "alice"
        apt(installed, "install", f"{PLACE}/newer.deb")
        assert ask() == "alice"
    after = installed.show("brokerd.service", "MainPID", "NRestarts", "ActiveState")
    assert after["MainPID"] != before["MainPID"]
    assert (after["NRestarts"], after["ActiveState"]) == (before["NRestarts"], "active")
    version = installed.run("dpkg-query", "--showformat=${Version}", "--show", "brokerd")
    assert version == NEWER
    assert ("ops:" in installed.run("cat", config)) == is_admin


def give_mailbox(machine: Machine, name: str) -> None:
    """Add a client with a mailbox, as docs/mailboxes.md tells."""
    machine.run("brokerd", "key", "--add", name)
    entry = f"/etc/brokerd/clients.d/{name}.yaml"
    machine.run("sed", "-i", f"/{name}:/a\\    mailbox: true", entry)
    assert "warning" not in machine.run("brokerd", "check")
    machine.run("brokerctl", "reload")


def send(machine: Machine, payload: str) -> None:
    """Send a message from alice to bob."""
    key = "/etc/brokerd/keys/alice"
    machine.run("brokerctl", "send", "--name", "alice", "--key-file", key, "bob", payload)


def test_deb_mailboxes_are_kept_by_upgrade_restart_and_removal(installed: Machine) -> None:
    """The sandbox lets the store work, without any setting of its own; root can check it."""
    installed.run("brokerd", "key", "--add", "alice")
    give_mailbox(installed, "bob")
    send(installed, "first")
    assert installed.run("stat", "-c", "%a %U", "/var/lib/brokerd").strip() == "700 brokerd"

    apt(installed, "install", f"{PLACE}/newer.deb")
    send(installed, "second")
    installed.run("systemctl", "restart", "brokerd")
    send(installed, "third")
    assert installed.run("brokerctl", "mailbox", "list").split()[:2] == ["bob", "3"]
    backup = "/var/tmp/mailboxes"
    assert "3 messages" in installed.run("brokerd", "store", "backup", backup)
    installed.run("rm", backup)
    apt(installed, "remove", "brokerd")
    apt(installed, "install", f"{PLACE}/built.deb")

    listed = installed.run("brokerctl", "mailbox", "show", "bob")
    assert [line.split()[0] for line in listed.splitlines()] == ["1", "2", "3"]


def test_deb_upgrade_of_broken_configuration_keeps_broker_and_says_so(installed: Machine) -> None:
    """The old process goes on, and the output has the mistake."""
    before = installed.show("brokerd.service", "MainPID")
    installed.run("sh", "-c", "echo 'limts: {}' >> /etc/brokerd/brokerd.yaml")

    printed = apt(installed, "install", f"{PLACE}/newer.deb")

    assert "unknown key 'limts'" in printed
    assert installed.show("brokerd.service", "MainPID") == before


def test_deb_remove_and_purge_leave_nothing(bare: Machine) -> None:
    """A removal keeps the configuration and the keys; after a purge, every file, user
    and group is as before.
    """
    before, users = files(bare), bare.run("cat", "/etc/passwd", "/etc/group")
    apt(bare, "install", f"{PLACE}/built.deb")
    bare.run("brokerd", "key", "--add", "alice")

    apt(bare, "remove", "brokerd")
    assert bare.run("ls", "/etc/brokerd/keys").split() == ["alice"]
    assert not bare.host_path("/usr/lib/brokerd").exists()
    assert bare.show("brokerd.service", "ActiveState")["ActiveState"] == "inactive"
    apt(bare, "purge", "brokerd")

    assert files(bare) - before == set()
    assert bare.run("cat", "/etc/passwd", "/etc/group") == users


def printed(*command: Any) -> str:
    """Return what a command prints in the project's directory."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    return done.stdout.decode()


@pytest.fixture(scope="module")
def rpms(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two packages as RPM packages."""
    install_missing({"rpmbuild": "rpm"})
    folder = tmp_path_factory.mktemp("rpms")
    made = {name: ROOT / printed(".ci/rpm/build.sh", deb).strip() for name, deb in packages.items()}
    return {name: Path(shutil.copy(rpm, folder / f"{name}.rpm")) for name, rpm in made.items()}


def test_rpm_has_the_same_files_and_needs_one_of_their_pythons(
    packages: dict[str, Path], rpms: dict[str, Path]
) -> None:
    """The RPM package has all files but those that only Debian has a use for."""
    rpm = rpms["built"]

    listed = set(printed("rpm", "-qpl", rpm).split())
    archive = printed("dpkg-deb", "--contents", packages["built"]).splitlines()
    files = {line.split()[5].removeprefix(".") for line in archive if line[0] != "d"}
    own = {path for path in files if "/lintian/" in path or path.endswith("/changelog.gz")}
    moved = {path.replace("/vendor-completions/", "/site-functions/") for path in files - own}
    assert listed == moved
    assert "(python(abi) = 3.11 or python(abi) = 3.13)" in printed("rpm", "-qpR", rpm)
    assert printed("rpm", "-qpc", rpm).split() == ["/etc/brokerd/brokerd.yaml"]


def test_rpm_is_installed_upgraded_and_removed_by_dnf(rpms: dict[str, Path]) -> None:
    """dnf gives a running service that root administers, an upgrade that keeps it
    running, and a removal that keeps the configuration.
    """
    folder = rpms["built"].parent
    (folder / "base.spec").write_text(RPM_OF_BASE)
    printed("rpmbuild", "-bb", "--quiet", "--define", f"_rpmdir {folder}", folder / "base.spec")

    with boot("trixie", project=False, packages=("dnf", "rpm"), binds={folder: PLACE}) as machine:

        def dnf(*command: str) -> None:
            options = ("-y", "-q", "--nogpgcheck", "--disablerepo=*")
            machine.run("dnf", *options, *command, timeout_s=300)

        dnf("install", f"{PLACE}/noarch/base-1-1.noarch.rpm", f"{PLACE}/built.rpm")
        assert "ops: " in machine.run("brokerctl", "ping")
        assert machine.run("systemctl", "is-enabled", "brokerd").strip() == "enabled"
        assert "routing=compiled" in machine.run("brokerd", "--version")
        assert machine.run("rpm", "-V", "brokerd") == ""
        dnf("install", f"{PLACE}/newer.rpm")
        assert NEWER in machine.run("rpm", "-q", "brokerd")
        assert machine.journal("brokerd.service", "BROKERD_EVENT=daemon.upgraded")
        assert machine.show("brokerd", "NRestarts", "ActiveState") == {
            "NRestarts": "0",
            "ActiveState": "active",
        }
        assert "ops: " in machine.run("brokerctl", "ping")
        machine.run("sh", "-c", "echo '# edited' >> /etc/brokerd/brokerd.yaml")
        dnf("remove", "brokerd")
        kept = machine.run("ls", "/etc/brokerd").split()
        assert kept == ["brokerd.yaml.rpmsave", "clients.d", "keys"]
        machine.run("id", "brokerd")
        assert "brokerd" not in machine.run("ls", "/usr/lib", "/usr/bin", "/run")


def test_deb_has_no_lintian_error(packages: dict[str, Path]) -> None:
    """lintian, Debian's checker of packages, reports no error."""
    if not shutil.which("lintian"):
        pytest.skip("there is no lintian (apt-get install lintian)")

    done = subprocess.run(
        ["lintian", "--no-cfg", "--allow-root", packages["built"]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        check=False,
    )

    assert not [line for line in done.stdout.splitlines() if line.startswith("E:")], done.stdout
