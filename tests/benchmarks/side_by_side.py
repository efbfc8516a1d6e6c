"""This gateway beside others, on one machine in one run: `python tests/benchmarks/side_by_side.py`.

Every round each subject has its turn, so that a noisy minute hits them all; what counts are ratios of medians. The load, and what
the words mean, is `gateway.bench`. Peers are in `peers/`: none of the gateway's code, and nothing that could be left out.

Node needs the package `ws` (`npm install ws` in any directory, given by --ws), pipecat a Python of its own (--pipecat).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
from rich.console import Console  # noqa: E402

from gateway.bench import Round, picture  # noqa: E402
from gateway.bench.command import machine, print_table  # noqa: E402
from gateway.bench.runner import Summary, Timing, measure, table  # noqa: E402
from gateway.bench.subject import BenchError, Gateway, Subject  # noqa: E402
from gateway.media import MULAW_8K, Encoding, MediaFormat  # noqa: E402

PEERS = Path(__file__).parent / "peers"
TWILIO, PLIVO = "twilio_media_streams", "plivo_audio_streaming"
NAIVE = "naive aiohttp, soxr"
SOXR_HOLDS = 7
"""Frames that a soxr stream keeps to itself: 115 ms."""


def pcm(rate: int) -> MediaFormat:
    return MediaFormat(Encoding.PCM_S16LE, rate)


def subjects(ws: Path | None, pipecat: Path | None) -> dict[str, list[Subject]]:
    """By the word that chooses them."""
    ours = Gateway(kind=TWILIO)

    def variant(name: str, **changes: object) -> Subject:
        return msgspec.structs.replace(ours, name=f"this gateway, {name}", **changes)

    naive = (sys.executable, str(PEERS / "naive_aiohttp.py"), "{listen}", "{service}")
    found: dict[str, list[Subject]] = {
        "ours": [ours],
        "naive": [Subject(name=NAIVE, kind=TWILIO, command=naive, held_frames=SOXR_HOLDS)],
        "formats": [
            variant("mu-law as it is", service_format=MULAW_8K),
            variant("framed", framed=True),
            variant("24 kHz", service_format=pcm(24000)),
            variant("48 kHz", service_format=pcm(48000)),
            variant("Plivo", kind=PLIVO),
            variant("Plivo at 16 kHz", kind=PLIVO, carrier_format=pcm(16000)),
        ],
        "workers": [variant("2 workers", workers=2)],
        "echo": [variant("echo service", service_format=None)],
        "frames": [variant(f"{ms} ms up", frame_ms=ms) for ms in (60, 100)],
        "listeners": [variant(f"{count} listener{'s' * (count > 1)}", listeners=count) for count in (1, 2, 4)],
        "idle": [variant("10,000 idle routes", idle_routes=10_000), variant("50 idle services", idle_services=50)],
        "node": [],
        "pipecat": [],
    }
    node = shutil.which("node")
    if node and ws is not None and (ws / "node_modules" / "ws").is_dir():
        command = (node, str(PEERS / "relay.mjs"), "{listen}", "{service}", str(ws.resolve()))
        found["node"] = [Subject(name="Node ws, no filter", kind=TWILIO, command=command)]
    if pipecat is not None:
        for rate in (8000, 16000):
            command = (str(pipecat), str(PEERS / "pipecat_echo.py"), "{listen}", str(rate))
            echo = Subject(name=f"pipecat echo, {rate // 1000} kHz", kind=TWILIO, command=command, service_format=None)
            found["pipecat"].append(msgspec.structs.replace(echo, held_frames=2 * SOXR_HOLDS + 5))
    return found


def ratios(rows: list[Summary]) -> Iterator[tuple[str, int, float, float]]:
    """(subject, calls, cost of a frame and p99 through the naive relay's in the same run)."""
    for row in rows:
        base = next((each for each in rows if each.subject == NAIVE and each.calls == row.calls), None)
        if base is not None and row is not base:
            yield row.subject, row.calls, row.frame_us / base.frame_us, worst(row) / worst(base)


def worst(row: Summary) -> float:
    return max(spread["p99"] for spread in (row.up, row.down) if spread is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--subjects", default="ours,naive,node", help="ours naive node pipecat formats echo frames listeners workers idle"
    )
    parser.add_argument("--calls", default="100", help="one or several: 10,50,100")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument("--ws", type=Path, help="a directory in which `npm install ws` was done")
    parser.add_argument("--pipecat", type=Path, help="a Python with pipecat-ai and uvicorn")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    options = parser.parse_args()
    known = subjects(options.ws, options.pipecat)
    chosen: list[Subject] = []
    for word in options.subjects.split(","):
        if word not in known:
            parser.error(f"{word!r} is none of {', '.join(known)}")
        if not known[word]:
            print(f"{word}: left out, it is not installed (--ws DIRECTORY, --pipecat PYTHON)", file=sys.stderr)
        chosen += known[word]
    timing = Timing(seconds=options.seconds, warm_up_secs=options.warm_up)
    rounds: list[Round] = []
    last = ""

    def tell(what: str) -> None:
        nonlocal last
        what = what.rpartition(":")[0]
        if what != last:
            last = what
            print(what, file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for each in measure(chosen, [int(calls) for calls in options.calls.split(",")], options.rounds, timing, tell):
            rounds.append(each)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the rounds until then", file=sys.stderr)
    except BenchError as error:
        sys.exit(str(error))
    rows = table(rounds)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.encode({"machine": machine(), "rounds": rounds, "summary": rows}))
    if rows:
        print_table(Console(highlight=False, width=None if sys.stdout.isatty() else 160), rows)
    for name, calls, cost, p99 in ratios(rows):
        print(f"{name}, {calls} calls: {cost:.2f} of {NAIVE}'s cost of a frame, {p99:.2f} of its p99")
    if options.plot is not None and rows:
        picture.draw(rows, machine(), options.plot)


if __name__ == "__main__":
    main()
