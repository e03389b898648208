"""A soak of a cluster: three brokers and three NATS servers under traffic between all
hosts. NATS servers end and start again, clients come and go, and each broker is sampled.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.keys import key_of
from support.outages.cluster_processes import ClusterProcesses
from support.outages.traffic import Account, Traffic
from support.soak.flatness import Verdict, judge
from support.soak.run import SERIES, process_figures

import brokerd_client

__all__ = ["ClusterSoak", "cluster_soak", "cluster_table"]

HOSTS = {"a": "xyz", "b": "yzx", "c": "zxy"}
PLACES = {"s0": "a", "s1": "b", "r0": "a", "r1": "b", "r2": "c"}
ROAMER = "roamer"
#: Seconds between two samples, and between two ends of a NATS server.
SAMPLE_S, END_S = 1.0, 15.0
#: What is judged: memory and descriptors.
JUDGED = [each for each in SERIES if each.key in ("rss", "anonymous", "fds")]


@dataclass
class ClusterSoak:
    """The results.

    Attributes:
        samples: For each host, one value a second by name.
        account: Of the messages and requests.
        ends: How often a NATS server ended.
        roamings: Connections of a client that comes to one host after the other,
            subscribes, publishes and leaves.
    """

    seconds: float
    account: Account
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ends: int = 0
    roamings: int = 0

    def verdicts(self) -> Iterator[tuple[str, str, str, Verdict]]:
        """Yield host, title, unit and verdict of each series."""
        for host, samples in self.samples.items():
            for each in JUDGED:
                yield host, each.title, each.unit, judge(samples[each.key], each.bound)

    @property
    def is_flat(self) -> bool:
        """Whether no series rises by more than is allowed."""
        return all(verdict.flat for *_, verdict in self.verdicts())


def cluster_soak(folder: Path, seconds: float) -> ClusterSoak:
    """Run for ``seconds``, and return the results; the account balances."""
    seen = ClusterSoak(seconds, Account(""))
    clients = [*PLACES, ROAMER]
    with (
        ClusterProcesses(folder, HOSTS, clients) as cluster,
        cluster.traffic(PLACES) as traffic,
    ):
        is_over = threading.Event()
        threads = [
            threading.Thread(target=work, args=(cluster, seen, is_over), daemon=True)
            for work in (_roam, _end_servers)
        ]
        for thread in threads:
            thread.start()
        _sample(cluster, seen, seconds)
        is_over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        seen.account = _finish(cluster, traffic)
        for broker in cluster.brokers.values():
            assert not broker.events("daemon.bug")
            broker.signal()
            assert broker.exit_status() == 0
    return seen


def _finish(cluster: ClusterProcesses, traffic: Traffic) -> Account:
    cluster.meet()
    traffic.goes_on()
    return traffic.finish("a soak of a cluster").record()


def _sample(cluster: ClusterProcesses, seen: ClusterSoak, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for host, broker in cluster.brokers.items():
            samples = seen.samples.setdefault(host, {})
            for key, value in process_figures(broker.popen.pid).items():
                samples.setdefault(key, []).append(value)
        time.sleep(SAMPLE_S)


def _end_servers(cluster: ClusterProcesses, seen: ClusterSoak, is_over: threading.Event) -> None:
    """Kill one NATS server after the other, and start it again."""
    for server in itertools.cycle(cluster.servers.values()):
        if is_over.wait(END_S):
            return
        server.kill()
        is_over.wait(1.0)
        server.start()
        seen.ends += 1


def _roam(cluster: ClusterProcesses, seen: ClusterSoak, is_over: threading.Event) -> None:
    """Connect to one host after the other, subscribe, publish and leave."""
    for number, host in enumerate(itertools.cycle(HOSTS)):
        if is_over.wait(0.05):
            return
        with (
            brokerd_client.connect(cluster.address(host), ROAMER, key_of(ROAMER)) as client,
            client.subscribe(f"news.{number}.>") as news,
        ):
            client.publish(f"news.{number}.x", number)
            assert next(iter(news)).payload == number
        seen.roamings += 1


def cluster_table(seen: ClusterSoak) -> str:
    """Return the verdicts and the account, in Markdown."""
    account = seen.account
    lines = [
        f"{seen.seconds / 60:g} minutes, three brokers, three NATS servers.",
        "",
        "| host | sampled | median | least to most | rise in the last three quarters | allowed | |",
        "|---|---|---|---|---|---|---|",
    ]
    for host, title, unit, found in seen.verdicts():
        lines.append(
            f"| {host} | {title} | {found.median:.3g} {unit} | {found.least:.3g} to"
            f" {found.most:.3g} | {found.rise:+.2g} | {found.allowed:.2g} |"
            f" {'flat' if found.flat else 'NOT FLAT'} |"
        )
    counts = {
        "messages with receipts, and requests": account.sent,
        "delivered": account.delivered,
        "refused: not delivered, or a request not answered": account.refused,
        "in doubt": account.in_doubt,
        "twice, out of order or unaccounted": account.twice
        + account.out_of_order
        + account.unaccounted,
        "ends of a NATS server": seen.ends,
        "connections of a client that goes from host to host": seen.roamings,
    }
    rows = [f"| {what} | {count:,} |" for what, count in counts.items()]
    return "\n".join([*lines, "", "| work | count |", "|---|---|", *rows])
