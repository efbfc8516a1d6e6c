"""G.711 mu-law and A-law as lookup tables, made at import by the standard's formula. Nothing here keeps state.

Both laws are defined on 14-bit (mu-law) and 13-bit (A-law) samples; as everywhere in telephony, 16-bit samples stand for
them shifted left by 2 and 3 bits. Source: ITU-T G.711 (11/88), tables 1a to 2b; bit for bit what CPython's `audioop` gave.

mu-law writes silence as 0xFF. A-law has no zero: its silence 0xD5 decodes to +8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.int16]


def _decoded_mulaw() -> Samples:
    code = ~np.arange(256) & 0xFF  # the wire carries the complement
    segment, step = code >> 4 & 7, code & 15
    magnitude = (((step << 3) + 132) << segment) - 132  # 132 = 33 << 2: the bias that makes segments powers of two
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.int16)


def _decoded_alaw() -> Samples:
    code = np.arange(256) ^ 0x55  # even bits are inverted on the wire
    segment, step = code >> 4 & 7, code & 15
    magnitude = np.where(segment == 0, (step << 4) + 8, ((step << 4) + 264) << np.maximum(segment - 1, 0))
    return np.where(code & 0x80, magnitude, -magnitude).astype(np.int16)


def _encoded_mulaw() -> Codes:
    sample = _every_sample() // 4
    biased: npt.NDArray[np.int64] = np.minimum(np.abs(sample) + 33, 8191)
    segment: npt.NDArray[np.int64] = np.searchsorted([0x3F, 0x7F, 0xFF, 0x1FF, 0x3FF, 0x7FF, 0xFFF], biased)
    code = segment << 4 | biased >> (segment + 1) & 15
    return (code ^ np.where(sample < 0, 0x7F, 0xFF)).astype(np.uint8)


def _encoded_alaw() -> Codes:
    sample = _every_sample() // 8
    magnitude = np.where(sample < 0, ~sample, sample)
    segment: npt.NDArray[np.int64] = np.searchsorted([0x1F, 0x3F, 0x7F, 0xFF, 0x1FF, 0x3FF, 0x7FF], magnitude)
    code = segment << 4 | magnitude >> np.maximum(segment, 1) & 15
    return (code ^ np.where(sample < 0, 0x55, 0xD5)).astype(np.uint8)


def _every_sample() -> npt.NDArray[np.int64]:
    """All 16-bit samples in the order of their two's complement: 0 … 32767, -32768 … -1."""
    return np.arange(65536).astype(np.uint16).view(np.int16).astype(np.int64)


MULAW_DECODED = _decoded_mulaw()
"""256 samples, by code."""
ALAW_DECODED = _decoded_alaw()
"""256 samples, by code."""
MULAW_ENCODED = _encoded_mulaw()
"""65,536 codes, by the sample's two's complement (`sample & 0xFFFF`)."""
ALAW_ENCODED = _encoded_alaw()
"""65,536 codes, by the sample's two's complement (`sample & 0xFFFF`)."""

_halves = np.clip(_every_sample() * 2, -32768, 32767)
MULAW_OF_HALVES = MULAW_ENCODED[(_halves + 3 * (_halves < 0)) & 0xFFFF]
"""65,536 codes, by half of the sample in two's complement: saturated, and even about zero (`MULAW_ENCODED` rounds downwards)."""
ALAW_OF_HALVES = ALAW_ENCODED[_halves & 0xFFFF]
"""65,536 codes, by half of the sample in two's complement: saturated."""

_MULAW_TO_ALAW = ALAW_ENCODED[MULAW_DECODED.view(np.uint16)].tobytes()
_ALAW_TO_MULAW = MULAW_ENCODED[ALAW_DECODED.view(np.uint16)].tobytes()

for _table in (MULAW_DECODED, ALAW_DECODED, MULAW_ENCODED, ALAW_ENCODED, MULAW_OF_HALVES, ALAW_OF_HALVES):
    _table.flags.writeable = False


def decode_mulaw(codes: Codes) -> Samples:
    """16-bit samples of mu-law codes."""
    return MULAW_DECODED.take(codes)


def decode_alaw(codes: Codes) -> Samples:
    """16-bit samples of A-law codes."""
    return ALAW_DECODED.take(codes)


def encode_mulaw(samples: Samples) -> Codes:
    """Mu-law codes of 16-bit samples."""
    return MULAW_ENCODED.take(samples.view(np.uint16))


def encode_alaw(samples: Samples) -> Codes:
    """A-law codes of 16-bit samples."""
    return ALAW_ENCODED.take(samples.view(np.uint16))


def mulaw_to_pcm16(payload: bytes) -> bytes:
    """`pcm_s16le` of mu-law bytes: twice as many."""
    return decode_mulaw(np.frombuffer(payload, np.uint8)).tobytes()


def alaw_to_pcm16(payload: bytes) -> bytes:
    """`pcm_s16le` of A-law bytes: twice as many."""
    return decode_alaw(np.frombuffer(payload, np.uint8)).tobytes()


def pcm16_to_mulaw(payload: bytes) -> bytes:
    """Mu-law of `pcm_s16le` bytes. Raises ValueError for an odd number of them."""
    return encode_mulaw(np.frombuffer(payload, np.int16)).tobytes()


def pcm16_to_alaw(payload: bytes) -> bytes:
    """A-law of `pcm_s16le` bytes. Raises ValueError for an odd number of them."""
    return encode_alaw(np.frombuffer(payload, np.int16)).tobytes()


def mulaw_to_alaw(payload: bytes) -> bytes:
    """A-law of mu-law bytes, by way of 16-bit samples."""
    return payload.translate(_MULAW_TO_ALAW)


def alaw_to_mulaw(payload: bytes) -> bytes:
    """Mu-law of A-law bytes, by way of 16-bit samples."""
    return payload.translate(_ALAW_TO_MULAW)
