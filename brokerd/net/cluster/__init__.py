"""The connection to NATS that carries the messages between the hosts of a cluster."""
