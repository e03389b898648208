"""Puts brokerd_client.connection in the place of multiprocessing.connection, in this
process and its children.

Python runs this file by itself if its directory is on PYTHONPATH. The variable reaches
the children too, however they are started. So CPython's tests run upon our module, and
with them its managers, queues and pools.
"""

import multiprocessing
import os
import sys

import brokerd_client.connection as ours
from brokerd_client.wire import handshake


def _create_response(authkey, message):
    conversation = handshake.answer_challenge(authkey)
    next(conversation)
    return conversation.send(handshake.CHALLENGE + message).body


def _verify_challenge(authkey, message, response):
    proof = handshake._read_answer(message, response, allow_md5=True, named=False)
    if not proof.made_with(authkey):
        raise multiprocessing.AuthenticationError("digest received was wrong")


# Private names that the tests reach for; ours has no use for them, but the rules behind
# them are the same.
ours.CHALLENGE = ours._CHALLENGE = handshake.CHALLENGE
ours._create_response = _create_response
ours._verify_challenge = _verify_challenge

assert "multiprocessing.connection" not in sys.modules, (
    "something imported the standard module first"
)
sys.modules["multiprocessing.connection"] = ours
multiprocessing.connection = ours

if "BY_NAME" in os.environ:
    import by_name  # noqa: F401 - it changes our module
