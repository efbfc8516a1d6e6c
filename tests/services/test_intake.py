"""From the stream's events to what a service gets, in order: conversion, framing, holes."""

from __future__ import annotations

from gateway.events import Audio, Gap
from gateway.media import MULAW_8K, Track
from gateway.services.intake import Intake
from gateway.services.native import NativeCarrier
from gateway.services.ring import Frame, Hole


def test_silence_for_a_hole_never_displaces_speech_nor_outlasts_the_clock() -> None:
    protocol = NativeCarrier(
        session="s", provider="p", kind="k", role="speaker", track=Track.INBOUND, media_format=MULAW_8K, frame_ms=20
    )
    intake = Intake(MULAW_8K, MULAW_8K, frame_ms=20, capacity_ms=1000, track=Track.INBOUND, protocol=protocol)
    for _ in range(20):
        intake.take(Audio(b"\x55" * 160), 0.0)
    intake.take(Gap(3_600_000), 0.0)
    assert 1000 * 8 >= intake.ring.audio_bytes > 900 * 8
    spoken = 0
    while (entry := intake.ring.take(keep=False)) is not None:
        assert not isinstance(entry, Hole)
        spoken += isinstance(entry, Frame) and entry.payload == b"\x55" * 160
    assert 20 == spoken
    filled = 0
    for _ in range(50):  # a carrier whose clock runs wild
        intake.take(Gap(3_600_000), 0.0)
        while (entry := intake.ring.take(keep=False)) is not None:
            filled += len(entry.payload) // 8 if isinstance(entry, Frame) else 0
    assert filled <= 10_000
