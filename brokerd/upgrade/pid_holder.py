"""Stays where the first process was, for whoever started it: the same process id, signals passed on, the same end.

Where nobody can be told that the daemon has another process id now (a container, a shell, most supervisors), the first
process becomes this one when it has handed over. It runs by itself, ``python -I -S -E keeper.py PIPE PID``, with
nothing but the standard library, and does three things: passes signals on to the process that serves, reaps
what ends, and ends as the one that serves ended. Each process that takes over is named in the pipe by the one before.
"""

import contextlib
import os
import signal
import sys

#: Those of them that there are: Windows imports this too.
PASSED_ON = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Have the processes of those that end become children of this one; process 1 needs not ask."""
    if os.getpid() != 1:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def newest(pipe: int, serving: int) -> int:
    """Return which process serves now: the last one named in the pipe, or the one that did before."""
    named = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(pipe, 4096):
            named += piece
    return int(named.split()[-1]) if named.split() else serving


def main(pipe: int, serving: int) -> int:
    """Return the exit status of the last process that served; 128 and its number where a signal ended it."""
    watched = {*PASSED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    adopt_orphans()
    os.set_blocking(pipe, False)
    while True:
        ended: dict[int, int] = {}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = found[1]
        # Asked after that: one that has ended named who comes behind it before.
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
