"""Named pipes, and the rest of the direct API on Windows, in a Windows Python under
wine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.system.windows import HERE, ROOT, passed, windows

RUN_TIMEOUT_S = 200

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_windows_pipes_and_sockets_work(tmp_path: Path) -> None:
    """Every case of windows_pipes.py passes in a Windows Python."""
    with windows(tmp_path / "prefix") as system:
        output = system.run(HERE / "windows_pipes.py", ROOT / "client", timeout_s=RUN_TIMEOUT_S)
    assert len(passed(output)) == 16
