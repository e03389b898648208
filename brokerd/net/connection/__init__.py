"""Authenticated connections: their sockets, their liveness and their end."""
