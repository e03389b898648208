"""CPython's test cases, made here by CPython's own function, so that spawned children find them by this module's name."""

import os

from test import _test_multiprocessing

_test_multiprocessing.install_tests_in_module_dict(globals(), os.environ["START_METHOD"])
