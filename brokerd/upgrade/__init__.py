"""Restart without a disconnect: the daemon replaces itself and keeps its sockets.

:mod:`predecessor` starts the new process and hands over; :mod:`successor` is the new process's side;
:mod:`channel` is what they say to each other; :mod:`keeper` stays where the first process was, for whoever
started it. docs/operations.md, "Upgrade", tells it from the outside.
"""
