"""`make audit` with the real pip-audit and a vulnerability service of the tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".venv-tools"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (TOOLS / "bin" / "pip-audit").exists(),
        reason="pip-audit is not installed: `make audit` does so",
    ),
]


class Service(ThreadingHTTPServer):
    """Answers as osv.dev does: https://google.github.io/osv.dev/post-v1-query/."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.queries: set[tuple[str, str]] = set()
        self.known: dict[str, list[dict[str, Any]]] = {}
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/query"


class Answer(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.server.queries.add((name, query["version"]))
        vulnerabilities = self.server.known.get(name)
        body = json.dumps({"vulns": vulnerabilities} if vulnerabilities else {}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, template: str, *arguments: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    """A service on loopback that knows no vulnerability."""
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(30)


def audit(url: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the audit with the service at the URL, and return its result."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PIP_AUDIT_")
    }
    environment |= {
        "PIP_AUDIT_VULNERABILITY_SERVICE": "osv",
        "PIP_AUDIT_OSV_URL": url,
        "XDG_CACHE_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return subprocess.run(
        [ROOT / ".ci" / "audit.sh", TOOLS],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )


def locked() -> set[tuple[str, str]]:
    """Return name and version of everything in the locks, whatever system it is for."""
    packages = set()
    for path in (ROOT / ".ci").glob("requirements-*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "==" in line.partition(";")[0]:
                requirement = Requirement(line.rstrip("\\"))
                (pin,) = requirement.specifier
                packages.add((canonicalize_name(requirement.name), pin.version))
    return packages


def advisory(package: str) -> dict[str, Any]:
    """Return osv.dev's answer for a package that is vulnerable until version 99."""
    return {
        "schema_version": "1.6.0",
        "id": "PYSEC-2999-1",
        "aliases": ["CVE-2999-0001"],
        "summary": "Made up for a test.",
        "published": "2999-01-01T00:00:00Z",
        "affected": [
            {
                "package": {"name": package, "ecosystem": "PyPI"},
                "ranges": [
                    {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}
                ],
            }
        ],
    }


def test_audit_without_advisory_covers_every_locked_package(
    service: Service, tmp_path: Path
) -> None:
    """The service is asked about every package of every lock in its version, and the
    status is 0.
    """
    done = audit(service.url, tmp_path)

    assert done.returncode == 0, done.stdout
    assert done.stdout.count("No known vulnerabilities found") == 4
    assert service.queries == locked()


@pytest.mark.parametrize("package", ["pyyaml", "colorama"])
def test_audit_with_advisory_for_locked_package_exits_1(
    service: Service, tmp_path: Path, package: str
) -> None:
    """The audit names the package, the advisory and the fixed version. It does so even
    for a package of another system.
    """
    service.known[package] = [advisory(package)]
    (version,) = {version for name, version in locked() if name == package}

    done = audit(service.url, tmp_path)

    assert done.returncode == 1, done.stdout
    (line, *_) = [line for line in done.stdout.splitlines() if "PYSEC-2999-1" in line]
    assert line.split()[:4] == [package, version, "PYSEC-2999-1", "99.0"]
    assert "NOT AUDITED" not in done.stdout


def test_audit_service_unreachable_exits_2(tmp_path: Path) -> None:
    """Every lock is reported as not audited, and the status is 2."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused

        done = audit(f"http://127.0.0.1:{unused.getsockname()[1]}/v1/query", tmp_path)

    assert done.returncode == 2, done.stdout
    assert done.stdout.count("NOT AUDITED") == 4


def test_audit_service_failing_exits_2(service: Service, tmp_path: Path) -> None:
    """An answer of 503 gives no information about a package: the status is 2."""
    service.status = 503

    done = audit(service.url, tmp_path)

    assert done.returncode == 2, done.stdout
    assert done.stdout.count("NOT AUDITED") == 4
