"""Every workload of the benchmarks runs, in short, on the broker and on the raw relay;
a bad measurement gives no figure.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not sys.platform.startswith("linux"):
    pytest.skip("the benchmarks read /proc and use epoll: Linux only", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.goals import GOALS, REMARKS  # noqa: E402 - the directory is no package that is installed
from benchmarks.machinery import compiler  # noqa: E402
from benchmarks.systems import SYSTEMS  # noqa: E402
from benchmarks.workloads import WORKLOADS, Entrant, Spoilt, Stage, Timing  # noqa: E402

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="the load generator needs a C compiler (cc)"
)

SHORT = Timing(warm_s=0.05, seconds=0.1, small=True)
OURS = ("brokerd", "relay", "brokerd-client")


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """A directory in which the load generator is compiled once."""
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        yield Path(directory)


@pytest.fixture
def stage_dir(programs: Path) -> Path:
    """The path for a stage, beside those programs; it does not exist yet."""
    return programs / os.urandom(4).hex()


def entrants(*systems: str) -> list[object]:
    """Return a parameter for every workload in which one of these systems takes part."""
    return [
        pytest.param(key, entrant, id=f"{key}-{entrant.name}".replace(" ", "_"))
        for key, workload in WORKLOADS.items()
        for entrant in workload.entrants
        if entrant.system in systems
    ]


def measure(key: str, entrant: Entrant, directory: Path) -> float:
    if SYSTEMS[entrant.system].find() is None:
        pytest.skip(
            f"{SYSTEMS[entrant.system].title} is not installed ({SYSTEMS[entrant.system].install})"
        )
    workload = WORKLOADS[key]
    for attempts_left in (2, 1, 0):
        with Stage(entrant, workload.names(entrant, SHORT), directory) as stage:
            workload.prepare(stage, SHORT)
            process = stage.running.process
            try:
                value = workload.measure(stage, SHORT).value
                break
            except Spoilt as spoilt:
                # On a busy machine the server may not run at all for as long as a short
                # measurement takes.
                if not str(spoilt).startswith("nothing arrived") or not attempts_left:
                    raise
    assert process.status is not None, "the system still runs"
    return value


@pytest.mark.parametrize(("key", "entrant"), entrants(*OURS))
def test_workload_yields_figure_for_brokerd(key: str, entrant: Entrant, stage_dir: Path) -> None:
    """Each workload measures brokerd, and the relay where it can, without losing a
    message. No process is left running.
    """
    assert measure(key, entrant, stage_dir) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("key", "entrant"), entrants(*(set(SYSTEMS) - set(OURS))))
def test_workload_yields_figure_for_peer(key: str, entrant: Entrant, stage_dir: Path) -> None:
    """Each workload measures every other system that is installed, and Unix sockets."""
    assert measure(key, entrant, stage_dir) > 0


def test_workload_with_wrong_byte_count_gives_no_figure(stage_dir: Path) -> None:
    """If the number of received bytes is not the number of sent bytes, there is no
    figure.
    """
    workload = WORKLOADS["1to1-16"]
    entrant = Entrant("direct")
    with Stage(entrant, [], stage_dir) as stage:
        workload.prepare(stage, SHORT)
        receiver = stage.members[-1].split(":")
        stage.members[-1] = ":".join([*receiver[:-1], str(int(receiver[-1]) - 1)])
        with pytest.raises(Spoilt, match="more arrived than was sent"):
            workload.measure(stage, SHORT)


def test_workload_server_that_ends_gives_no_figure(stage_dir: Path) -> None:
    """If a broker ends while it is measured, there is no figure."""
    workload = WORKLOADS["1to1-16"]
    entrant = Entrant("brokerd")
    with Stage(entrant, workload.names(entrant, SHORT), stage_dir) as stage:
        workload.prepare(stage, SHORT)
        stage.running.process.stop()
        with pytest.raises(Spoilt, match="has ended"):
            workload.measure(stage, SHORT)


def test_workload_with_server_greeting_yields_figure(stage_dir: Path) -> None:
    """A greeting that arrives before the first message neither stops the sender nor
    spoils the measurement.
    """
    workload = WORKLOADS["1to1-16"]
    entrant = Entrant("direct")
    with Stage(entrant, [], stage_dir) as stage:
        workload.prepare(stage, SHORT)
        greeting = b"PING\r\n"
        stage.running.dialect.stray = len(greeting)
        sender, _ = stage.connections.values()
        sender.sendall(greeting)
        assert workload.measure(stage, SHORT).value > 1000


def test_workload_without_c_compiler_names_package_to_install(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a C compiler the error says what to install."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="C compiler"):
        Stage(Entrant("direct"), [], socket_dir / "stage")


def test_workload_remarks_all_belong_to_a_goal() -> None:
    """A remark on a missed goal is not lost because a workload got another name."""
    assert REMARKS.keys() <= {(goal.workload, goal.theirs) for goal in GOALS}
    assert all(goal.workload in WORKLOADS for goal in GOALS)
