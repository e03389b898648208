"""Listening sockets: opened here, handed over by systemd, and named pipes."""
