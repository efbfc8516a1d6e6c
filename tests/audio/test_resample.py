"""Sample rates: what the filters do to sound, by figures, and that it never depends on how the sound was cut."""

from __future__ import annotations

from itertools import pairwise, permutations, product

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st

from gateway.audio.resample import FIR_RATES, FirResampler, FloatArray, Resampler, SoxrResampler, resample_whole, resampler
from tests.benchmarks.audio import gateway, measure

FIR_PAIRS = list(permutations(FIR_RATES, 2))
OTHER_RATES = (11025, 12000, 22050, 32000, 44100)
OTHER_PAIRS = [*product((8000, 16000), OTHER_RATES), *product(OTHER_RATES, (8000, 16000))]
SOXR_DELAYS_MS = {  # soxr 1.1 (libsoxr 0.1.3), rounded
    (8000, 11025): 30.0,
    (8000, 12000): 30.0,
    (8000, 22050): 30.0,
    (8000, 32000): 30.0,
    (8000, 44100): 30.0,
    (16000, 44100): 15.0,
    (11025, 8000): 21.8,
    (12000, 8000): 20.0,
    (22050, 8000): 27.3,
    (32000, 8000): 18.8,
    (44100, 8000): 30.0,
    (44100, 16000): 13.6,
}


def noise(size: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).uniform(-30000, 30000, size).astype(np.float32)


def fed(stream: Resampler, samples: FloatArray, cuts: list[int]) -> FloatArray:
    """All that comes out for `samples` cut at `cuts`, with the flush."""
    edges = [0, *sorted(cuts), len(samples)]
    pieces = [stream.process(samples[a:b]).copy() for a, b in pairwise(edges) if b > a]
    return np.concatenate([*pieces, stream.flush()])


@pytest.mark.parametrize(("source", "target"), FIR_PAIRS)
def test_fir_meets_the_bars(source: int, target: int) -> None:
    figures = measure(gateway, source, target)
    assert figures.delay_max_ms <= 2.5
    assert figures.delay_max_ms - figures.delay_min_ms < 0.001
    assert figures.ripple_db <= 0.1
    assert figures.rejection_db >= 70
    assert figures.snr_db >= 75
    assert figures.empty_share == 0


