"""Programs compiled, processes started and ended, and what /proc knows of them."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

__all__ = [
    "HERE",
    "Process",
    "busy_share",
    "compiled",
    "compiler",
    "free_port",
    "raise_descriptor_limit",
    "wait_for",
]

HERE: Final = Path(__file__).parent
_STOP_S: Final = 5.0


def compiler() -> str | None:
    """Return the system's C compiler, or None."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compiled(source: str, directory: Path) -> Path:
    """Compile a C file that is beside this one, once, and return the program.

    Raises RuntimeError.
    """
    cc = compiler()
    if cc is None:
        raise RuntimeError(
            "the load generator needs a C compiler (cc); on Debian: apt-get install gcc libc6-dev"
        )
    program = directory / "bin" / Path(source).stem
    if not program.exists():
        program.parent.mkdir(exist_ok=True)
        command = [cc, "-O2", "-pthread", "-o", str(program), str(HERE / source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
    return program


def free_port() -> int:
    """Return a TCP port of the loopback address at which no process listens now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def busy_share(seconds: float) -> float:
    """Return what share of all processors is in use, by whomever, for that long from
    now on.
    """

    def ticks() -> tuple[int, int]:
        fields = [
            int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    busy, total = ticks()
    time.sleep(seconds)
    busy_then, total_then = ticks()
    return (busy_then - busy) / max(total_then - total, 1)


@contextlib.contextmanager
def wait_for(event: str, timeout_s: float) -> Iterator[Iterator[None]]:
    """Yield turns of a loop, a few milliseconds apart.

    Raises TimeoutError when there were too many.
    """

    def turns() -> Iterator[None]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            yield
            time.sleep(0.005)
        raise TimeoutError(f"{event}: not within {timeout_s:g} s")

    yield turns()


class Process:
    """One process that this program started and will end.

    Args:
        log: The file for its output.
        stdin: The bytes that it reads on standard input.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        #: When it began, as time.monotonic() counts.
        self.began = time.monotonic()
        self._output: IO[bytes] = log.open("wb")
        try:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=HERE.parent,
            )
        except BaseException:
            self._output.close()
            raise
        if self._popen.stdin is not None:
            self._popen.stdin.write(stdin)
            self._popen.stdin.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._popen.poll()

    def last_words(self) -> str:
        """Return the end of its output."""
        return self.log.read_text(errors="replace")[-2000:]

    def cpu_s(self) -> float:
        """Return the processor time it has used, in seconds, all threads together."""
        # What clock_getcpuclockid(3) computes; far finer than the ticks in /proc.
        return time.clock_gettime(~self.pid << 3 | 2)

    def memory(self) -> int:
        """Return its proportional set size, in bytes."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("smaps_rollup has no Pss")

    def wait(self, timeout_s: float) -> int:
        """Return the exit status. Raises subprocess.TimeoutExpired."""
        return self._popen.wait(timeout_s)

    def stop(self) -> None:
        """End it: politely, then not."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._output.close()
