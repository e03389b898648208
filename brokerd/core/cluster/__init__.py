"""Other hosts of a cluster: what is sent to them, and what becomes of it.

A client of another host is a session without a socket. The broker's remote sessions
decide about frames. This package moves the frames between two brokers, in batches, and
finds the outcome of each. :mod:`brokerd.core.cluster.seam` is the seam between the two.
Nothing here opens a connection: ``brokerd.net.cluster`` carries the messages
over NATS.
"""
