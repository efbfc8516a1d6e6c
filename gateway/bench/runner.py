"""Rounds: a subject is started, loaded by the generator, and ended; subjects take turns, so that a noisy minute hits them all."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from msgspec import Struct

import gateway
from gateway.bench import BUSY, FOREIGN, LATE_MS, Load, Measured, Round
from gateway.bench.host import start
from gateway.bench.subject import BenchError, Running, Subject

SCRAPE_SECS = 5.0
"""How often metrics are asked for during a round, as a monitoring system would."""

FIRST_CALLS, FINEST = 50, 0.03
"""Where a search begins, and how near its bounds come to each other."""

Tell = Callable[[str], None]


class Timing(Struct, frozen=True, kw_only=True):
    """How long what takes."""

    ramp_per_sec: float = 100.0
    warm_up_secs: float = 3.0
    seconds: float = 10.0
    seed: int = 1


class _Line(Struct):
    phase: str = ""
    up: int = 0
    failed: str | None = None
    measured: Measured | None = None


def run_round(subject: Subject, calls: int, timing: Timing, tell: Tell) -> Round:
    """One round. Raises BenchError if it can't be run at all."""
    tell(f"{subject.name}, {calls} calls: starting")
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, Running(subject, calls, Path(directory)) as running:
        idle = running.memory_bytes()
        service = subject.service_format
        load = Load(
            calls=calls,
            port=running.ports.listen,
            path=subject.path,
            kind=subject.kind,
            carrier_format=subject.carrier_format,
            service_port=running.ports.service if service is not None else 0,
            service_format=service or subject.carrier_format,
            framed=subject.framed,
            frame_ms=subject.frame_ms,
            held_frames=subject.held_frames,
            pid=running.pid,
            **msgspec.structs.asdict(timing),
        )
        measured = _generate(load, running, partial(_prefixed, tell, f"{subject.name}, {calls} calls: "))
        underruns = running.underruns()
    return Round(
        subject=subject.name,
        calls=calls,
        measured=measured,
        underruns=underruns,
        idle_memory_bytes=idle,
        trouble=[*measured.trouble, *_doubts(measured, subject)],
    )


