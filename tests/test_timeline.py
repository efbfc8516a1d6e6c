"""One track's time axis over an hour: audio and told gaps are as long as the timestamps say, and nothing is invented."""

from __future__ import annotations

from random import Random

import pytest

from gateway.timeline import LARGEST_SURPLUS_MS, Timeline

HOUR = 3_600_000 // 20
FRAME_MS = 20


def payload(n: int) -> bytes:
    return n.to_bytes(4, "big")


def place(chunks: list[tuple[float, int]], duration_ms: float = FRAME_MS) -> tuple[float, float, list[int]]:
    """Feed (timestamp, frame number). Returns milliseconds of audio and gaps, of timestamps, and each gap."""
    timeline = Timeline()
    told, gaps = 0.0, []
    for at, n in chunks:
        lost = timeline.place(round(at), payload(n), duration_ms)
        if lost is not None:
            told += lost + duration_ms
            if lost:
                gaps.append(lost)
    return told, round(chunks[-1][0]) - round(chunks[0][0]) + duration_ms, gaps


def kept(random: Random, share: float) -> list[int]:
    """Frame numbers of an hour of which `share` is lost, but never the first and last."""
    return [n for n in range(HOUR) if n in (0, HOUR - 1) or random.random() >= share]


def test_an_hour_without_loss_has_no_gap() -> None:
    told, expected, gaps = place([(n * FRAME_MS, n) for n in range(HOUR)])
    assert (expected, []) == (told, gaps)


@pytest.mark.parametrize("seed", range(3))
def test_an_hour_with_one_frame_in_a_hundred_lost_keeps_its_length_exactly(seed: int) -> None:
    frames = kept(Random(seed), 0.01)
    told, expected, gaps = place([(7 + n * FRAME_MS, n) for n in frames])
    assert expected == told
    assert (HOUR - len(frames)) * FRAME_MS == sum(gaps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drift", [0.0015, -0.0015])
def test_a_clock_that_drifts_with_loss_keeps_its_length_within_a_frame(drift: float, seed: int) -> None:
    frames = kept(Random(seed), 0.01)
    told, expected, _ = place([(n * FRAME_MS * (1 + drift), n) for n in frames])
    assert abs(told - expected) <= FRAME_MS * 2 if drift < 0 else abs(told - expected) <= FRAME_MS


def test_a_slow_clock_without_loss_invents_and_drops_nothing() -> None:
    told, expected, gaps = place([(n * FRAME_MS * 0.9985, n) for n in range(HOUR)])
    assert (HOUR * FRAME_MS, []) == (told, gaps)
    assert told - expected < LARGEST_SURPLUS_MS


@pytest.mark.parametrize("duration_ms", [20, 20.0625, 62.5])
def test_told_gaps_are_whole_milliseconds_but_their_rounding_does_not_add_up(duration_ms: float) -> None:
    told, expected, gaps = place([(n * (duration_ms + 15.4), n) for n in range(20_000)], duration_ms)
    assert gaps
    assert abs(told - expected) <= FRAME_MS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0, 0.01])
def test_jitter_in_the_timestamps_keeps_the_length_within_a_frame(share: float, seed: int) -> None:
    random = Random(seed)
    told, expected, gaps = place([(100 + n * FRAME_MS + random.uniform(-8, 8), n) for n in kept(random, share)])
    assert abs(told - expected) <= FRAME_MS
    if not share:
        assert sum(gaps) <= FRAME_MS


def test_a_burst_after_a_stall_with_true_timestamps_is_no_gap() -> None:
    # 2 s of frames are late together; their timestamps say when they were spoken, so nothing is missing.
    told, expected, gaps = place([(n * FRAME_MS, n) for n in range(1000)])
    assert (expected, []) == (told, gaps)


def test_a_burst_stamped_by_arrival_is_kept_whole_and_later_gaps_are_set_off_against_it() -> None:
    stamped = [(n * FRAME_MS, n) for n in range(100)]
    stamped += [(100 * FRAME_MS + 2000, n) for n in range(100, 201)]
    stamped += [(n * FRAME_MS, n) for n in range(201, 1000)]
    told, expected, gaps = place(stamped)
    assert [2000] == gaps
    assert expected + 2000 == told


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_are_dropped(seed: int) -> None:
    random = Random(seed)
    chunks = [(n * FRAME_MS, n) for n in range(10_000) for _ in range(2 if random.random() < 0.05 else 1)]
    told, expected, gaps = place(chunks)  # type: ignore[arg-type]
    assert (expected, []) == (told, gaps)


def test_the_same_timestamp_with_other_audio_is_no_duplicate() -> None:
    timeline = Timeline()
    assert [0, 0, None] == [timeline.place(0, payload(n), 20) for n in (1, 2, 2)]


def test_a_clock_that_is_set_back_begins_anew() -> None:
    timeline = Timeline()
    assert 0 == timeline.place(1_000_000, b"a", 20)
    assert 0 == timeline.place(0, b"b", 20)
    assert 0 == timeline.place(20, b"c", 20)
    assert 60 == timeline.place(100, b"d", 20)


@pytest.mark.parametrize(("hole_ms", "lost"), [(0, 0), (15, 0), (16, 16), (20, 20), (3_600_000, 3_600_000)])
def test_a_hole_shorter_than_a_frame_is_rounding(hole_ms: int, lost: int) -> None:
    timeline = Timeline()
    timeline.place(0, b"a", 20)
    assert lost == timeline.place(20 + hole_ms, b"b", 20)
