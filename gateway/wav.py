"""WAV files in and out. Everything becomes mono 16-bit PCM; other files are turned away with the command that converts them."""

from __future__ import annotations

import struct
import wave
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from gateway.audio import g711
from gateway.errors import GatewayError
from gateway.media import Encoding, MediaFormat

_PCM, _FLOAT, _ALAW, _MULAW, _EXTENSIBLE = 1, 3, 6, 7, 0xFFFE


class WavError(GatewayError):
    """The file can't be read or written. `str(error)` says why and what to do, ready to print."""


class Wav(Struct, frozen=True):
    """Mono 16-bit little-endian samples and their rate in Hz (any rate)."""

    pcm: bytes
    sample_rate: int

    @property
    def media_format(self) -> MediaFormat:
        return MediaFormat(Encoding.PCM_S16LE, self.sample_rate)

    @property
    def duration_ms(self) -> float:
        return len(self.pcm) * 500 / self.sample_rate


def read(path: Path | str) -> Wav:
    """Reads linear PCM of 8, 16, 24 or 32 bits, 32-bit float, mu-law, A-law; any rate, any channels (averaged to one).

    Raises WavError, never anything else.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WavError(f"{path}: {error.strerror or error}") from error
    return parse(data, path)


def parse(data: bytes, path: Path | str) -> Wav:
    """The same of a file's content; `path` is what complaints call it. Raises WavError, never anything else."""
    if data[:4] not in (b"RIFF", b"RF64") or data[8:12] != b"WAVE":
        raise WavError(f"{path} is not a WAV file. {_convert(path)}")
    chunks = dict(_chunks(data))
    fmt, body = chunks.get(b"fmt ", b""), chunks.get(b"data")
    if len(fmt) < 16 or body is None:
        raise WavError(f"{path} is a WAV file without its {'data' if len(fmt) >= 16 else 'format'} part. {_convert(path)}")
    tag, channels, sample_rate, _, _, bits = struct.unpack_from("<HHIIHH", fmt)
    if tag == _EXTENSIBLE and len(fmt) >= 26:
        (tag,) = struct.unpack_from("<H", fmt, 24)  # the real tag opens the sub-format's GUID
    if not channels or not sample_rate:
        raise WavError(f"{path} says it has {channels} channels at {sample_rate} Hz. {_convert(path)}")
    samples = _samples(tag, bits, body)
    if samples is None:
        name = {_ALAW: "A-law", _MULAW: "mu-law", _PCM: "PCM", _FLOAT: "float"}.get(tag, f"format 0x{tag:04x}")
        raise WavError(f"{path} holds {bits}-bit {name}, which is not read here. {_convert(path)}")
    samples = samples[: len(samples) // channels * channels].reshape(-1, channels).mean(axis=1)
    return Wav(_pcm16(samples), sample_rate)


def write(path: Path | str, pcm: bytes, sample_rate: int) -> None:
    """Writes mono 16-bit little-endian samples. Raises WavError."""
    _write(Path(path), pcm[: len(pcm) // 2 * 2], sample_rate, 1)


def write_stereo(path: Path | str, left: bytes, right: bytes, sample_rate: int) -> None:
    """Writes two mono 16-bit recordings side by side; the shorter one ends in silence. Raises WavError."""
    frames = np.zeros((max(len(left), len(right)) // 2, 2), dtype="<i2")
    for channel, pcm in enumerate((left, right)):
        frames[: len(pcm) // 2, channel] = np.frombuffer(pcm, dtype="<i2", count=len(pcm) // 2)
    _write(Path(path), frames.tobytes(), sample_rate, 2)


def _write(path: Path, frames: bytes, sample_rate: int, channels: int) -> None:
    try:
        with path.open("wb") as file, wave.open(file, "wb") as out:
            out.setnchannels(channels)
            out.setsampwidth(2)
            out.setframerate(sample_rate)
            out.writeframes(frames)
    except OSError as error:
        raise WavError(f"{path}: {error.strerror or error}") from error


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The parts of a RIFF file. A size beyond the end, as a pipe leaves it, means "until the end"."""
    offset = 12
    while offset + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, offset)
        yield name, data[offset + 8 : offset + 8 + size]
        offset += 8 + size + size % 2


def _samples(tag: int, bits: int, body: bytes) -> NDArray[np.float64] | None:
    """Samples in the range of 16 bits; None for a format that is not read here."""
    body = body[: len(body) // max(1, bits // 8) * max(1, bits // 8)]
    match tag, bits:
        case 1, 8:
            return (np.frombuffer(body, np.uint8).astype(np.float64) - 128) * 256
        case 1, 16:
            return np.frombuffer(body, "<i2").astype(np.float64)
        case 1, 24:
            wide = np.zeros((len(body) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
            return wide.view("<i4").ravel() / 65536.0
        case 1, 32:
            return np.frombuffer(body, "<i4") / 65536.0
        case 3, 32:
            return np.nan_to_num(np.frombuffer(body, "<f4").astype(np.float64)) * 32768
        case 6, 8:
            return np.frombuffer(g711.alaw_to_pcm16(body), "<i2").astype(np.float64)
        case 7, 8:
            return np.frombuffer(g711.mulaw_to_pcm16(body), "<i2").astype(np.float64)
        case _:
            return None


def _pcm16(samples: NDArray[np.float64]) -> bytes:
    return np.clip(np.rint(samples), -32768, 32767).astype("<i2").tobytes()


def _convert(path: Path | str) -> str:
    path = Path(path) if isinstance(path, Path) else Path("in.wav")
    return f"Convert it first: sox {quote(str(path))} -c 1 -r 8000 -b 16 -e signed {quote(f'{path.stem}-8k.wav')}"
