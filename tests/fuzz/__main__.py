"""Run the targets under atheris, guided by coverage: ``make fuzz``, or in ``tests``:
``python -m fuzz --help``.

New inputs, and inputs that make a target fail, are written to ``.fuzz`` beside this
checkout's files. The next run begins with the new ones; ``--replay`` takes a failing
one.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

from support.fuzz.corpus import CORPUS, TARGETS

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".fuzz"
#: Bytes of the longest input.
LONGEST = 4096


def main() -> int:
    """Return 0, or 1 if a target failed."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description="Fuzz the targets with atheris."
    )
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="for all targets together; default 600"
    )
    parser.add_argument("--one", metavar="TARGET", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--replay", metavar="FILE", type=Path, help="run the one target on the input in a file"
    )
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all"
    )
    arguments = parser.parse_args()
    wanted = arguments.targets or list(TARGETS)
    if unknown := set(wanted) - set(TARGETS):
        parser.error(
            f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}"
        )
    if arguments.replay is not None:
        if len(arguments.targets) != 1:
            parser.error("--replay needs the one target whose input it is")
        importlib.import_module(f"fuzz.targets.{wanted[0]}").target(arguments.replay.read_bytes())
        print(f"{wanted[0]}: nothing is wrong with this input")
        return 0
    if arguments.one is not None:
        return fuzz(arguments.one, arguments.seconds)
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed here: pip install --editable '.[fuzz]'", file=sys.stderr)
        return 1
    failed = [name for name in wanted if not run(name, arguments.seconds / len(wanted))]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


def run(name: str, seconds: float) -> bool:
    """Fuzz one target in a process of its own and print the result; return whether it
    found nothing.
    """
    WORK.mkdir(exist_ok=True)
    log = WORK / f"{name}.log"
    began = time.monotonic()
    command = [sys.executable, "-m", "fuzz", "--one", name, "--seconds", str(seconds)]
    with log.open("wb") as file:
        status = subprocess.run(
            command, cwd=ROOT / "tests", stdout=file, stderr=file, check=False
        ).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    done = re.search(r"stat::number_of_executed_units: *(\d+)", text)
    steps = re.findall(r"^#(\d+).* cov: (\d+).* corp: (\d+)", text, re.MULTILINE)
    executions = int(done[1]) if done else int(steps[-1][0]) if steps else 0
    coverage, inputs = steps[-1][1:] if steps else ("?", "?")
    print(
        f"{name:14} {executions:>10} executions in {time.monotonic() - began:6.0f} s, "
        f"coverage {coverage}, {inputs} inputs: {'nothing found' if status == 0 else 'FAILED'}",
        flush=True,
    )
    if status != 0:
        print("".join(f"    {line}\n" for line in text.splitlines()[-40:] if line.strip()))
        print(
            f"    again: python -m fuzz {name} --replay FILE, in tests; the whole log is"
            f" {log.relative_to(ROOT)}"
        )
    # A run that ended by itself without any output has not fuzzed.
    return status == 0 and executions > 0


def fuzz(name: str, seconds: float) -> int:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["brokerd", "brokerd_client", "yaml"]):
        module = importlib.import_module(f"fuzz.targets.{name}")
    found, failures = WORK / "found" / name, WORK / "failures" / name
    for folder in (found, failures):
        folder.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={failures}/",
        "-print_final_stats=1",
        "-timeout=60",
        "-rss_limit_mb=2048",
    ]
    more = {}
    if hasattr(module, "mutated"):
        # Randomly changed bytes are hardly ever JSON.
        more["custom_mutator"] = lambda data, size, seed: (
            atheris.Mutate(data, size) if seed % 4 == 0 else module.by_seed(data, seed)[:size]
        )
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], module.target, **more)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
