"""An exception at a chosen bytecode, and signals that raise at random moments."""

from __future__ import annotations

import dis
import functools
import gc
import random
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import brokerd_client

__all__ = ["RETURN", "Interrupt", "in_own_thread", "interrupted_at", "random_signals"]

_PACKAGE: Final = str(Path(brokerd_client.__file__).parent)


#: No handler covers this bytecode, and the interpreter looks for no signals there.
RETURN: Final = "return to the caller"


class Interrupt(BaseException):
    """The exception that a signal handler raises."""


def interrupted_at(bytecode: int, function: Callable[[], object]) -> str:
    """Call the function and raise Interrupt before its bytecode of that number, counted
    over the library's frames.

    NOT_TAKEN, of Python 3.14 and later, does not count: no handler covers it, and the
    interpreter looks for no signals there.

    No garbage is collected meanwhile: an exception in the destructor of something else
    would interrupt nothing.

    Return the name of that bytecode; "" if it was not reached. The last bytecode of the
    call is called "return to the caller".
    """
    left = bytecode
    name = ""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left, name
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if event != "opcode":
            return trace
        opcode = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if opcode != "NOT_TAKEN":
            left -= 1
            if left < 0:
                sys.settrace(None)
                name = opcode
                outermost = frame.f_back is None or not frame.f_back.f_code.co_filename.startswith(
                    _PACKAGE
                )
                if outermost and name in ("RETURN_VALUE", "RETURN_CONST"):
                    name = RETURN
                raise Interrupt
        return trace

    before = sys.gettrace()
    collects = gc.isenabled()
    gc.disable()
    sys.settrace(trace)
    try:
        function()
    except Interrupt:
        return name
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
    return ""


def in_own_thread(test: Callable[..., None]) -> Callable[..., None]:
    """Return the test for another thread than that of the other tests.

    An exception at the end of an ``except`` block leaves its exception as the one that
    the thread handles. It would be the context of every later exception there.
    """

    @functools.wraps(test)
    def run(*given: object, **named: object) -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(test, *given, **named).result()

    return run


@contextmanager
def random_signals(*, longest_s: float, seed: int = 1) -> Iterator[list[bool]]:
    """Raise Interrupt from a signal handler at random moments while the yielded list's
    first item is true.
    """
    jitter = random.Random(seed)
    armed = [False]
    over = False

    def again() -> None:
        if not over:
            signal.setitimer(signal.ITIMER_REAL, jitter.uniform(1e-5, longest_s))

    def interrupt(number: int, frame: FrameType | None) -> None:
        again()
        if armed[0]:
            armed[0] = False
            raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    again()
    try:
        yield armed
    finally:
        armed[0] = False
        # A handler that is called from here on sets no timer again.
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
