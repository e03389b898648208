"""``make soak SOAK_MIN=20``: run a soak, report whether it was flat, and write table
and plot for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from support import reliability_page
from support.soak.page import picture, table
from support.soak.run import SERIES, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument(
        "--write", action="store_true", help="write docs/reliability.md and its picture"
    )
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    sys.exit(main())
