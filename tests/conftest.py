"""What every test may use: short directories for sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("brokerd", deadline=None, print_blob=True)
settings.load_profile("brokerd")


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A private directory whose path is short enough for a Unix socket, which
    tmp_path's may not be.
    """
    path = tempfile.mkdtemp(prefix="bd-")
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
