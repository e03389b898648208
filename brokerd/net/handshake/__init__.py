"""Connections before they are authenticated: pending handshakes, keys, penalties."""
