"""Every link between the pages leads to a page and a heading that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest
from support.pages import ROOT, code_blocks

PAGES: Final = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
#: Pages whose Python blocks are run, each by the test of its name.
RUN: Final = {
    "README.md": "documentation/test_readme.py",
    "docs/client.md": "documentation/test_client_page.py",
    "docs/channels.md": "documentation/test_programs.py",
    "docs/cookbook.md": "documentation/test_programs.py",
    "docs/direct-api.md": "documentation/test_direct_api_page.py",
    "docs/mailboxes.md": "documentation/test_programs.py",
    "docs/porting.md": "documentation/test_programs.py",
    "docs/protocol.md": "interop/test_broker_stock_python.py",
    "docs/rpc.md": "documentation/test_rpc_page.py",
    "docs/testing.md": "documentation/test_testing_page.py",
    "docs/tracing.md": "documentation/test_tracing_page.py",
}


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_links_of_readme_lead_to_every_page() -> None:
    text = prose(ROOT / "README.md")
    assert [page.name for page in PAGES if f"({page.relative_to(ROOT).as_posix()}" not in text] == [
        "README.md",
        "CHANGELOG.md",
    ]


@pytest.mark.parametrize("page", RUN)
def test_python_of_page_compiles(page: str) -> None:
    """A block may be a part of a program, also of a coroutine."""
    for block in code_blocks(page):
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_pages_with_python_are_run() -> None:
    """A page with a program has a test that runs it."""
    names = [page.relative_to(ROOT).as_posix() for page in PAGES]
    with_python = {
        name for name in names if any(block.language == "python" for block in code_blocks(name))
    }
    assert with_python == set(RUN)
    assert all((ROOT / "tests" / test).exists() for test in RUN.values())
