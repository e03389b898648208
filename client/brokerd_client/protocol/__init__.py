"""One client's conversation with the broker, sans-I/O: bytes in, effects and bytes out."""
