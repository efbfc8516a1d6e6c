"""Instructions for each frame of the pure path, compared with instructions.json beside it; `--record` writes that file.

Counted by valgrind's callgrind, so a busy machine makes no difference. Callgrind writes down its count whenever the process calls
getppid(2), which nothing else does: so start-up is left out, and each path is counted twice, with few and with many frames, whose
difference is the frames' alone. A path is all that belongs to a frame but sockets, tasks and the event loop:

up      the carrier's frame → session, codec, bus → journal, converter, ring → the service's message
down    the service's message → converter → session, playout, codec → the carrier's frame, and when the next one is due

Every call has a journal, as a live one does; in framed mode the journal keeps the caller's audio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

FIGURES = Path(__file__).with_name("instructions.json")
COMMAND = "python tests/benchmarks/instructions.py --record"
WARM, FEW, MANY = 100, 100, 500
MOST = 0.05
"""More than this is more: a change that costs so much shows."""

PATHS = [f"{direction}, {how}" for how in ("16 kHz", "16 kHz framed", "mu-law as it is") for direction in ("up", "down")]


def frame_by_frame(path: str) -> Callable[[int], None]:
    """What carries the frame of a number."""
    import msgspec

    import providers
    from gateway.audio import Converter
    from gateway.bench.frames import Speech
    from gateway.bus import Channel, Subscription
    from gateway.events import Audio, Event, Start
    from gateway.journal import Journal, Standing
    from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
    from gateway.services.framed import HEADER_BYTES, Flags, Header, Numbers, pack, unpack
    from gateway.services.intake import Intake
    from gateway.services.native import NativeCarrier
    from gateway.services.ring import Frame
    from gateway.session import Session

    direction, _, how = path.partition(", ")
    form = MULAW_8K if how.startswith("mu-law") else MediaFormat(Encoding.PCM_S16LE, 16000)
    framed = how.endswith("framed")
    provider = providers.load("twilio_media_streams")
    carrier = provider.carrier()
    channel = Channel("s", [])
    subscription = Subscription(MULAW_8K, capacity_ms=5000)
    channel.subscribe(subscription)
    emit: Callable[[Event], None] = channel.publish
    session = Session(provider(msgspec.convert({"auth": "none"}, provider.Config)).codec(), emit=emit, note=lambda *_: None)
    start = Start("MZ" + "0" * 32, "CA" + "0" * 32, "AC" + "0" * 32, media_format=MULAW_8K)
    for text in carrier.encode(start):
        session.receive(text, 0.0)
    protocol = NativeCarrier(
        session="s", provider="p", kind="k", role="speaker", track=Track.INBOUND, media_format=form, frame_ms=20
    )
    intake = Intake(MULAW_8K, form, frame_ms=20, capacity_ms=10_000, track=Track.INBOUND, protocol=protocol)
    with tempfile.TemporaryDirectory() as directory:  # the mapping outlives it
        standing = Standing("s", "r")
        journal, _ = Journal("benchmark", directory=Path(directory)).begin("p", "CA", standing, capacity=80_000 * framed)
    assert journal is not None
    intake.journal = journal
    downward, numbers = Converter(form, MULAW_8K), Numbers()
    theirs, ours = Speech(MULAW_8K), Speech(form)
    frames = [
        text for tick in range(WARM + FEW + MANY) for text in carrier.encode(Audio(theirs.piece(tick), Track.INBOUND, tick * 20))
    ]
    messages = [
        pack(Header(Track.INBOUND, 0, tick, tick * 320), ours.piece(tick)) if framed else ours.piece(tick)
        for tick in range(WARM + FEW + MANY)
    ]
    sizes = {len(ours.piece(0)) + HEADER_BYTES * framed} if direction == "up" else {len(frames[0])}
    said: set[int] = set()

    now = 0.0

    def pass_on() -> None:
        ring = intake.ring
        for event in subscription.take_nowait():
            intake.take(event, now)
        while (entry := ring.take(keep=framed)) is not None:
            if isinstance(entry, Frame):
                message = entry.payload
                if framed:
                    message = pack(Header(Track.INBOUND, entry.flags, entry.seq, entry.pos), message)
                assert len(message) in sizes
        assert 20_000 > (ring.unacked_bytes if framed else ring.waiting_bytes)

    subscription.notify(pass_on)

    def up(tick: int) -> None:
        nonlocal now
        now = tick * 0.02
        session.receive(frames[tick], now)
        assert intake.ring.next_seq > tick, "it has been passed on"
        if framed and not tick % 10:
            intake.ring.ack(intake.ring.next_seq - 1)
            journal.acked(intake.ring.acked)

    def down(tick: int) -> None:
        now = tick * 0.02
        message = messages[tick]
        if framed:
            header = unpack(message, form.sample_bytes)
            assert numbers.take(header.seq)
            journal.took(numbers.next)
            assert not header.flags & Flags.DISCONTINUITY
            assert not header.flags & Flags.LAST
            message = message[HEADER_BYTES:]
        session.perform(Audio(downward.convert(message)), now)
        while (frame := session.next_frame(now)) is not None:
            said.add(len(frame))
        assert len(said) == 1
        session.next_due()

    return up if direction == "up" else down


def child(paths: list[str]) -> None:
    """What valgrind watches."""
    for path in paths:
        carry, at = frame_by_frame(path), 0
        for frames in (WARM, FEW, MANY):
            os.getppid()
            for tick in range(at, at + frames):
                carry(tick)
            at += frames
        os.getppid()


def count(paths: list[str]) -> dict[str, int]:
    """Instructions for one frame of each path. Raises RuntimeError where valgrind can't tell."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as directory:
        out = f"--callgrind-out-file={directory}/out"
        command = ["valgrind", "--tool=callgrind", "--dump-before=getppid", out, sys.executable, __file__, "--child", *paths]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        parts = [Path(directory, f"out.{number + 1}") for number in range(4 * len(paths))]
        if run.returncode or not all(part.exists() for part in parts):
            raise RuntimeError(run.stderr[-2000:])
        totals = [int(re.findall(r"^(?:summary|totals): (\d+)", part.read_text(), re.MULTILINE)[-1]) for part in parts]
    # The first part of each path is what came before it, the second its warm-up.
    return {path: round((totals[4 * n + 3] - totals[4 * n + 2]) / (MANY - FEW)) for n, path in enumerate(paths)}


def versions() -> dict[str, str]:
    """What figures hold for: another interpreter or library has others."""
    import msgspec
    import numpy as np

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "msgspec": msgspec.__version__,
        "cpu": f"{platform.machine()}{', avx2' if 'avx2' in flags else ''}",
    }


def recorded() -> dict[str, object]:
    found: dict[str, object] = json.loads(FIGURES.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write instructions.json")
    parser.add_argument("--only", choices=PATHS, help="one path")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    before = recorded() if FIGURES.exists() else {"versions": {}, "instructions": {}}
    known: dict[str, float] = before["instructions"]  # type: ignore[assignment]
    if before["versions"] != versions():
        print(f"recorded with {before['versions']}, this is {versions()}: figures may differ for that alone")
    now = count([options.only] if options.only else PATHS)
    for path in now:
        change = f"{now[path] / known[path] - 1:+.1%}" if path in known else "new"
        print(f"{path:<26}{now[path]:>10,} instructions a frame   {change}", flush=True)
    if options.record:
        figures = {"command": COMMAND, "versions": versions(), "instructions": {**known, **now}}
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
