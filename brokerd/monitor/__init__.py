"""The monitor: HTTP pages that show the broker's state to health checks and Prometheus.

It is read-only, and it shows counters that the core and the network layer keep anyway.
It is imported only if the configuration enables it (``monitor:`` in
docs/configuration.md). The pages are described in docs/operations.md, "Monitoring".
"""
