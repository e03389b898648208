"""The monitor: HTTP pages that tell health checks and Prometheus how the broker is.

It only looks: nothing can be changed here, and what it shows is counted by the core and the network layer anyway. It is
imported only where it is switched on (``monitor:`` in docs/configuration.md). The pages are described in
docs/operations.md, "Monitoring".
"""
