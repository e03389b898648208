"""CPython's own tests of connections, from the installed ``test`` package, upon our
module in place of the standard library's.

No test is copied here. ``in_place/sitecustomize.py`` replaces
``multiprocessing.connection`` by ours, and then an interpreter imports its own tests.
That holds in the parent and in every child, so queues, pools and managers run upon our
module too. Of the classes below every test runs. Those named With<kind>... exist for
threads too, upon multiprocessing.dummy, which uses nothing of ours.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.request import urlopen

import pytest
from support.interpreters import SUPPORTED_VERSIONS, interpreters

from brokerd.testing import running

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"
START_METHODS = ("fork", "spawn", "forkserver")
TIMEOUT_S = 110
#: Of each group of classes of every version, on a busy machine.
SLOW_TIMEOUT_S = 600

#: What tests connections themselves. Two groups, run side by side: most of their time
#: they sleep.
CONNECTIONS = (
    "WithProcessesTestConnection",
    "WithProcessesTestListener",
    "WithProcessesTestListenerClient",
    "WithProcessesTestPicklingConnections",
    "TestInvalidHandle",
    "OtherTest",
    "ChallengeResponseTest",
    "TestInvalidFamily",
    "TestTimeouts",
    "TestIgnoreEINTR",
)
WAITING = ("WithProcessesTestPoll", "WithProcessesTestPollEintr", "TestWait")
#: What is built upon connections: queues, pools, managers (XmlListener and XmlClient
#: among them), processes.
BUILT_UPON = (
    "WithProcessesTestQueue",
    "TestSimpleQueue",
    "WithManagerTestQueue",
    "WithManagerTestRemoteManager",
    "WithManagerTestManagerRestart",
    "WithManagerTestMyManager",
    "WithManagerTestContainers",
    "TestManagerExceptions",
    "TestSyncManagerTypes",
    "WithProcessesTestPool",
    "WithManagerTestPool",
    "WithProcessesTestProcess",
    "WithProcessesTestSubclassingProcess",
    "TestForkAwareThreadLock",
    "TestCloseFds",
)
#: What goes through listeners without a key of their own, or through all families. These
#: run at a broker's addresses too.
BY_NAME = (
    "WithProcessesTestListener",
    "WithProcessesTestListenerClient",
    "WithProcessesTestPicklingConnections",
    "WithManagerTestRemoteManager",
    "WithManagerTestMyManager",
)
MORE_BY_NAME = (
    "WithManagerTestManagerRestart",
    "WithManagerTestContainers",
    "TestManagerExceptions",
    "TestSyncManagerTypes",
    "WithManagerTestQueue",
    "WithManagerTestPool",
)
#: Not in every version: ChallengeResponseTest came with the digests of 3.12, the other
#: with 3.11.5 or so.
MAY_BE_ABSENT = {"ChallengeResponseTest", "TestManagerExceptions"}
#: These must be among what ran, lest a renamed class go unnoticed.
MUST_RUN = {
    "WithProcessesTestConnection.test_connection",
    "WithProcessesTestListener.test_multiple_bind",
    "WithProcessesTestListenerClient.test_listener_client",
    "WithProcessesTestPicklingConnections.test_pickling",
    "OtherTest.test_deliver_challenge_auth_failure",
    "OtherTest.test_answer_challenge_auth_failure",
    "TestWait.test_wait",
    "WithProcessesTestPoll.test_boundaries",
}


class Run:
    """One interpreter at work on some of its classes."""

    def __init__(
        self,
        python: str,
        start_method: str,
        classes: tuple[str, ...],
        cwd: Path,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "COVERAGE"))
        }
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "client"), str(HERE / "in_place")])
        environment["START_METHOD"] = start_method
        environment.update(variables)
        # Bytecode of the checkout would be written by several versions at once.
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [python, str(HERE / "in_place" / "run_cases.py"), *classes]
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def outcome(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, err
        outcome: dict[str, Any] = json.loads(out.splitlines()[-1])
        return outcome

    def end(self) -> None:
        if self.process.poll() is None:
            # Its children too: they hold its output open.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def has_tests(python: str) -> bool:
    """Return whether the interpreter's installation has its tests; distributions often
    leave them out.
    """
    import_run = subprocess.run(
        [python, "-c", "import test._test_multiprocessing"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    return import_run.returncode == 0


def checked(*outcomes: dict[str, Any]) -> set[str]:
    """Return the names of all tests that ran, having checked that none failed or was
    absent without a reason.
    """
    ran: set[str] = set()
    for outcome in outcomes:
        assert outcome["problems"] == []
        assert set(outcome["absent"]) <= MAY_BE_ABSENT
        ran |= set(outcome["ran"])
    return ran


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Run, ...]]]:
    """The running interpreter at work on its tests of connections, in all ways to start
    a process, and of what is built upon them. All run at once: mostly they sleep.
    """
    if not has_tests(sys.executable):
        pytest.skip(f"this Python {RUNNING} was installed without its `test` package")
    cwd = tmp_path_factory.mktemp("cpython")
    runs: dict[str, tuple[Run, ...]] = {
        method: (
            Run(sys.executable, method, CONNECTIONS, cwd),
            Run(sys.executable, method, WAITING, cwd),
        )
        for method in START_METHODS
    }
    runs["built upon"] = (Run(sys.executable, "fork", BUILT_UPON, cwd),)
    yield runs
    for group in runs.values():
        for run in group:
            run.end()


@pytest.mark.parametrize("start_method", START_METHODS)
def test_cpython_tests_of_connections_pass(
    start_method: str, started: dict[str, tuple[Run, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The running interpreter's own tests of connections pass upon our module."""
    ran = checked(*(run.outcome() for run in started[start_method]))

    with capsys.disabled():
        print(f"\n{len(ran)} tests of CPython {RUNNING} ran with {start_method}")
    assert ran >= MUST_RUN