def _generate(load: Load, running: Running, tell: Tell) -> Measured:
    arguments = [sys.executable, "-m", "gateway.bench.load"]
    process = start(
        arguments,
        cwd=Path(gateway.__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None  # noqa: S101 both are pipes
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(msgspec.json.encode(load) + b"\n")
        process.stdin.close()
        scraped = time.monotonic()
        for text in process.stdout:
            line = msgspec.json.decode(text, type=_Line)
            if line.failed is not None:
                raise BenchError(f"{line.failed}. The subject's last words: {running.last_words()}")
            if line.measured is not None:
                return line.measured
            tell(f"{line.phase}, {line.up} up")
            if time.monotonic() > scraped + SCRAPE_SECS:
                scraped = time.monotonic()
                running.underruns()
        raise BenchError(f"the load generator died with {process.wait()}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _doubts(measured: Measured, subject: Subject) -> Iterator[str]:
    """Why these figures may not be the subject's."""
    own, foreign = measured.own_cpu_secs / measured.seconds, measured.foreign_cpu_secs / measured.seconds
    if measured.lateness.p99 > LATE_MS:
        yield f"the generator was late: {measured.lateness.p99:.1f} ms at the 99th percentile"
    if own > BUSY:
        yield f"the generator was busy: {own:.0%} of a core"
    if foreign > FOREIGN:
        yield f"others used the machine: {foreign:.0%} of a core"
    if measured.missing_frames:
        yield f"{measured.missing_frames} frames never arrived"
    for name, sound in (("up", measured.sound_up), ("down", measured.sound_down)):
        if sound is None and (name == "down" or subject.service_format is not None):
            yield f"what arrived {name} is not what was said"


def measure(subjects: Sequence[Subject], calls: Iterable[int], rounds: int, timing: Timing, tell: Tell) -> Iterator[Round]:
    """All rounds, subjects taking turns. Those of one round have the same phases."""
    counts = [*calls]
    for number in range(rounds):
        for count in counts:
            for subject in subjects:
                again = msgspec.structs.replace(timing, seed=timing.seed + number)
                yield run_round(subject, count, again, partial(_prefixed, tell, f"round {number + 1} of {rounds}: "))


def find(subject: Subject, timing: Timing, tell: Tell, first: int = FIRST_CALLS) -> Iterator[Round]:
    """Rounds towards the largest number of calls that is carried well. The last good one is the answer."""
    good, bad, calls = 0, 0, first
    while True:
        result = run_round(subject, calls, timing, partial(_prefixed, tell, "searching: "))
        yield result
        if result.carried_well:
            good = calls
        else:
            bad = calls
        if bad and (bad - good <= max(2, FINEST * bad)):
            return
        calls = (good + bad) // 2 if bad else guess(result)


def guess(result: Round) -> int:
    """The next number of calls to try: where the CPU would be used up, but never more than twice as many."""
    return max(result.calls + 5, min(2 * result.calls, round(result.calls * 0.92 / max(result.cpu, 0.01))))


def _prefixed(tell: Tell, prefix: str, what: str) -> None:
    tell(prefix + what)


class Summary(Struct, frozen=True, kw_only=True):
    """Medians over the rounds of one subject at one number of calls; of `max` the greatest, of underruns and missing the sums."""

    subject: str
    calls: int
    rounds: int
    valid_rounds: int
    cpu: float
    frame_us: float
    up: dict[str, float] | None
    down: dict[str, float] | None
    sound_up_delay_ms: float | None
    sound_down_delay_ms: float | None
    correlation: float
    underruns: int | None
    missing_frames: int
    call_kib: float
    generator_cpu: float
    generator_late_p99_ms: float
    foreign_cpu: float
    trouble: list[str]


def summarize(rounds: Sequence[Round]) -> Summary:
    """One row of a report. Of rounds some of which are valid, those alone."""
    valid = [each for each in rounds if each.valid]
    counted = valid or rounds
    measured = [each.measured for each in counted]
    sounds = [sound for each in measured for sound in (each.sound_up, each.sound_down) if sound is not None]
    underruns = [each.underruns for each in counted if each.underruns is not None]
    return Summary(
        subject=rounds[0].subject,
        calls=rounds[0].calls,
        rounds=len(rounds),
        valid_rounds=len(valid),
        cpu=median(each.cpu for each in counted),
        frame_us=median(each.frame_us for each in counted),
        up=_latency([each.up for each in measured]),
        down=_latency([each.down for each in measured]),
        sound_up_delay_ms=_median(each.sound_up.delay_ms for each in measured if each.sound_up is not None),
        sound_down_delay_ms=_median(each.sound_down.delay_ms for each in measured if each.sound_down is not None),
        correlation=min((each.correlation for each in sounds), default=0.0),
        underruns=sum(underruns) if underruns else None,
        missing_frames=sum(each.missing_frames for each in measured),
        call_kib=median(each.call_bytes for each in counted) / 1024,
        generator_cpu=median(each.own_cpu_secs / each.seconds for each in measured),
        generator_late_p99_ms=median(each.lateness.p99 for each in measured),
        foreign_cpu=median(each.foreign_cpu_secs / each.seconds for each in measured),
        trouble=[*{why.partition(":")[0]: why for each in rounds for why in each.trouble}.values()],
    )


def table(rounds: Sequence[Round]) -> list[Summary]:
    """A summary for each subject and number of calls, in the order in which they first came."""
    groups: dict[tuple[str, int], list[Round]] = {}
    for each in rounds:
        groups.setdefault((each.subject, each.calls), []).append(each)
    return [summarize(group) for group in groups.values()]


def _latency(spreads: Sequence[Any]) -> dict[str, float] | None:
    found = [each for each in spreads if each is not None]
    if not found:
        return None
    return {
        **{name: median(getattr(each, name) for each in found) for name in ("p50", "p90", "p99", "p999")},
        "max": max(each.max for each in found),
    }


def _median(values: Iterable[float]) -> float | None:
    found = [*values]
    return median(found) if found else None
