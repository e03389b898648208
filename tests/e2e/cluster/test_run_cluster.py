"""`make run-cluster`: three brokers and a NATS server that stop at Ctrl-C, and the examples."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.nats_server import BINARY, needs_nats
from support.waiting import until

pytestmark = needs_nats

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_run_cluster_starts_three_hosts_and_stops_at_ctrl_c(socket_dir: Path) -> None:
    """The script runs from a copy, so that it does not touch the files of a checkout."""
    checkout = socket_dir / "c"
    (checkout / ".ci").mkdir(parents=True)
    for name in ("example_broker.py", "example_cluster.py"):
        shutil.copy(ROOT / ".ci" / name, checkout / ".ci" / name)
    log = socket_dir / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, checkout / ".ci" / "example_cluster.py"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            # Each of three hosts finds two others.
            until(lambda: log.read_text().count("cluster.host_found") == 6, log.read_text())
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.terminate()
            process.wait(60)
    text = log.read_text()
    assert "this terminal is the cluster's".casefold() in text.casefold()
    assert text.count("daemon.stopped") == 3
    assert "Server Exiting" in text


def test_example_of_nats_configuration_is_valid() -> None:
    """Its users have the rights that docs/cluster.md names."""
    file = ROOT / "config" / "examples" / "cluster-nats.conf"
    checked = subprocess.run(
        [BINARY, "-c", file, "-t"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    for host in "abc":
        assert f'publish: ["brokerd.{host}.>"], subscribe: ["brokerd.*.{host}.>"' in (
            file.read_text(encoding="utf-8")
        )
