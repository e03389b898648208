"""Listening sockets: opened here or passed by systemd, and named pipes."""
