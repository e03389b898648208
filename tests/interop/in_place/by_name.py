"""Lets CPython's tests run at a broker's addresses: imported where BY_NAME is set.

AF_BROKER is one of the families. It is also that of listeners for which a test gives
neither address nor key: managers have such listeners. Some tests set no key and send
pickles, so the program's own name is trusted.
"""

import functools
import os

import brokerd_client.connection as ours

NAME = os.environ["BROKERD_NAME"]


class Listener(ours.Listener):
    """A listener that trusts the program's own name."""

    def __init__(self, address=None, family=None, *args, **options):
        # A key without an address: multiprocessing's own listener for descriptors, which
        # only a Unix socket can carry.
        if not (address or family or args or options.get("authkey")):
            family = "AF_BROKER"
        if family == "AF_BROKER" or str(address).startswith("broker://"):
            options["allow_pickle_from"] = [NAME]
        super().__init__(address, family, *args, **options)


_client = ours.Client


@functools.wraps(ours.Client)
def client(address, *args, **options):
    """Connect, and trust the program's own name."""
    if str(address).startswith("broker://"):
        options["allow_pickle_from"] = [NAME]
    return _client(address, *args, **options)


ours.Listener = Listener
ours.Client = client
ours.families = [*ours.families, "AF_BROKER"]
