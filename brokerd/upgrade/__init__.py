"""Live upgrade: the daemon replaces itself with a new process and keeps its sockets.

:mod:`old_process` starts the new process and hands over. :mod:`new_process` is the new
process's side. :mod:`channel` carries the messages between them. :mod:`notify` tells
the service manager. :mod:`pid_holder` keeps the process id of the first process.
docs/operations.md, "Upgrade", describes an upgrade from the outside.
"""