@pytest.mark.parametrize(("source", "target"), FIR_PAIRS)
def test_fir_gives_20_ms_for_20_ms_from_the_first_chunk_on(source: int, target: int) -> None:
    stream = FirResampler(source, target)
    assert [len(stream.process(noise(source // 50))) for _ in range(5)] == [target // 50] * 5


@pytest.mark.parametrize(("source", "target"), FIR_PAIRS)
def test_fir_states_its_delay(source: int, target: int) -> None:
    stream = FirResampler(source, target)
    pulse = np.exp(-0.5 * ((np.arange(source // 10) / source - 0.05) / 0.00025) ** 2).astype(np.float32)
    energy = stream.process(pulse).astype(np.float64) ** 2
    centre = (energy * np.arange(len(energy))).sum() / energy.sum() / target
    assert stream.delay_ms == pytest.approx((centre - 0.05) * 1000, abs=0.001)
    assert stream.delay_ms == (2.0 if min(source, target) == 8000 else 20000 / min(source, target))


@pytest.mark.parametrize(("source", "target"), FIR_PAIRS)
def test_fir_agrees_with_soxr(source: int, target: int) -> None:
    """On what both let through: speech-shaped noise within the pass-band, delay taken off."""
    spectrum = np.fft.rfft(noise(source))
    spectrum[np.fft.rfftfreq(source, 1 / source) > min(source, target) * 0.4] = 0
    samples = np.fft.irfft(spectrum, source).astype(np.float32)
    stream = FirResampler(source, target)
    delay = round(stream.delay_ms * target / 1000)
    ours = stream.process(samples)[delay:]
    oracle = resample_whole(samples, source, target)[: len(ours)]
    middle = slice(target // 10, -target // 10)
    assert np.abs(delay - stream.delay_ms * target / 1000) < 1e-9
    assert np.abs(ours - oracle)[middle].max() < 2e-3 * np.abs(oracle).max()


@pytest.mark.parametrize(("source", "target"), FIR_PAIRS)
@given(data=st.data())
def test_fir_gives_the_same_bits_for_any_chunking(source: int, target: int, data: st.DataObject) -> None:
    samples = noise(data.draw(st.integers(1, source // 8)), seed=1)
    cuts = data.draw(st.lists(st.integers(0, len(samples)), max_size=12))
    whole = fed(FirResampler(source, target), samples, [])
    assert fed(FirResampler(source, target), samples, cuts).tobytes() == whole.tobytes()


@pytest.mark.parametrize(("source", "target"), [*FIR_PAIRS, (8000, 44100), (44100, 8000), (16000, 22050), (48000, 44100)])
def test_ten_seconds_at_once_equal_chunks_and_single_samples(source: int, target: int) -> None:
    samples = noise(source * 10, seed=2)
    single = list(range(2000, 2500))
    whole = fed(resampler(source, target), samples, [])
    assert fed(resampler(source, target), samples, list(range(0, len(samples), source // 50))).tobytes() == whole.tobytes()
    assert fed(resampler(source, target), samples, [*single, 100_000 % len(samples)]).tobytes() == whole.tobytes()


@given(data=st.data())
def test_soxr_gives_the_same_bits_for_any_chunking(data: st.DataObject) -> None:
    source, target = data.draw(st.sampled_from(OTHER_PAIRS))
    samples = noise(data.draw(st.integers(1, source // 4)), seed=3)
    cuts = data.draw(st.lists(st.integers(0, len(samples)), max_size=12))
    whole = fed(SoxrResampler(source, target), samples, [])
    assert fed(SoxrResampler(source, target), samples, cuts).tobytes() == whole.tobytes()


@pytest.mark.parametrize(("source", "target"), SOXR_DELAYS_MS)
def test_soxr_delay_is_constant(source: int, target: int) -> None:
    stream = SoxrResampler(source, target)
    chunk = noise(source // 50)
    given_out, lags = 0, []
    for call in range(1, 501):
        given_out += len(stream.process(chunk))
        lags.append((call * len(chunk) / source - given_out / target) * 1000)
    assert max(lags[5:]) - min(lags[5:]) < 0.13  # one sample of 8 kHz
    assert SOXR_DELAYS_MS[source, target] == pytest.approx(lags[-1], abs=0.2)


@pytest.mark.parametrize(("source", "target"), OTHER_PAIRS)
def test_soxr_loses_nothing(source: int, target: int) -> None:
    """A flush brings every sample: as many as the rates say, and the whole of a word in the last 30 ms."""
    moments = np.arange(source) / source
    word = np.where((moments > 0.97) & (moments < 0.995), np.sin(np.pi * (moments - 0.97) / 0.025) ** 2, 0)
    samples = (20000 * word * np.sin(2 * np.pi * 1000 * moments)).astype(np.float32)
    ours = fed(SoxrResampler(source, target), samples, list(range(0, source, source // 50)))
    oracle = resample_whole(samples, source, target)
    assert abs(len(ours) - len(oracle)) <= 1
    correlation = np.correlate(ours[: len(oracle)][-target // 20 :], oracle[: len(ours)][-target // 20 :], "same")
    assert abs(int(correlation.argmax()) - len(correlation) // 2) <= 2  # samples of shift
    assert np.square(ours).sum() == pytest.approx(np.square(oracle).sum(), rel=0.001)


@pytest.mark.parametrize(("source", "target"), [(8000, 16000), (16000, 8000), (16000, 24000), (24000, 16000), (8000, 44100)])
def test_flush_then_continue_equals_a_fresh_one(source: int, target: int) -> None:
    used, fresh, samples = resampler(source, target), resampler(source, target), noise(source // 7)
    used.process(noise(1234, seed=5))
    assert len(used.flush()) > 0
    assert used.process(samples).tobytes() == fresh.process(samples).tobytes()
    used.reset()
    fresh = resampler(source, target)
    assert used.process(samples).tobytes() == fresh.process(samples).tobytes()


@pytest.mark.parametrize(("source", "target"), FIR_PAIRS)
def test_fir_flush_is_the_rest_of_the_convolution(source: int, target: int) -> None:
    """All energy comes out: twice the delay, and it ends where the filter does."""
    stream = FirResampler(source, target)
    samples = noise(source // 50)
    before = len(stream.process(samples))
    rest = stream.flush()
    assert len(rest) == pytest.approx(2 * stream.delay_ms * target / 1000, abs=1)
    padded = FirResampler(source, target).process(np.concatenate([samples, np.zeros(source // 10, np.float32)]))
    assert rest.tobytes() == padded[before : before + len(rest)].tobytes()
    assert not padded[before + len(rest) :].any()
    assert not len(stream.flush())


@pytest.mark.parametrize(("source", "target"), [*FIR_PAIRS, (8000, 44100), (44100, 8000)])
def test_silence_stays_silent_and_a_constant_constant(source: int, target: int) -> None:
    assert not fed(resampler(source, target), np.zeros(source, np.float32), [17, 400]).any()
    level = resampler(source, target).process(np.full(source, 1000, np.float32))[target // 10 : -target // 10]
    assert np.abs(level - 1000).max() < 0.1


def test_a_telephone_line_gets_the_filter_and_odd_rates_get_soxr() -> None:
    assert isinstance(resampler(8000, 16000), FirResampler)
    assert isinstance(resampler(8000, 44100), SoxrResampler)


def test_whole_files() -> None:
    samples = noise(44100)
    assert len(resample_whole(samples, 44100, 8000)) == 8000
    assert resample_whole(samples, 44100, 8000).tobytes() == soxr.resample(samples, 44100, 8000, quality="VHQ").tobytes()
    assert resample_whole(samples, 8000, 8000) is samples
    assert not len(resample_whole(samples[:0], 8000, 16000))
