"""How late and how faithfully a caller's own words come back, found by aligning sample streams. Pure numpy, no clock.

No frame is marked and nothing is guessed: the returned stream is compared with what was said, and each chunk is found in it.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

_CHUNK_MS = 20
_LONGEST_SECS = 120  # of each stream; alignment needs no more, and memory stays bounded


class Echo(Struct, frozen=True):
    """What the line does to a caller's own words, measured only where the gateway sent them back.

    `p50_ms`, `p99_ms` — from sending a 20 ms chunk to receiving most of it. `shift_ms` — how much later the words are in the
    returned stream than in ours, that is, the filters' delay. `delay_ms` — from a word's sending to the ear, playout included.
    `correlation` — 1 is a perfect copy.
    """

    correlation: float
    p50_ms: float
    p99_ms: float
    shift_ms: float
    delay_ms: float | None = None


def measure_echo(
    said: bytes,
    received: bytes,
    heard: bytes,
    sample_rate: int,
    *,
    sent_at: list[float],
    arrivals: list[tuple[float, int]],
    heard_at: float | None = None,
) -> Echo | None:
    """Latency by marking: where the returned stream is ours, each chunk's middle is found in it, and so is when it came.

    `said`, `received`, `heard` are PCM16; `sent_at` has the time of each 20 ms chunk, `arrivals` times and samples received by
    then; `heard_at` is when `heard` began, after the first sending. None unless streams correlate above 0.9.
    """
    ours, theirs = _samples(said, sample_rate), _samples(received, sample_rate)
    found = align(ours, theirs)
    if found is None:
        return None
    shift, correlation = found
    times, ends = np.array([at for at, _ in arrivals]), np.array([count for _, count in arrivals])
    chunk = sample_rate * _CHUNK_MS // 1000
    middles = np.arange(min(len(sent_at), len(said) // 2 // chunk)) * chunk + chunk // 2 + shift
    which = np.flatnonzero((middles >= 0) & (middles < ends[-1]))
    if not len(which):
        return None
    latencies = (times[np.searchsorted(ends, middles[which], side="right")] - np.array(sent_at)[which]) * 1000
    p50, p99 = np.percentile(latencies, [50, 99])
    delayed = align(ours, _samples(heard, sample_rate))
    delay_ms = None
    if delayed is not None and heard_at is not None:
        delay_ms = round(heard_at * 1000 + delayed[0] * 1000 / sample_rate, 1)
    shift_ms = round(shift * 1000 / sample_rate, 2)
    return Echo(round(correlation, 4), round(float(p50), 3), round(float(p99), 3), shift_ms, delay_ms)


def align(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[int, float] | None:
    """Where `ours` begins in `theirs`, in samples, and how alike they are there; None below 0.9 or where nothing sounds."""
    if not len(ours) or not len(theirs):
        return None
    size = 1 << (len(ours) + len(theirs) - 1).bit_length()
    product = np.fft.irfft(np.fft.rfft(theirs, size) * np.conj(np.fft.rfft(ours, size)), size)
    shift = int(np.argmax(product))
    shift -= size if shift > size // 2 else 0
    begin, end = max(0, shift), min(len(theirs), len(ours) + shift)
    if end <= begin:
        return None
    a, b = ours[begin - shift : end - shift], theirs[begin:end]
    energy = float(np.sqrt(np.dot(a, a) * np.dot(b, b)))
    loud_enough = np.dot(a, a) > 0.5 * np.dot(ours, ours) and energy > len(a) * 100.0  # most of what was said, above a whisper
    correlation = float(np.dot(a, b)) / energy if energy else 0.0
    return (shift, correlation) if loud_enough and correlation > 0.9 else None


def _samples(pcm: bytes, sample_rate: int) -> NDArray[np.float64]:
    return np.frombuffer(pcm[: _LONGEST_SECS * sample_rate * 2], "<i2").astype(np.float64)
