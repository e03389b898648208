"""A server for a client library that brings none as a program: ``python -m
benchmarks.python_server NAME PORT``.

zenoh: a session in router mode, which is what its router is; all of it is Rust, and
this process only keeps it alive.

pyzmq: a ROUTER that reads the recipient from the
first frame and puts the sender in its place.
"""

from __future__ import annotations

import json
import signal
import sys


def serve_zenoh(port: int) -> None:
    import zenoh

    config = zenoh.Config()
    config.insert_json5("mode", '"router"')
    config.insert_json5("listen/endpoints", json.dumps([f"tcp/127.0.0.1:{port}"]))
    config.insert_json5("scouting/multicast/enabled", "false")
    with zenoh.open(config):
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


def serve_pyzmq(port: int) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        # No limit, as the receiver is never far behind: the sender waits for it.
        # Nothing may be lost unseen.
        router.set_hwm(0)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.bind(f"tcp://127.0.0.1:{port}")
        receive, send = router.recv_multipart, router.send_multipart
        while True:
            sender, to, payload = receive()
            send((to, sender, payload))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.argv[1] == "zenoh":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    {"zenoh": serve_zenoh, "pyzmq": serve_pyzmq}[sys.argv[1]](int(sys.argv[2]))
