"""The PID holder: keeps the process id of the first process after an upgrade.

Containers, shells and most supervisors cannot be told that the daemon has a new process
id. There, the first process becomes the PID holder when it has handed over. It runs on
its own as ``python -I -S -E pid_holder.py PIPE PID``, with only the standard library.
It passes signals on to the process that serves, and reaps processes that end. It ends
with the exit status of the process that serves. Before it ends, each old process writes
the id of its new process to the pipe.
"""

import contextlib
import os
import signal
import sys

#: Signals that are passed on, as far as the platform has them: Windows imports this
#: module too.
PASSED_ON = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants; process 1 is their parent anyway."""
    if os.getpid() != 1:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def newest(pipe: int, serving: int) -> int:
    """Return the process that serves now: the last id in the pipe, or ``serving`` if
    none came.
    """
    named = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(pipe, 4096):
            named += piece
    return int(named.split()[-1]) if named.split() else serving


def main(pipe: int, serving: int) -> int:
    """Run until the process that serves ends; return its exit status.

    If a signal ended it, the status is 128 plus the number of the signal.
    """
    watched = {*PASSED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    adopt_orphans()
    os.set_blocking(pipe, False)
    while True:
        ended: dict[int, int] = {}
        with contextlib.suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                ended[child[0]] = child[1]
        # The pipe is read after the wait: a process writes the id of its new process
        # before it ends.
        serving = newest(pipe, serving)
        if serving in ended:
            status = os.waitstatus_to_exitcode(ended[serving])
            return status if status >= 0 else 128 - status
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            serving = newest(pipe, serving)
            with contextlib.suppress(ProcessLookupError):
                os.kill(serving, number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
