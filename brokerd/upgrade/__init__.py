"""Restart without a disconnect: the daemon replaces itself and keeps its sockets.

:mod:`upgrade_source` starts the new process and hands over; :mod:`new_process` is the new process's side;
:mod:`channel` is what they say to each other; :mod:`pid_holder` stays where the first process was, for whoever
started it. docs/operations.md, "Upgrade", tells it from the outside.
"""
