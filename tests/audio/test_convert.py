"""Conversion of formats and re-framing, by what the bytes are."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audio import Converter, Reframer, convert_whole, g711
from gateway.audio.resample import FirResampler, resampler
from gateway.errors import ConfigError
from gateway.media import Encoding, MediaFormat

S16, F32, MULAW, ALAW = Encoding.PCM_S16LE, Encoding.PCM_F32LE, Encoding.MULAW, Encoding.ALAW
RATES = (8000, 16000, 24000, 48000, 22050)
FORMATS = [MediaFormat(encoding, rate) for encoding in Encoding for rate in RATES]
formats = st.sampled_from(FORMATS)


def sound(media_format: MediaFormat, samples: int, seed: int = 0, level: float = 0.5) -> bytes:
    """Noise in this format."""
    values = np.random.default_rng(seed).uniform(-level, level, samples)
    pcm16 = (values * 32767).astype(np.int16).tobytes()
    match media_format.encoding:
        case Encoding.MULAW:
            return g711.pcm16_to_mulaw(pcm16)
        case Encoding.ALAW:
            return g711.pcm16_to_alaw(pcm16)
        case Encoding.PCM_S16LE:
            return pcm16
        case Encoding.PCM_F32LE:
            return values.astype(np.float32).tobytes()


def fed(converter: Converter, payload: bytes, cuts: list[int]) -> bytes:
    pieces = [converter.convert(payload[a:b]) for a, b in pairwise([0, *sorted(cuts), len(payload)])]
    return b"".join([*pieces, converter.flush()])


def s16(payload: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.frombuffer(payload, np.int16).astype(np.int64)


@given(source=formats, target=formats, data=st.data())
def test_any_chunking_gives_the_same_bytes(source: MediaFormat, target: MediaFormat, data: st.DataObject) -> None:
    payload = sound(source, data.draw(st.integers(0, source.sample_rate // 10)))
    cuts = data.draw(st.lists(st.integers(0, len(payload)), max_size=10))  # in the middle of samples, too
    assert fed(Converter(source, target), payload, cuts) == fed(Converter(source, target), payload, [])


@given(source=formats, target=formats, split=st.integers(0, 4000), cut=st.booleans())
def test_flush_or_reset_then_continue_equals_a_fresh_converter(
    source: MediaFormat, target: MediaFormat, split: int, cut: bool
) -> None:
    used, fresh = Converter(source, target), Converter(source, target)
    used.convert(sound(source, 2000)[:split])  # leaves half a sample, sometimes
    if cut:
        used.reset()
    else:
        used.flush()
    payload = sound(source, 1000, seed=1)
    assert used.convert(payload) == fresh.convert(payload)
    assert used.flush() == fresh.flush()
    assert used.flush() == b""


@given(source=formats, target=formats, size=st.integers(0, 2000))
def test_float_and_integer_paths_agree_to_one_lsb(source: MediaFormat, target: MediaFormat, size: int) -> None:
    integers, floats = MediaFormat(S16, target.sample_rate), MediaFormat(F32, target.sample_rate)
    payload = sound(source, size)
    rounded = s16(fed(Converter(source, integers), payload, []))
    exact = np.frombuffer(fed(Converter(source, floats), payload, []), np.float32) * 32768.0
    assert len(exact) == len(rounded)
    assert np.abs(exact - rounded).max(initial=0) <= 0.5 + 1e-3


@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_16_bit_samples_and_their_floats_convert_alike(target: MediaFormat) -> None:
    pcm16 = sound(MediaFormat(S16, 16000), 3000)
    floats = (np.frombuffer(pcm16, np.int16) / np.float32(32768)).astype(np.float32).tobytes()
    by_integers = fed(Converter(MediaFormat(S16, 16000), target), pcm16, [])
    assert by_integers == fed(Converter(MediaFormat(F32, 16000), target), floats, [])


@pytest.mark.parametrize("media_format", FORMATS, ids=str)
def test_pass_through_hands_on_the_same_object(media_format: MediaFormat) -> None:
    converter = Converter(media_format, media_format)
    payload = sound(media_format, 160)
    assert converter.passthrough
    assert converter.convert(payload) is payload
    assert converter.flush() == b""


def test_pass_through_gives_whole_samples_only() -> None:
    converter = Converter(MediaFormat(S16, 8000), MediaFormat(S16, 8000))
    assert converter.convert(b"abc") == b"ab"
    assert converter.convert(b"d") == b"cd"
    assert converter.convert(b"e") == b""
    converter.reset()
    assert converter.convert(b"fg") == b"fg"


def test_odd_bytes_wait_for_the_rest_of_their_sample() -> None:
    for source, target in ((S16, MULAW), (F32, S16)):
        here = MediaFormat(source, 8000)
        payload = sound(here, 50)
        converter = Converter(here, MediaFormat(target, 8000))
        assert b"".join(converter.convert(bytes([byte])) for byte in payload) == convert_whole(
            payload, here, MediaFormat(target, 8000)
        )


def test_an_empty_chunk_gives_nothing() -> None:
    for source in FORMATS:
        for target in FORMATS:
            converter = Converter(source, target)
            assert converter.convert(b"") == b""
            assert converter.flush() == b""


def test_same_rate_is_exact_by_table() -> None:
    codes = bytes(range(256))
    every = np.arange(65536).astype("<u2").tobytes()
    table = {
        (MULAW, S16): (codes, g711.mulaw_to_pcm16(codes)),
        (ALAW, S16): (codes, g711.alaw_to_pcm16(codes)),
        (MULAW, ALAW): (codes, g711.mulaw_to_alaw(codes)),
        (ALAW, MULAW): (codes, g711.alaw_to_mulaw(codes)),
        (S16, MULAW): (every, g711.pcm16_to_mulaw(every)),
        (S16, ALAW): (every, g711.pcm16_to_alaw(every)),
    }
    for (source, target), (payload, expected) in table.items():
        assert Converter(MediaFormat(source, 8000), MediaFormat(target, 8000)).convert(payload) == expected


def test_every_16_bit_sample_survives_float() -> None:
    every = np.arange(65536).astype("<u2").tobytes()
    floats = Converter(MediaFormat(S16, 8000), MediaFormat(F32, 8000)).convert(every)
    assert Converter(MediaFormat(F32, 8000), MediaFormat(S16, 8000)).convert(floats) == every


def test_floats_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    values = np.array([0.4, 0.5, 0.6, 1.5, 2.5, -0.5, -1.5, 32766.4, 32767.6, -32768.6], np.float32) / np.float32(32768)
    converted = Converter(MediaFormat(F32, 8000), MediaFormat(S16, 8000)).convert(values.tobytes())
    assert s16(converted).tolist() == [0, 0, 1, 2, 2, 0, -2, 32766, 32767, -32768]


@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_silence_stays_silent(target: MediaFormat) -> None:
    for source in FORMATS:
        if ALAW in (source.encoding, target.encoding):
            continue  # A-law has no zero
        heard = fed(Converter(source, target), source.silence(100), [7, 100, 321])
        assert heard == target.silence(1000 * len(heard) / target.bytes_per_second)


@pytest.mark.parametrize("rate", RATES)
def test_silence_of_alaw_stays_silence(rate: int) -> None:
    source, target = MediaFormat(ALAW, 8000), MediaFormat(ALAW, rate)
    heard = Converter(source, target).convert(source.silence(100))
    settled = heard[target.bytes_for(50) :]
    assert settled == b"\xd5" * len(settled)


@pytest.mark.parametrize("source", FORMATS, ids=str)
def test_full_scale_square_waves_do_not_wrap(source: MediaFormat) -> None:
    """What overshoots stays at the edge: no sample has the wrong sign in the middle of a half-wave."""
    half = source.sample_rate // 100
    wave = np.tile(np.repeat([32767, -32768], half), 10).astype(np.int16)
    payload = Converter(MediaFormat(S16, source.sample_rate), source).convert(wave.tobytes())
    for rate in RATES:
        heard = s16(convert_whole(payload, source, MediaFormat(S16, rate)))
        streamed = s16(fed(Converter(source, MediaFormat(S16, rate)), payload, list(range(0, len(payload), 333))))
        for samples, delays in ((heard, [0.0]), (streamed, [0.0, 1 / 1200, 0.00125, 0.002])):
            signs = [
                np.sign(samples[round((n + 0.5) * 0.01 * rate + delay * rate)]) * (-1) ** n
                for n in range(1, 18)
                for delay in delays
            ]
            assert set(signs) == {1}
        if rate != source.sample_rate:
            assert streamed.max() >= 32000


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
@pytest.mark.parametrize("law", [MULAW, ALAW], ids=str)
@pytest.mark.parametrize("size", [None, 334], ids=["20 ms", "odd"])
def test_the_loudest_that_a_filter_can_be_driven_to_saturates(law: Encoding, rate: int, size: int | None) -> None:
    source, target, floats = MediaFormat(S16, rate), MediaFormat(law, 8000), MediaFormat(F32, 8000)
    fir = resampler(rate, 8000)
    assert isinstance(fir, FirResampler)
    signs = np.sign(
        np.concatenate([fir.workspace.taps[:, at] * sign for at in range(fir.workspace.taps.shape[1]) for sign in (1, -1)])
    )
    payload = np.where(signs > 0, 32767, -32768).astype(np.int16).tobytes()
    payload += bytes(-len(payload) % source.bytes_for(20))
    cuts = [*range(0, len(payload), size or source.bytes_for(20))]
    exact = np.frombuffer(fed(Converter(source, floats), payload, cuts), np.float32) * 32768
    assert np.abs(exact).max() > 45_000
    codes = np.frombuffer(fed(Converter(source, target), payload, cuts), np.uint8)
    heard = convert_whole(codes.tobytes(), target, floats)
    assert np.abs(np.frombuffer(heard, np.float32) * 32768 - np.clip(exact, -32124, 32124)).max() < 32768 / 2 / 16


def test_not_a_number_is_silence_and_infinity_is_loud() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, 0.5, -np.nan], np.float32)
    same_rate = Converter(MediaFormat(F32, 8000), MediaFormat(S16, 8000)).convert(values.tobytes())
    assert s16(same_rate).tolist() == [0, 32767, -32768, 32767, -32768, 16384, 0]
    for rate in RATES[1:]:
        converter = Converter(MediaFormat(F32, 8000), MediaFormat(F32, rate))
        heard = converter.convert(values.tobytes()) + converter.convert(bytes(4 * 1600))
        floats = np.frombuffer(heard, np.float32)
        assert np.isfinite(floats).all()
        assert not floats[-100:].any()


@given(payload=st.binary(max_size=400), rate=st.sampled_from(RATES))
def test_any_bytes_as_floats_stay_in_range(payload: bytes, rate: int) -> None:
    floats = np.frombuffer(
        fed(Converter(MediaFormat(F32, 8000), MediaFormat(F32, rate)), payload + bytes(8000), [3, 200]), np.float32
    )
    if rate != 8000:  # at one rate bytes pass untouched
        assert np.isfinite(floats).all()
        assert np.abs(floats).max() < 3


def test_what_cannot_be_converted_is_a_config_error() -> None:
    good = MediaFormat(MULAW, 8000)
    opus = MediaFormat(cast("Encoding", "opus"), 8000)
    for bad, word in (
        (opus, "opus"),
        (MediaFormat(S16, 7999), "7999"),
        (MediaFormat(S16, 96000), "96000"),
        (MediaFormat(S16, 8000, 2), "2"),
    ):
        for arguments in ((bad, good), (good, bad), (bad, bad)):
            with pytest.raises(ConfigError, match=word):
                Converter(*arguments)
            with pytest.raises(ConfigError, match=word):
                convert_whole(b"", *arguments)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (MediaFormat(MULAW, 8000), MediaFormat(S16, 16000)),
        (MediaFormat(S16, 16000), MediaFormat(MULAW, 8000)),
        (MediaFormat(S16, 24000), MediaFormat(S16, 16000)),
        (MediaFormat(MULAW, 8000), MediaFormat(S16, 44100)),
    ],
    ids=str,
)
def test_nothing_grows_with_the_call(source: MediaFormat, target: MediaFormat) -> None:
    """Ten thousand chunks (200 s) hold no more memory than the first ones did."""
    converter = Converter(source, target)
    payload = sound(source, source.sample_rate // 50)
    odd = payload + payload[:-2]
    tracemalloc.start()
    try:
        for _ in range(50):
            converter.convert(payload)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(2000):
            converter.convert(payload)
        for _ in range(1000):
            converter.convert(odd)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 4096


def test_whole_recordings() -> None:
    source, target = MediaFormat(S16, 44100), MediaFormat(MULAW, 8000)
    assert len(convert_whole(sound(source, 44100), source, target)) == 8000
    assert len(convert_whole(sound(source, 44100) + b"x", source, target)) == 8000
    assert convert_whole(b"", source, target) == b""
    assert convert_whole(b"\xff\x80", target, MediaFormat(S16, 8000)) == g711.mulaw_to_pcm16(b"\xff\x80")


@given(payload=st.binary(max_size=500), size=st.integers(1, 60), data=st.data())
def test_reframing_is_exact(payload: bytes, size: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(payload)), max_size=10))
    reframer = Reframer(size)
    frames = [frame for a, b in pairwise([0, *sorted(cuts), len(payload)]) for frame in reframer.push(payload[a:b])]
    assert {len(frame) for frame in frames} <= {size}
    rest = reframer.flush()
    assert len(rest) < size
    assert b"".join([*frames, rest]) == payload
    assert reframer.flush() == b""


@pytest.mark.parametrize("frame_ms", [10, 20, 40, 60, 100])
def test_frames_of_every_length_a_service_may_ask_for(frame_ms: int) -> None:
    media_format = MediaFormat(S16, 16000)
    reframer = Reframer(media_format.bytes_for(frame_ms))
    frames = [frame for _ in range(30) for frame in reframer.push(sound(media_format, 320))]
    assert [len(frame) for frame in frames] == [frame_ms * 32] * (600 // frame_ms)
    assert reframer.flush() == b""


def test_a_payload_of_one_frame_is_not_copied() -> None:
    reframer = Reframer(160)
    payload = bytes(160)
    assert reframer.push(payload)[0] is payload
    assert reframer.push(b"") == []
    reframer.push(b"x")
    assert reframer.push(payload) == [b"x" + payload[1:]]


def test_a_frame_has_at_least_a_byte() -> None:
    with pytest.raises(ConfigError, match="0 bytes"):
        Reframer(0)
