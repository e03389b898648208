"""The wire, sans-I/O: bytes in, decisions out.

No module of this package opens a socket, reads a clock, draws a random number or writes
a log. Nonces, keys and limits are arguments. The rules are those of docs/protocol.md.
"""
