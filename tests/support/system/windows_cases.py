"""Cases that a script runs one after the other in a Windows Python, where there is no
pytest; a line for each.
"""

import os
import sys
import threading
import traceback

TIMEOUT_S = 30
CASES = []


def case(function):
    CASES.append(function)
    return function


def aside(function, *args, **kwargs):
    """Run the function in a thread; calling what is returned waits for its result, or
    for what it raised.
    """
    outcome = []

    def run():
        try:
            outcome.append((function(*args, **kwargs), None))
        except BaseException as error:  # noqa: BLE001 - handed on
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(TIMEOUT_S)
        assert outcome, "still running"
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return result


def raised(expected, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except expected as error:
        return str(error)
    raise AssertionError(f"{expected} was not raised")


def run_cases(clean_up=lambda: None):
    """Run every case, print how it went, clean up and end the process."""
    for function in CASES:
        try:
            function()
        except BaseException:  # noqa: BLE001 - printed, and the next case runs
            print("FAILED", function.__name__, flush=True)
            traceback.print_exc(file=sys.stdout)
        else:
            print("passed", function.__name__, flush=True)
    clean_up()
    print("end", flush=True)
    os._exit(0)  # threads that a failed case left behind never end
