"""``make soak SOAK_MIN=20``: run a soak, report whether it was flat, and write table
and plot for docs/reliability.md. ``--cluster``: the soak of three hosts.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from support import reliability_page
from support.soak.cluster import cluster_soak, cluster_table
from support.soak.page import picture, table
from support.soak.run import SERIES, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument(
        "--write", action="store_true", help="write docs/reliability.md and its picture"
    )
    parser.add_argument("--cluster", action="store_true", help="three hosts over NATS")
    arguments = parser.parse_args()
    if arguments.cluster:
        return _cluster(arguments.minutes, write=arguments.write)
    print(f"{arguments.minutes:g} minutes of mixed work, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        result = soak(Path(directory), arguments.minutes * 60, arguments.seed)
    text = table(result)
    print(text)
    if arguments.write:
        (reliability_page.PAGE.parent / "reliability").mkdir(exist_ok=True)
        (reliability_page.PAGE.parent / "reliability" / "soak.svg").write_text(picture(result))
        reliability_page.put("soak", text)
    verdicts = result.verdicts()
    return 0 if all(verdicts[each.key].flat for each in SERIES) else 1


def _cluster(minutes: float, *, write: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        seen = cluster_soak(Path(directory), minutes * 60)
    text = cluster_table(seen)
    print(text)
    if write:
        reliability_page.put("soak of a cluster", text)
    return 0 if seen.is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
