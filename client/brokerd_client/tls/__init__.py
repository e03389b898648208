"""TLS, sans-I/O (engine) and over a non-blocking socket (stream)."""
