"""docs/testing.md: its tests pass, and it names every method of brokerd.testing."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from support.pages import ROOT, write_files

from brokerd.testing import RunningBroker, running

PAGE = "docs/testing.md"


def test_testing_page_examples_pass(tmp_path: Path) -> None:
    """The tests of the page pass as they stand, with its configuration beside them."""
    write_files(PAGE, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_testing_page_lists_every_method_and_argument() -> None:
    """The reference has each public name, and the signatures are those of the code."""
    text = (ROOT / PAGE).read_text(encoding="utf-8").partition("## Reference")[2]
    table = set(re.findall(r"^\| `(?:await )?(\w+)", text, re.MULTILINE))
    public = {name for name in dir(RunningBroker) if not name.startswith("_")}
    with running() as broker:
        public |= {name for name in vars(broker) if not name.startswith("_")}
    arguments = set(inspect.signature(RunningBroker).parameters)
    assert table == public | arguments
    for function, name in ((RunningBroker, "RunningBroker"), (running, "running")):
        listed = re.search(rf"`{name}\(([^)]*)\)`", text)
        assert listed is not None
        assert [
            each.partition("=")[0] for each in listed[1].replace("*, ", "").split(", ")
        ] == list(inspect.signature(function).parameters)
