"""Our own service protocol: every event has its message, every message its command, and mistakes get a sentence."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.events import (
    Account,
    After,
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Fault,
    Flow,
    FlowState,
    Gap,
    GapReason,
    Language,
    Outcome,
    Party,
    Play,
    Say,
    Speech,
    Spoken,
    Start,
    Stop,
    StopReason,
    Transcript,
    Unknown,
)
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.services.native import Ack, Malformed, NativeCarrier, Ready, Resume, acknowledgement, numbered

FORMAT = MediaFormat(Encoding.PCM_S16LE, 16000)
START = {
    "type": "start", "session": "s", "provider": "p", "kind": "k", "stream_id": "MZ1", "call_id": "CA1", "account_id": "AC1",
    "caller": "+1", "called": "+2", "direction": "inbound", "role": "speaker", "track": "inbound",
    "media_format": {"encoding": "pcm_s16le", "sample_rate": 16000, "channels": 1}, "frame_ms": 20,
    "accepts": ["audio", "clear"], "parameters": {"a": "b"}, "resume": None,
}  # fmt: skip
ACCOUNT = {"received": 1, "forwarded": 2, "dropped": 3, "queued": 4, "played": 5, "cleared": 6, "lost": 7}

UP: list[tuple[Event, dict[str, Any] | None]] = [
    (Start("MZ1", "CA1", "AC1", "+1", "+2", "inbound", MULAW_8K, (Track.INBOUND,), ("audio", "clear"), {"a": "b"}), START),
    (Dtmf("5"), {"type": "dtmf", "digits": "5"}),
    (Checkpoint("a", Outcome.CLEARED, 40), {"type": "checkpoint", "name": "a", "outcome": "cleared", "played_ms": 40}),
    (Clear(1, 2), {"type": "clear", "played_ms": 1, "cleared_ms": 2}),
    (Transcript("hi", False, "en"), {"type": "transcript", "text": "hi", "final": False, "language": "en"}),
    (BargeIn("I was", 70), {"type": "barge_in", "heard": "I was", "after_ms": 70}),
    (Speech(Party.AGENT, True), {"type": "speech", "who": "agent", "active": True}),
    (Spoken("so"), {"type": "spoken", "text": "so"}),
    (Gap(60, Track.INBOUND, GapReason.CARRIER), {"type": "gap", "track": "inbound", "lost_ms": 60, "reason": "carrier"}),
    (Flow(FlowState.PAUSE, 9), {"type": "flow", "state": "pause", "buffered_ms": 9}),
    (Fault("c", "m", 7), {"type": "fault", "code": "c", "message": "m", "ref": 7}),
    (Stop(StopReason.DRAIN, account=Account(1, 2, 3, 4, 5, 6, 7)), {"type": "stop", "reason": "drain", "account": ACCOUNT}),
    (Unknown("x"), None),
]

DOWN: list[tuple[dict[str, Any], Command]] = [
    ({"type": "checkpoint", "name": "a"}, Checkpoint("a", ref="r")),
    ({"type": "clear"}, Clear(ref="r")),
    ({"type": "dtmf", "digits": "1#"}, Dtmf("1#", ref="r")),
    ({"type": "say", "text": "hi"}, Say("hi", ref="r")),
    (
        {"type": "say", "text": "hi", "final": False, "language": "de", "interruptible": True, "preemptible": False},
        Say("hi", False, "de", True, False, "r"),
    ),
    ({"type": "play", "source": "https://x/y.mp3", "loop": 2}, Play("https://x/y.mp3", 2, ref="r")),
    ({"type": "language", "speech": "de-DE"}, Language("de-DE", None, "r")),
    ({"type": "stop"}, Stop(ref="r")),
    ({"type": "stop", "after": "played", "handoff": "x"}, Stop(handoff="x", after=After.PLAYED, ref="r")),
]


def carrier() -> NativeCarrier:
    return NativeCarrier(
        session="s", provider="p", kind="k", role="speaker", track=Track.INBOUND, media_format=FORMAT, frame_ms=20
    )


@pytest.mark.parametrize(("event", "message"), UP, ids=lambda value: type(value).__name__)
def test_every_event_has_its_message(event: Event, message: dict[str, Any] | None) -> None:
    assert ([] if message is None else [message]) == [json.loads(frame) for frame in carrier().encode(event)]


def test_no_event_is_forgotten() -> None:
    assert {*get_args(Event)} - {Audio} == {type(event) for event, _ in UP}
    assert [b"\1\2"] == [*carrier().encode(Audio(b"\1\2"))]


@pytest.mark.parametrize(("message", "command"), DOWN)
def test_every_message_has_its_command(message: dict[str, Any], command: Command) -> None:
    assert [command] == [*carrier().decode(json.dumps(message | {"id": "r"}))]


def test_no_command_is_forgotten() -> None:
    assert {*get_args(Command)} - {Audio} == {type(command) for _, command in DOWN}
    assert [Audio(b"\1\2")] == [*carrier().decode(b"\1\2")]
    assert [] == [*carrier().decode(b"")]


@pytest.mark.parametrize(
    ("frame", "fragment", "ref"),
    [
        ("{", "", None),
        ("[]", "", None),
        ('{"type": "sing", "id": "a"}', "'sing'", "a"),
        ('{"type": "checkpoint", "id": 5}', "`name`", 5),
        ('{"type": "checkpoint", "name": 5, "id": "b"}', "`$.name`", "b"),
        ('{"type": "stop", "afer": "played", "id": "c"}', "`afer`", "c"),
        ('{"type": "stop", "after": "later"}', "'later'", None),
        ('{"type": "ready", "next": 0}', "'ready'", None),
        ("[" * 5000, "", None),
        ('{"type": "say", "text": "\ud800"}', "", None),
    ],
)
def test_a_mistake_is_told_with_the_commands_id(frame: str, fragment: str, ref: str | int | None) -> None:
    with pytest.raises(Malformed) as caught:
        [*carrier().decode(frame)]
    assert "malformed_command" == caught.value.reason
    assert fragment in caught.value.detail
    assert ref == caught.value.ref


def test_framed_mode_adds_two_texts_a_resume_and_numbers() -> None:
    assert Ready(next=5, id="r") == carrier().read('{"type": "ready", "next": 5, "id": "r"}')
    assert Ready(next=None) == carrier().read('{"type": "ready", "next": null}')
    assert msgspec.UNSET is carrier().read('{"type": "ready"}').next  # type: ignore[union-attr]
    assert Ack(seq=7) == carrier().read('{"type": "ack", "seq": 7}')
    assert Clear() == carrier().read('{"type": "clear"}')
    for wrong in (
        '{"type": "ack"}',
        '{"type": "ack", "seq": -1}',
        '{"type": "ready", "next": -1}',
        '{"type": "ready", "next": "0"}',
    ):
        with pytest.raises(Malformed):
            carrier().read(wrong)
    start = UP[0][0]
    assert isinstance(start, Start)
    resume = Resume("s", 1, 2, 3, 4, ("a",))
    expected = {"session": "s", "oldest": 1, "next": 2, "next_out": 3, "queued_ms": 4, "checkpoints": ["a"]}
    assert START | {"resume": expected} == json.loads(carrier().start(start, resume))
    assert {"type": "ack", "seq": 9} == json.loads(acknowledgement(9))
    (text,) = carrier().encode(Dtmf("5"))
    assert {"type": "dtmf", "digits": "5", "n": 3} == json.loads(numbered(str(text), 3, False))
    assert {"type": "dtmf", "digits": "5", "n": 3, "replayed": True} == json.loads(numbered(str(text), 3, True))


@given(st.text() | st.recursive(st.none() | st.booleans() | st.text(max_size=5), st.lists).map(json.dumps))
def test_nothing_but_malformed_is_ever_raised(frame: str) -> None:
    with suppress(Malformed):
        [*carrier().decode(frame)]
