"""G.711 against its standard: by the tables' digests everywhere, by `audioop` where the running Python still has it."""

from __future__ import annotations

import warnings
from hashlib import sha256
from typing import Any

import numpy as np
import pytest

from gateway.audio import g711

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        import audioop
    except ImportError:  # 3.13 and later
        audioop: Any = None  # type: ignore[no-redef]

needs_audioop = pytest.mark.skipif(audioop is None, reason="this Python has no audioop")

ALL_CODES = bytes(range(256))
ALL_SAMPLES = np.arange(65536).astype("<u2").tobytes()


@pytest.mark.parametrize(
    ("table", "digest"),
    [
        (g711.MULAW_DECODED, "3dab54339e520bb2c924826e3b72a917a2b612e9fd12fc867500f1d983a75827"),
        (g711.ALAW_DECODED, "e04788d110e58ff8c70c93b8480190d973e3b67876b6119abbaec766cc75c174"),
        (g711.MULAW_ENCODED, "617fa4850d68d3906597e949f7625fb2fc46db479e29707f33159b3d131721cb"),
        (g711.ALAW_ENCODED, "f77c76aa923ee25617453f87514828a12896227f82ff383bf3bb53d6ac7c2a0f"),
    ],
    ids=["mulaw-decoded", "alaw-decoded", "mulaw-encoded", "alaw-encoded"],
)
def test_tables_are_the_standards(table: np.ndarray[Any, Any], digest: str) -> None:
    """The digests were taken from `audioop`'s answers (Python 3.11) for all 256 codes and all 65,536 samples."""
    assert sha256(table.tobytes()).hexdigest() == digest


@needs_audioop
def test_decodes_every_code_as_audioop() -> None:
    assert g711.mulaw_to_pcm16(ALL_CODES) == audioop.ulaw2lin(ALL_CODES, 2)
    assert g711.alaw_to_pcm16(ALL_CODES) == audioop.alaw2lin(ALL_CODES, 2)


@needs_audioop
def test_encodes_every_sample_as_audioop() -> None:
    assert g711.pcm16_to_mulaw(ALL_SAMPLES) == audioop.lin2ulaw(ALL_SAMPLES, 2)
    assert g711.pcm16_to_alaw(ALL_SAMPLES) == audioop.lin2alaw(ALL_SAMPLES, 2)


def test_every_code_survives_a_round_trip() -> None:
    # mu-law has two zeros, and only one of them is written.
    assert g711.pcm16_to_mulaw(g711.mulaw_to_pcm16(ALL_CODES)) == ALL_CODES.replace(b"\x7f", b"\xff")
    assert g711.pcm16_to_alaw(g711.alaw_to_pcm16(ALL_CODES)) == ALL_CODES


def test_one_law_to_the_other_goes_by_way_of_samples() -> None:
    assert g711.mulaw_to_alaw(ALL_CODES) == g711.pcm16_to_alaw(g711.mulaw_to_pcm16(ALL_CODES))
    assert g711.alaw_to_mulaw(ALL_CODES) == g711.pcm16_to_mulaw(g711.alaw_to_pcm16(ALL_CODES))


@pytest.mark.parametrize("law", ["mulaw", "alaw"])
def test_halves_saturate_and_are_nearly_the_nearest_code(law: str) -> None:
    """No more than one sample further off than the nearest one; the level in between is nobody's."""
    of_halves, decoded = (getattr(g711, f"{law.upper()}_{what}") for what in ("OF_HALVES", "DECODED"))
    halves = np.arange(65536).astype(np.uint16).view(np.int16).astype(int)
    samples, levels = 2 * halves, decoded[of_halves].astype(int)
    loudest = decoded.max()
    assert {loudest} == set(levels[samples >= loudest])
    assert {-loudest} == set(levels[samples <= -loudest])
    nearest = np.abs(samples[:, None] - decoded.astype(int)[None, :]).min(1)
    quiet = np.abs(samples) < 100  # a segment's lowest decision level is the standard's, and not half-way
    assert np.abs(samples - levels)[quiet].max() <= nearest[quiet].max() + 1


def test_mulaw_of_halves_is_even_about_zero() -> None:
    levels = g711.MULAW_DECODED[g711.MULAW_OF_HALVES].astype(int)
    assert 0 == (levels[1:32768] + levels[:32768:-1]).any()
    assert 0x7F not in g711.MULAW_OF_HALVES


def test_silence() -> None:
    assert g711.pcm16_to_mulaw(b"\0\0") == b"\xff"
    assert g711.mulaw_to_pcm16(b"\xff") == b"\0\0"
    assert g711.pcm16_to_alaw(b"\0\0") == b"\xd5"


def test_arrays_and_bytes_agree() -> None:
    codes = np.frombuffer(ALL_CODES, np.uint8)
    assert g711.decode_mulaw(codes).tobytes() == g711.mulaw_to_pcm16(ALL_CODES)
    assert g711.decode_alaw(codes).tobytes() == g711.alaw_to_pcm16(ALL_CODES)
    assert g711.encode_mulaw(g711.decode_alaw(codes)).tobytes() == g711.alaw_to_mulaw(ALL_CODES)
    assert g711.encode_alaw(g711.decode_mulaw(codes)).tobytes() == g711.mulaw_to_alaw(ALL_CODES)


def test_nobody_can_spoil_the_tables() -> None:
    with pytest.raises(ValueError, match="read-only"):
        g711.MULAW_DECODED[0] = 0
