"""Speech that ships with the package, for simulated callers. How it was made: README.md beside this file."""

from __future__ import annotations

from pathlib import Path

from gateway import wav

HELLO_TEXT = "Hello, this is a test call. One, two, three, four, five."
"""The words of `hello`, for callers that type instead of talk."""


def hello() -> wav.Wav:
    """The bundled clip: a few seconds of speech at 8 kHz."""
    return wav.read(Path(__file__).with_name("hello.wav"))
