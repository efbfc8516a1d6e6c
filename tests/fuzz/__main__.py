"""Long runs. See the package."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from time import monotonic
from typing import Any

import msgspec

from tests.results import store

from . import decode, session, wire
from .codecs import TARGETS
from .decode import REGRESSIONS, Failure, Figures

PROGRESS_SECS = 10.0


def progress(name: str, count: int) -> Any:
    """Tells of the frames so far, now and then."""
    began = last = monotonic()

    def tell(frames: int) -> None:
        nonlocal last
        if (now := monotonic()) - last >= PROGRESS_SECS:
            last = now
            print(f"{name}: {frames:,} of {count:,}, {frames / (now - began):,.0f} a second", file=sys.stderr, flush=True)

    return tell


def work(job: tuple[str, str, int, int]) -> Figures:
    """One share of one codec's frames, in its own process."""
    level, codec, count, seed = job
    run = decode.run if level == "decode" else session.run
    return run(codec, count, seed, progress(f"{codec} (seed {seed})", count))


def merged(parts: list[Figures]) -> Figures:
    whole = Figures()
    for part in parts:
        whole.frames += part.frames
        whole.seconds = max(whole.seconds, part.seconds)
        whole.reasons += part.reasons
        whole.buckets += part.buckets
        whole.worst_ns = max(whole.worst_ns, part.worst_ns)
        whole.failures += part.failures
    return whole


def keep(failures: list[Failure]) -> None:
    """Write each kind of failure once, to be played again in every run from now on."""
    for number, failure in enumerate({each.error: each for each in failures}.values()):
        path = REGRESSIONS / f"{failure.level}-{failure.codec}-{failure.seed}-{number}.json"
        path.write_text(json.dumps(msgspec.to_builtins(failure), indent=1) + "\n")
        print(f"kept: {path}: {failure.error}", file=sys.stderr)


def in_process(level: str, codecs: list[str], count: int, seed: int, jobs: int) -> dict[str, dict[str, object]]:
    lines = {}
    with ProcessPoolExecutor(jobs) as pool:
        for codec in codecs:
            share = -(-count // jobs)
            whole = merged([*pool.map(work, [(level, codec, share, seed + at) for at in range(jobs)])])
            keep(whole.failures)
            lines[codec] = whole.line()
            print(f"{level} {codec}: {json.dumps(lines[codec])}", flush=True)
    return lines


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--level", choices=("decode", "session", "wire"), default="decode")
    parser.add_argument("--codec", action="append", choices=[*TARGETS], help="default: all of the level")
    parser.add_argument("--count", type=int, default=1_000_000, help="bent frames, for each codec (wire: together)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--rate", type=float, default=1e6, help="wire: frames a second, at most; above what a core takes, calls wait"
    )
    parser.add_argument("--store", action="store_true", help="write the figures to tests/results for the fault table")
    given = parser.parse_args()
    if given.level == "wire":
        figures = asyncio.run(wire.run(given.count, given.seed, given.jobs, rate=given.rate, tell=progress("wire", given.count)))
        passed = wire.passed(figures)
    else:
        codecs = given.codec or [*(TARGETS if given.level == "decode" else session.KINDS)]
        lines = in_process(given.level, codecs, given.count, given.seed, given.jobs)
        figures = {"codecs": lines, "frames": sum(int(str(line["frames"])) for line in lines.values())}
        figures["exceptions"] = sum(int(str(line["exceptions"])) for line in lines.values())
        passed = not figures["exceptions"]
    figures["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(json.dumps(figures))
    if given.store:
        store(f"fuzz-{given.level}", figures, passed=passed, module="tests.fuzz")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
