"""Whether there is a processor for polls: not with a single one, nor with a quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from brokerd_client._common.processors import has_spare_processor


@pytest.mark.parametrize(
    ("group", "quotas", "expected"),
    [
        ("/", {}, True),
        ("/", {"": "max 100000"}, True),
        ("/", {"": "150000 100000"}, False),
        ("/a/b", {"a": "max 100000", "a/b": "max 100000"}, True),
        ("/a/b", {"a": "50000 100000", "a/b": "max 100000"}, False),
    ],
)
def test_has_spare_processor_with_quota_is_false(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    quotas: dict[str, str],
    expected: bool,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/\n0::{group}\n")
    for path, quota in quotas.items():
        directory = tmp_path / "sys/fs/cgroup" / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cpu.max").write_text(f"{quota}\n")
    assert has_spare_processor(tmp_path) is expected


def test_has_spare_processor_on_one_processor_is_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert not has_spare_processor(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4}, raising=False)
    assert has_spare_processor(tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert not has_spare_processor(tmp_path)
