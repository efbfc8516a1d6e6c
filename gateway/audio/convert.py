"""From one media format to another: encodings, rates, frame sizes. All state of a direction of a link's audio is in here.

Inside, a sample is a float32 on the scale of 16 bits (full scale is 32768), so 16-bit samples are exact and rounding
happens once, at the end. Hosts are little-endian, as the wires are.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np

from gateway.audio import g711
from gateway.audio.resample import FirResampler, FloatArray, Resampler, Workspace, resample_whole, resampler
from gateway.errors import ConfigError
from gateway.media import Encoding, MediaFormat

_FULL_SCALE = 32768.0
_UINT8, _INT16, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.float32)


class Converter:
    """One direction of one link. Feed it with `convert`; `flush` where the speaker ends, `reset` where he is cut off.

    Whole samples come out: bytes of a sample that is not complete wait for the next payload. Out of range is saturated,
    never wrapped; NaN counts as silence.
    """

    __slots__ = (
        "_block_bytes", "_encode_outlet", "_fir", "_gain", "_load_inlet", "_partial", "_passthrough", "_resampler",
        "_sample_bytes", "_source", "_target", "_transcode",
    )  # fmt: skip

    def __init__(self, source: MediaFormat, target: MediaFormat) -> None:
        """Raises ConfigError for a format that can't be converted."""
        _check(source)
        _check(target)
        self._passthrough = source == target
        self._sample_bytes = source.sample_bytes
        self._partial = b""  # the first bytes of a sample whose last are still to come
        self._source, self._target = source.encoding, target.encoding
        self._transcode: Callable[[bytes], bytes] | None = None
        self._resampler: Resampler | None = None
        self._fir: FirResampler | None = None
        self._gain: float | None = None
        if source.sample_rate == target.sample_rate:
            self._transcode = _TRANSCODERS.get((source.encoding, target.encoding))
        else:
            self._resampler = resampler(source.sample_rate, target.sample_rate)
            self._gain = inf
        if isinstance(self._resampler, FirResampler):
            self._fir, work = self._resampler, self._resampler.workspace
            self._gain = work.gain
            self._block_bytes = len(work.inlet) * self._sample_bytes
            self._load_inlet, self._encode_outlet = _ends(work, self._source, self._target)

    @property
    def passthrough(self) -> bool:
        """Both formats are the same: payloads of whole samples are handed on as they are, the same object."""
        return self._passthrough

    def convert(self, payload: bytes) -> bytes:
        """All that can be given out now; maybe nothing."""
        fir = self._fir
        if fir is not None and len(payload) == self._block_bytes and not fir.filled and not self._partial:
            self._load_inlet(payload)  # 20 ms: straight through the filter's workspace
            fir.run()
            return self._encode_outlet()
        if self._partial or len(payload) % self._sample_bytes:
            payload = self._whole_samples(payload)
        if self._passthrough or not payload:
            return payload
        if self._transcode is not None:
            return self._transcode(payload)
        samples = np.empty(len(payload) // self._sample_bytes, np.float32)
        _loader(self._source, samples)(payload)
        if self._resampler is not None:
            samples = self._resampler.process(samples)
        return _encoder(self._target, samples, self._gain)()

    def flush(self) -> bytes:
        """The end of the last word, which was still in the filter. Afterwards equal to a fresh converter."""
        self._partial = b""
        if self._resampler is None:
            return b""
        return _encoder(self._target, self._resampler.flush(), self._gain)()

    def reset(self) -> None:
        """Forget everything. Afterwards equal to a fresh converter."""
        self._partial = b""
        if self._resampler is not None:
            self._resampler.reset()

    def _whole_samples(self, payload: bytes) -> bytes:
        payload = self._partial + payload
        end = len(payload) - len(payload) % self._sample_bytes
        self._partial = payload[end:]
        return payload[:end]


class Reframer:
    """Cuts a stream of bytes into frames of one size. `push` gives whole frames only; `flush` gives the rest."""

    __slots__ = ("_size", "rest")

    def __init__(self, frame_bytes: int) -> None:
        """Raises ConfigError unless `frame_bytes` (`MediaFormat.bytes_for(frame_ms)`) is at least 1."""
        if frame_bytes < 1:
            raise ConfigError(f"a frame of {frame_bytes} bytes: write at least one sample")
        self._size = frame_bytes
        self.rest = b""
        """What waits for more; always shorter than a frame."""

    def push(self, payload: bytes) -> list[bytes]:
        """The frames that are now complete. A payload of just one frame passes as the same object, if nothing waits."""
        size = self._size
        if not self.rest and len(payload) == size:
            return [payload]
        data = self.rest + payload
        end = len(data) - len(data) % size
        self.rest = data[end:]
        return [data[start : start + size] for start in range(0, end, size)]

    def flush(self) -> bytes:
        """The rest, shorter than a frame and maybe empty. Afterwards equal to a fresh reframer."""
        rest, self.rest = self.rest, b""
        return rest


def convert_whole(payload: bytes, source: MediaFormat, target: MediaFormat) -> bytes:
    """A whole recording at once, without delay. An incomplete last sample is dropped. Raises ConfigError as `Converter`."""
    _check(source)
    _check(target)
    if source.sample_rate == target.sample_rate:
        return Converter(source, target).convert(payload)
    samples = np.empty(len(payload) // source.sample_bytes, np.float32)
    _loader(source.encoding, samples)(payload[: len(samples) * source.sample_bytes])
    return _encoder(target.encoding, resample_whole(samples, source.sample_rate, target.sample_rate), inf)()


def _check(media_format: MediaFormat) -> None:
    if media_format.encoding not in [*Encoding]:
        raise ConfigError(f"encoding {media_format.encoding!r}: write one of {', '.join(Encoding)}")
    if not 8000 <= media_format.sample_rate <= 48000:
        raise ConfigError(f"sample_rate {media_format.sample_rate!r}: write a rate from 8000 to 48000 Hz")
    if media_format.channels != 1:
        raise ConfigError(f"channels {media_format.channels!r}: write 1, a track is mono")


def _ends(work: Workspace, source: Encoding, target: Encoding) -> tuple[Callable[[bytes], None], Callable[[], bytes]]:
    """What fills a workspace's inlet, and what reads its outlet: made once, as they have buffers too."""
    if (ends := work.ends.get((source, target))) is None:
        ends = work.ends[source, target] = _loader(source, work.inlet), _encoder(target, work.outlet, work.gain)
    return ends


def _loader(encoding: Encoding, into: FloatArray) -> Callable[[bytes], None]:
    """A function that decodes a payload of as many samples as `into` has into it."""
    if encoding is Encoding.PCM_S16LE:

        def load_s16(payload: bytes) -> None:
            into[...] = np.frombuffer(payload, _INT16)

        return load_s16
    if encoding is Encoding.PCM_F32LE:

        def load_float(payload: bytes) -> None:
            into[...] = np.frombuffer(payload, _FLOAT32)
            into[np.isnan(into)] = 0
            np.clip(into, -1, 1, out=into)  # first, so that nothing overflows; an infinity would never leave a filter's history
            np.multiply(into, _FULL_SCALE, out=into)

        return load_float

    take, index = _LEVELS[encoding].take, np.empty(len(into), np.intp)  # codes as numpy wants them: it is slower at that itself

    def load(payload: bytes) -> None:
        index[...] = np.frombuffer(payload, _UINT8)
        take(index, None, into, "clip")

    return load


def _encoder(encoding: Encoding, samples: FloatArray, gain: float | None) -> Callable[[], bytes]:
    """A function that encodes what is in `samples` whenever it is called, and spoils them. `gain` is how far a filter may have
    taken them beyond full scale; None: there was no filter, and what was 16-bit samples is encoded as these are by the standard.

    Samples become integers like this: added to 1.5 * 2**23 a float32 has no bits left below 1, so the sum is rounded as
    IEEE 754 says (ties to even), and its low 16 bits are the integer in two's complement. That takes a fifth of `rint` and a
    cast. G.711 needs fewer bits: 1.5 * 2**24 leaves half of the integer, and so twice the range, in which a table saturates.
    The bounds are arrays, because numpy spends as long on making one number fit as on the samples of a chunk.
    """
    if encoding is Encoding.PCM_F32LE:

        def encode_float() -> bytes:
            np.divide(samples, _FULL_SCALE, out=samples)
            np.add(samples, 0.0, out=samples)  # minus zero becomes zero: its sign would tell how the stream was cut
            return samples.tobytes()

        return encode_float

    codes = (_CODES if gain is None else _CODES_OF_HALVES).get(encoding)
    rounding = 1.5 * 2**23 if codes is None or gain is None else 1.5 * 2**24
    highest, lowest, rounder = (np.full(len(samples), value, np.float32) for value in (32767, -32768, rounding))
    minimum, maximum, add = np.minimum, np.maximum, np.add
    words = samples.view(np.uint16)[::2]
    if codes is None:

        def encode_s16() -> bytes:
            minimum(samples, highest, out=samples)
            maximum(samples, lowest, out=samples)
            add(samples, rounder, out=samples)
            return words.tobytes()

        return encode_s16

    saturates, index = gain is not None and gain < 2, np.empty(len(samples), np.intp)

    def encode() -> bytes:
        if not saturates:
            minimum(samples, highest, out=samples)
            maximum(samples, lowest, out=samples)
        add(samples, rounder, out=samples)
        index[...] = words
        return codes[index].tobytes()

    return encode


_LEVELS = {
    Encoding.MULAW: g711.MULAW_DECODED.astype(np.float32),
    Encoding.ALAW: g711.ALAW_DECODED.astype(np.float32),
}
_CODES = {Encoding.MULAW: g711.MULAW_ENCODED, Encoding.ALAW: g711.ALAW_ENCODED}
_CODES_OF_HALVES = {Encoding.MULAW: g711.MULAW_OF_HALVES, Encoding.ALAW: g711.ALAW_OF_HALVES}
_TRANSCODERS: dict[tuple[Encoding, Encoding], Callable[[bytes], bytes]] = {  # one rate, exact by table
    (Encoding.MULAW, Encoding.PCM_S16LE): g711.mulaw_to_pcm16,
    (Encoding.MULAW, Encoding.ALAW): g711.mulaw_to_alaw,
    (Encoding.ALAW, Encoding.PCM_S16LE): g711.alaw_to_pcm16,
    (Encoding.ALAW, Encoding.MULAW): g711.alaw_to_mulaw,
    (Encoding.PCM_S16LE, Encoding.MULAW): g711.pcm16_to_mulaw,
    (Encoding.PCM_S16LE, Encoding.ALAW): g711.pcm16_to_alaw,
}
