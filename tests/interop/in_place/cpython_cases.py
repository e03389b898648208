"""CPython's test cases, made here by CPython's own function, where spawned children
find them.
"""

import os

from test import _test_multiprocessing

_test_multiprocessing.install_tests_in_module_dict(globals(), os.environ["START_METHOD"])
