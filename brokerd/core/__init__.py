"""The broker without its sockets: it decides, and says what to do.

Synchronous and sans-I/O: nothing here opens a socket, reads a clock, draws a random
number or writes a log. Bytes, `now` and instance names come in as arguments; bytes to
send lie in the outboxes of the sessions that :attr:`brokerd.core.broker.Broker.touched`
names.
"""

from typing import Final

from brokerd.core.compiled import choose

#: Why the sources of the core run and not its compiled modules; "" if these run.
WHY_SOURCES: Final = choose(__path__[0])
