"""Measures brokerd against other systems, on the machine it runs on: ``python -m
benchmarks``, or ``make bench``.

All traffic stays on the loopback interface and on Unix sockets in a temporary
directory; every process that is started is ended, and what is left behind is
docs/performance.md and its pictures. Linux only: the figures of processes come from
/proc.
"""
