"""Mailboxes on disk: a process with an SQLite database, and the broker's end of it.

The broker starts the store process, which has one connection to the database. A slow
disk never holds up the event loop. The process ends when the broker closes its end of
the socket.
"""
