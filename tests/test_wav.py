"""WAV files: what is read, what is turned away with a helpful sentence, and the clip that ships with the package."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from gateway import speech, wav
from gateway.errors import GatewayError
from gateway.media import Encoding

RAMP = np.array([0, 1000, -1000, 32767, -32768], dtype="<i2")


def riff(fmt: bytes, data: bytes, *, size: int | None = None, between: bytes = b"") -> bytes:
    body = (
        b"WAVEfmt "
        + struct.pack("<I", len(fmt))
        + fmt
        + between
        + b"data"
        + struct.pack("<I", len(data) if size is None else size)
    )
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


def fmt(tag: int, bits: int, *, channels: int = 1, rate: int = 8000) -> bytes:
    return struct.pack("<HHIIHH", tag, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)


def read(path: Path, content: bytes) -> wav.Wav:
    path.write_bytes(content)
    return wav.read(path)


@pytest.mark.parametrize("rate", [8000, 11025, 44100])
def test_what_was_written_is_read(tmp_path: Path, rate: int) -> None:
    wav.write(tmp_path / "a.wav", RAMP.tobytes(), rate)
    assert wav.Wav(RAMP.tobytes(), rate) == wav.read(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("tag", "bits", "data"),
    [
        (1, 16, RAMP.tobytes()),
        (1, 24, b"".join(struct.pack("<i", int(x) << 8)[:3] for x in RAMP)),
        (1, 32, (RAMP.astype("<i4") << 16).tobytes()),
        (3, 32, (RAMP / 32768).astype("<f4").tobytes()),
    ],
)
def test_sample_widths(tmp_path: Path, tag: int, bits: int, data: bytes) -> None:
    assert RAMP.tobytes() == read(tmp_path / "a.wav", riff(fmt(tag, bits), data)).pcm


def test_eight_bits_are_unsigned(tmp_path: Path) -> None:
    got = np.frombuffer(read(tmp_path / "a.wav", riff(fmt(1, 8), bytes([0, 128, 255]))).pcm, "<i2")
    assert got.tolist() == [-32768, 0, 32512]


def test_channels_are_averaged(tmp_path: Path) -> None:
    data = struct.pack("<4h", 100, 300, -32768, -32768)
    got = np.frombuffer(read(tmp_path / "a.wav", riff(fmt(1, 16, channels=2), data)).pcm, "<i2")
    assert got.tolist() == [200, -32768]


def test_extensible_format_and_foreign_chunks_and_an_odd_one(tmp_path: Path) -> None:
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    extensible = fmt(0xFFFE, 16) + struct.pack("<HHI", 22, 16, 4) + guid
    content = riff(extensible, RAMP.tobytes(), between=b"LIST" + struct.pack("<I", 3) + b"abc\0")
    assert RAMP.tobytes() == read(tmp_path / "a.wav", content).pcm


def test_size_left_open_by_a_pipe_and_a_cut_last_frame(tmp_path: Path) -> None:
    assert RAMP.tobytes() == read(tmp_path / "a.wav", riff(fmt(1, 16), RAMP.tobytes() + b"x", size=0xFFFFFFFF)).pcm


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"ID3 this is an mp3", "is not a WAV file"),
        (b"", "is not a WAV file"),
        (riff(fmt(7, 16), b"\xff\xff"), "16-bit mu-law"),
        (riff(fmt(2, 4), b"\xd5\xd5"), "format 0x0002"),
        (riff(fmt(1, 12), b"\xd5\xd5"), "12-bit PCM"),
        (riff(fmt(1, 16, channels=0), b""), "0 channels"),
        (riff(b"", b""), "without its format part"),
        (riff(fmt(1, 16), b"")[:36], "without its data part"),
    ],
)
def test_other_files_are_turned_away_with_the_command_that_converts(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(wav.WavError) as caught:
        read(tmp_path / "song.mp3", content)
    assert says in str(caught.value)
    assert f"sox {tmp_path}/song.mp3 -c 1 -r 8000 -b 16 -e signed song-8k.wav" in str(caught.value)


def test_missing_files_and_folders_are_errors_of_ours(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="No such file"):
        wav.read(tmp_path / "none.wav")
    with pytest.raises(GatewayError, match="No such file"):
        wav.write(tmp_path / "none" / "a.wav", b"", 8000)


def test_stereo_puts_two_recordings_side_by_side(tmp_path: Path) -> None:
    wav.write_stereo(tmp_path / "a.wav", struct.pack("<3h", 1, 2, 3), struct.pack("<1h", 9), 16000)
    with wave.open(str(tmp_path / "a.wav"), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 16000)
        assert struct.pack("<6h", 1, 9, 2, 0, 3, 0) == file.readframes(9)


def test_the_bundled_clip_is_a_few_seconds_of_loud_enough_speech() -> None:
    clip = speech.hello()
    assert (clip.media_format.encoding, clip.media_format.sample_rate) == (Encoding.PCM_S16LE, 8000)
    assert 4000 <= clip.duration_ms <= 5000
    samples = np.frombuffer(clip.pcm, "<i2")
    assert 12000 < np.abs(samples).max() < 20000
    assert len(clip.pcm) < 90_000


@pytest.mark.parametrize(("tag", "code", "loudest"), [(7, 0x80, 32124), (6, 0xAA, 32256)])
def test_telephones_own_encodings_are_read(tmp_path: Path, tag: int, code: int, loudest: int) -> None:
    silence = {7: 0xFF, 6: 0xD5}[tag]
    pcm = np.frombuffer(read(tmp_path / "a.wav", riff(fmt(tag, 8, rate=8000), bytes([silence, code]))).pcm, "<i2")
    assert abs(pcm[0]) <= 8
    assert loudest == pcm[1]
