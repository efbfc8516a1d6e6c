"""Alignment: a stream that comes back is found again, late or filtered, and a stranger's is not taken for it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway import speech
from gateway.alignment import align, measure_echo

RATE = 8000
CHUNK = 160
SPEECH = np.frombuffer(speech.hello().pcm, "<i2").astype(np.float64)


def pcm(samples: NDArray[np.float64]) -> bytes:
    return samples.astype("<i2").tobytes()


@pytest.mark.parametrize("shift", [0, 37, -1000, 4000])
def test_a_shifted_copy_is_found_to_the_sample(shift: int) -> None:
    theirs = np.concatenate([np.zeros(max(0, shift)), SPEECH[max(0, -shift) :]])
    found = align(SPEECH, theirs)
    assert found is not None
    assert shift == found[0]
    assert found[1] == pytest.approx(1.0)


def test_a_quieter_noisy_copy_is_still_the_same_words() -> None:
    noise = np.random.default_rng(1).normal(0, 100, len(SPEECH))
    found = align(SPEECH, SPEECH * 0.5 + noise)
    assert found is not None
    assert found[0] == 0
    assert 0.9 < found[1] < 1.0


def test_other_words_silence_and_nothing_are_no_echo() -> None:
    assert None is align(SPEECH, SPEECH[::-1].copy())
    assert None is align(SPEECH, np.zeros(8000))
    assert None is align(SPEECH, np.zeros(0))
    assert None is align(np.zeros(8000), np.zeros(8000))
    assert None is align(SPEECH, SPEECH[:4000])  # a fragment is not what was said


def test_latency_is_the_arrival_of_a_chunk_less_its_sending() -> None:
    chunks = len(SPEECH) // CHUNK
    sent_at = [k * 0.02 for k in range(chunks)]
    arrivals = [(k * 0.02 + (0.5 if k == 100 else 0.003), (k + 1) * CHUNK) for k in range(chunks)]
    said = pcm(SPEECH[: chunks * CHUNK])
    echo = measure_echo(said, said, said, RATE, sent_at=sent_at, arrivals=arrivals, heard_at=0.023)
    assert echo is not None
    assert (echo.p50_ms, echo.shift_ms, echo.delay_ms) == (3.0, 0.0, 23.0)
    assert echo.p99_ms < 10


def test_a_filter_of_four_milliseconds_is_told_apart_from_latency() -> None:
    chunks = len(SPEECH) // CHUNK
    sent_at = [k * 0.02 for k in range(chunks)]
    arrivals = [(k * 0.02 + 0.003, (k + 1) * CHUNK) for k in range(chunks)]
    said, late = pcm(SPEECH), pcm(np.concatenate([np.zeros(32), SPEECH]))
    echo = measure_echo(said, late, late, RATE, sent_at=sent_at, arrivals=arrivals, heard_at=0.023)
    assert echo is not None
    assert (echo.p50_ms, echo.shift_ms, echo.delay_ms) == (3.0, 4.0, 27.0)


def test_larger_frames_count_the_waiting_of_their_first_chunk() -> None:
    chunks = len(SPEECH) // (3 * CHUNK) * 3
    sent_at = [k * 0.02 for k in range(chunks)]
    arrivals = [((k + 2) * 0.02 + 0.001, (k + 3) * CHUNK) for k in range(0, chunks, 3)]
    said = pcm(SPEECH[: chunks * CHUNK])
    echo = measure_echo(said, said, said, RATE, sent_at=sent_at, arrivals=arrivals)
    assert echo is not None
    assert (echo.p50_ms, echo.p99_ms, echo.delay_ms) == (21.0, 41.0, None)


def test_without_an_echo_there_is_no_latency() -> None:
    assert None is measure_echo(pcm(SPEECH), b"", b"", RATE, sent_at=[0.0], arrivals=[])
