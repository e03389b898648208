"""The sockets of the daemon: they carry out what the core decides, and decide nothing
about messages.
"""
