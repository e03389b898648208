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
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.interpreters import SUPPORTED_VERSIONS, interpreters

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"
START_METHODS = ("fork", "spawn", "forkserver")
TIMEOUT_S = 110

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

    def __init__(self, python: str, start_method: str, classes: tuple[str, ...], cwd: Path) -> None:
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "COVERAGE"))
        }
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "client"), str(HERE / "in_place")])
        environment["START_METHOD"] = start_method
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
        )

    def outcome(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, err
        outcome: dict[str, Any] = json.loads(out.splitlines()[-1])
        return outcome

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
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
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Run, Run]]]:
    """The running interpreter at work on its tests of connections, in all ways to start
    a process at once.
    """
    if not has_tests(sys.executable):
        pytest.skip(f"this Python {RUNNING} was installed without its `test` package")
    cwd = tmp_path_factory.mktemp("cpython")
    runs = {
        method: (
            Run(sys.executable, method, CONNECTIONS, cwd),
            Run(sys.executable, method, WAITING, cwd),
        )
        for method in START_METHODS
    }
    yield runs
    for pair in runs.values():
        for run in pair:
            run.end()


@pytest.mark.parametrize("start_method", START_METHODS)
def test_cpython_tests_of_connections_pass(
    start_method: str, started: dict[str, tuple[Run, Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The running interpreter's own tests of connections pass upon our module."""
    ran = checked(*(run.outcome() for run in started[start_method]))

    with capsys.disabled():
        print(f"\n{len(ran)} tests of CPython {RUNNING} ran with {start_method}")
    assert ran >= MUST_RUN


def test_cpython_tests_of_queues_pools_and_managers_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queues, pools and managers pass their own tests when the module beneath them is
    ours.
    """
    if not has_tests(sys.executable):
        pytest.skip(f"this Python {RUNNING} was installed without its `test` package")
    run = Run(sys.executable, "fork", BUILT_UPON, tmp_path)
    try:
        ran = checked(run.outcome())
    finally:
        run.end()

    with capsys.disabled():
        print(f"\n{len(ran)} tests of CPython {RUNNING} ran")
    assert "WithManagerTestRemoteManager.test_remote" in ran
    assert len(ran) >= 100


@pytest.mark.slow
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
    groups = [CONNECTIONS, WAITING, *([BUILT_UPON] if start_method == "fork" else [])]
    runs = [Run(python, start_method, classes, tmp_path) for classes in groups]
    try:
        ran = checked(*(run.outcome() for run in runs))
    finally:
        for run in runs:
            run.end()

    with capsys.disabled():
        print(f"\n{len(ran)} tests of CPython {version} ran with {start_method}")
    assert ran >= MUST_RUN
