"""The start of the broker without click: which arguments it knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from brokerd.cli.startup import named_config


@pytest.mark.parametrize(
    ("arguments", "environ", "config"),
    [
        ([], {}, "/etc/brokerd/brokerd.yaml"),
        ([], {"BROKERD_CONFIG": "a.yaml"}, "a.yaml"),
        ([], {"BROKERD_CONFIG": ""}, "/etc/brokerd/brokerd.yaml"),
        ([], {"BROKERD_CONFIG_YAML": "listen: [x]"}, "$BROKERD_CONFIG_YAML"),
        (["--config", "b.yaml"], {"BROKERD_CONFIG": "a.yaml"}, "b.yaml"),
        (["--config", "b.yaml"], {"BROKERD_CONFIG_YAML": "listen: [x]"}, "b.yaml"),
    ],
)
def test_startup_plain_arguments_name_configuration(
    arguments: list[str], environ: dict[str, str], config: str
) -> None:
    """Without a command, the file is found as click finds it."""
    assert named_config(arguments, environ) == Path(config)


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (["check"], {}),
        (["--help"], {}),
        (["--config"], {}),
        (["--config", ""], {}),
        (["--config", "--help"], {}),
        (["--config", "b.yaml", "check"], {}),
        ([], {"BROKERD_CONFIG": "a.yaml", "BROKERD_CONFIG_YAML": "listen: [x]"}),
        ([], {"_BROKERD_COMPLETE": "bash_source"}),
    ],
)
def test_startup_other_arguments_are_left_to_click(
    arguments: list[str], environ: dict[str, str]
) -> None:
    """Commands, options, faults and completion are not for the short start."""
    assert named_config(arguments, environ) is None


def test_startup_with_invalid_file_exits_78_without_traceback(tmp_path: Path) -> None:
    """The command has the status and the lines of the command with click."""
    done = subprocess.run(
        [sys.executable, "-m", "brokerd", "--config", "no.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("no.yaml:1:1: (file): there is no file no.yaml")
    assert len(done.stderr.splitlines()) == 1
