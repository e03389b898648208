"""Whether there is a processor for polls, beside those that do the work."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["has_spare_processor"]


def has_spare_processor(root: Path = Path("/")) -> bool:
    """Return whether this process may use more than one processor, without a quota.

    A quota, as containers have one, would be used up by the polls.
    """
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return processors > 1 and not _has_quota(root)


def _has_quota(root: Path) -> bool:
    """Return whether the control group of this process, or one above it, has a quota."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return False
    own = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), "")
    top = root / "sys/fs/cgroup"
    for group in (top / own, *(top / own).parents):
        with contextlib.suppress(OSError):
            if not (group / "cpu.max").read_text().startswith("max"):
                return True
        if group == top:
            break
    return False