def test_cpython_tests_of_queues_pools_and_managers_pass(
    started: dict[str, tuple[Run, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Queues, pools and managers pass their own tests when the module beneath them is
    ours.
    """
    ran = checked(*(run.outcome() for run in started["built upon"]))

    with capsys.disabled():
        print(f"\n{len(ran)} tests of CPython {RUNNING} ran")
    assert "WithManagerTestRemoteManager.test_remote" in ran
    assert len(ran) >= 100


def by_name(
    python: str,
    start_method: str,
    classes: tuple[str, ...],
    cwd: Path,
    timeout_s: float = TIMEOUT_S,
) -> set[str]:
    """Return the tests that have passed at the addresses of a broker."""
    # A pool: several listeners of the tests may exist at once, each at its own address.
    client = {"connections": 100, "channels": 1000}
    config = {"listen": ["./b.sock"], "monitor": "127.0.0.1:0", "clients": {"cpython": client}}
    with running(config=config) as broker:
        variables = {**broker.environ("cpython"), "BY_NAME": "1"}
        run = Run(python, start_method, classes, cwd, variables)
        try:
            ran = checked(run.outcome(timeout_s))
        finally:
            run.end()
        with urlopen(f"http://{broker.monitor_address}/metrics", timeout=TIMEOUT_S) as page:
            [opened] = re.findall(rb"\nbrokerd_opened_channels_total ([0-9]+)", page.read())
    assert int(opened) >= len(ran)
    return ran


def test_cpython_tests_of_listeners_and_managers_pass_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listeners, clients, the pickling of their connections, and managers pass their own
    tests with the family AF_BROKER.
    """
    if not has_tests(sys.executable):
        pytest.skip(f"this Python {RUNNING} was installed without its `test` package")
    ran = by_name(sys.executable, "fork", BY_NAME, tmp_path)

    with capsys.disabled():
        print(f"\n{len(ran)} tests of CPython {RUNNING} ran by name")
    assert {
        "WithProcessesTestListener.test_multiple_bind",
        "WithProcessesTestListenerClient.test_listener_client",
        "WithProcessesTestPicklingConnections.test_pickling",
        "WithManagerTestRemoteManager.test_remote",
    } <= ran


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_cpython_tests_pass_on_every_supported_version(
    version: str, start_method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every supported Python's own tests of connections pass upon our module, and what
    is built upon them.
    """
    python = interpreters().get(version)
    if python is None:
        pytest.skip(
            f"no Python {version} here: neither on PATH, nor in pyenv, nor in BROKERD_TEST_PYTHONS"
        )
    if not has_tests(python):
        pytest.skip(f"the Python {version} here was installed without its `test` package")
    by_name(python, start_method, (*BY_NAME, *MORE_BY_NAME), tmp_path, SLOW_TIMEOUT_S)
    groups = [CONNECTIONS, WAITING, *([BUILT_UPON] if start_method == "fork" else [])]
    runs = [Run(python, start_method, classes, tmp_path) for classes in groups]
    try:
        ran = checked(*(run.outcome(SLOW_TIMEOUT_S) for run in runs))
    finally:
        for run in runs:
            run.end()

    with capsys.disabled():
        print(f"\n{len(ran)} tests of CPython {version} ran with {start_method}")
    assert ran >= MUST_RUN
