"""Mailboxes: messages that are kept on disk until a client has acknowledged them.

The core decides everything that needs no disk. A store keeps the messages
(:mod:`brokerd.core.mailboxes.journal` is the seam between the two) and decides only
which messages are duplicates. Nothing here reads or writes a file.
"""
