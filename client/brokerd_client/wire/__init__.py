"""The wire, sans-I/O: bytes in, decisions out.

Nothing in this package opens a socket, reads a clock, draws a random number or writes a log:
nonces, keys and limits come in as arguments. The rules are those of docs/protocol.md.
"""
