"""Level one: whatever comes, `decode` gives events or raises MalformedFrame, and what it gives can be told."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter, thread_time_ns
from typing import Any

import msgspec

from gateway.errors import MalformedFrame

from .codecs import TARGETS, Target
from .mutation import Frame, Mutator

REGRESSIONS = Path(__file__).parent / "regressions"
ROUND = 40
"""Frames to one codec, which remembers its start and ids."""


class Failure(msgspec.Struct):
    """A conversation that broke something: frames in order, `t` text, `b` bytes or `s` text with lone surrogates, in base64."""

    level: str
    codec: str
    script: int
    frames: list[tuple[str, str]]
    seed: int = 0
    error: str = ""

    @classmethod
    def of(cls, level: str, codec: str, script: int, frames: Iterable[Frame], seed: int, error: BaseException) -> Failure:
        return cls(level, codec, script, [_kept(frame) for frame in frames], seed, f"{type(error).__name__}: {error}"[:300])

    def given(self) -> list[Frame]:
        """The frames again."""
        return [
            text if kind == "t" else b64decode(text) if kind == "b" else b64decode(text).decode(errors="surrogatepass")
            for kind, text in self.frames
        ]


def _kept(frame: Frame) -> tuple[str, str]:
    if isinstance(frame, bytes):
        return "b", b64encode(frame).decode()
    if any("\ud800" <= char <= "\udfff" for char in frame):
        return "s", b64encode(frame.encode(errors="surrogatepass")).decode()
    return "t", frame


@dataclass
class Figures:
    """What came of a run. Times are of one frame, in nanoseconds of its CPU: what else the machine does is not in them."""

    frames: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    buckets: Counter[int] = field(default_factory=Counter)
    worst_ns: int = 0
    failures: list[Failure] = field(default_factory=list)

    def quantile_us(self, share: float) -> float:
        """Microseconds; buckets are a quarter of one."""
        left = share * sum(self.buckets.values())
        for bucket in sorted(self.buckets):
            left -= self.buckets[bucket]
            if left <= 0:
                return (bucket + 1) * 0.256
        return 0.0

    def line(self) -> dict[str, object]:
        read = self.reasons["read"]
        return {
            "frames": self.frames,
            "per_second": round(self.frames / max(self.seconds, 1e-9)),
            "read": read,
            "malformed": self.reasons.total() - read,
            "reasons": len(self.reasons) - 1,
            "p50_us": round(self.quantile_us(0.5), 1),
            "p99_9_us": round(self.quantile_us(0.999), 1),
            "worst_us": round(self.worst_ns / 1000),
            "exceptions": len(self.failures),
        }


def one(decode: Callable[[Frame], Iterable[Any]], check: Callable[[Any], None], frame: Frame) -> tuple[str, int]:
    """Decode one frame: what came of it, and the nanoseconds. Raises what must not be raised."""
    began = thread_time_ns()
    try:
        events = [*decode(frame)]
    except MalformedFrame as error:
        took = thread_time_ns() - began
        str(error)
        return error.reason, took
    took = thread_time_ns() - began
    for event in events:
        check(event)
    return "read", took


def replay(target: Target, script: int, frames: Sequence[Frame]) -> None:
    decode = target.make(script)
    for frame in frames:
        one(decode, target.check, frame)


def run(name: str, count: int, seed: int, tell: Callable[[int], None] = lambda _: None) -> Figures:
    """`count` frames to codec `name`. `tell` hears of the progress."""
    target, random, figures = TARGETS[name](), Random(seed), Figures()
    mutators = [Mutator([*frames, *target.seeds[0]], random) for frames in target.seeds]
    reasons: dict[str, int] = {}
    buckets: dict[int, int] = {}
    began = perf_counter()
    while figures.frames < count:
        script = int(random.random() * len(target.seeds))
        decode, mutator = target.make(script), mutators[script]
        # Half of the conversations begin as they should.
        sent: list[Frame] = [] if random.random() < 0.3 else [*target.seeds[script][:2]]
        sent += [mutator.frame() for _ in range(min(ROUND, count - figures.frames))]
        figures.frames += min(ROUND, count - figures.frames)
        for at, frame in enumerate(sent):
            try:
                reason, took = one(decode, target.check, frame)
            except Exception as error:
                figures.failures.append(Failure.of("decode", name, script, sent[: at + 1], seed, error))
                break
            reasons[reason] = reasons.get(reason, 0) + 1
            bucket = took >> 8
            buckets[bucket] = buckets.get(bucket, 0) + 1
            if took > figures.worst_ns:
                figures.worst_ns = took
        if len(figures.failures) > 20:
            break
        tell(figures.frames)
    figures.reasons.update(reasons)
    figures.buckets.update(buckets)
    figures.seconds = perf_counter() - began
    return figures
