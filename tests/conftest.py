"""Fixtures for every test: short directories for sockets, and a CA."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from support import older_pythons
from support.tls.authority import Authority

older_pythons.fill_in()

# How long an example takes says more about the machine than about the code.
settings.register_profile(
    "brokerd", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("brokerd")
# Examples must not depend on which modules a test process happens to have imported.
# Hypothesis takes constants from their source, and has no setting against it.
if hasattr(providers, "Constants"):
    providers.HypothesisProvider._local_constants = providers.Constants()  # type: ignore[method-assign]


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


@pytest.fixture(autouse=True)
def library_log() -> Iterator[None]:
    """Undo what brokerctl, where a test calls it in this process, does to the library's
    log.
    """
    yield
    logging.getLogger("brokerd_client.connection").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of all certificates in the tests; making one takes its time."""
    return Authority(tmp_path_factory.mktemp("ca"))
