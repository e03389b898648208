"""Runs the named classes of CPython's test cases; prints one JSON object: ran, skipped,
absent, problems.

START_METHOD=fork PYTHONPATH=client:tests/interop/in_place python run_cases.py CLASS...
"""

import json
import multiprocessing
import multiprocessing.connection
import signal
import sys
import unittest

import cpython_cases

import brokerd_client.connection


def ends_of_a_child(connection):
    """Tell the parent which module a connection is of, in a child."""
    connection.send(type(connection).__module__)
    connection.close()


class Ledger(unittest.TextTestResult):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ran = []

    def stopTest(self, test):  # noqa: N802 - unittest's name
        self.ran.append(test.id().partition(".")[2])
        super().stopTest(test)


def main():
    classes = sys.argv[1:]
    # A shell starts its background jobs with SIGINT ignored; tests of Python 3.14 send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    # Nothing below would mean anything if it ran upon the standard library's module.
    assert multiprocessing.connection is brokerd_client.connection
    cpython_cases.setUpModule()
    near, far = multiprocessing.Pipe()
    child = multiprocessing.Process(target=ends_of_a_child, args=(far,))
    child.start()
    far.close()
    assert type(near).__module__ == near.recv() == "brokerd_client.connection.stream"
    child.join()
    near.close()

    loader = unittest.TestLoader()
    suite = unittest.TestSuite()
    absent = []
    for name in classes:
        case = getattr(cpython_cases, name, None)
        if case is None:
            absent.append(name)
            continue
        suite.addTest(loader.loadTestsFromTestCase(case))
    result = unittest.TextTestRunner(stream=sys.stderr, resultclass=Ledger, verbosity=2).run(suite)
    cpython_cases.tearDownModule()
    skipped = {test.id().partition(".")[2]: reason for test, reason in result.skipped}
    print(
        json.dumps(
            {
                "ran": [name for name in result.ran if name not in skipped],
                "skipped": skipped,
                "absent": absent,
                "problems": [
                    f"{test.id()}\n{text}" for test, text in result.errors + result.failures
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
