"""What only Plivo has: extra_headers in every form, two number spellings, frames of bounded size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import MalformedFrame
from gateway.events import Audio, Start
from gateway.media import Encoding, MediaFormat
from gateway.provider import SignedRequest
from providers import _plivo
from providers.plivo_audio_streaming import Carrier, Provider, Settings

steady = settings(deadline=None)  # other tests run beside these: a slow moment is no failure
PAIRS = {"userId": "12345", "sessionId": "abc-xyz"}


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        ("userId=12345;sessionId=abc-xyz", PAIRS),
        ("userId=12345,sessionId=abc-xyz", PAIRS),
        (" userId = 12345 ; sessionId=abc-xyz ; ", PAIRS),
        ('{"userId":"12345","sessionId":"abc-xyz"}', PAIRS),
        ('{"userId":12345,"sessionId":"abc-xyz"}', PAIRS),
        ({"userId": "12345", "sessionId": "abc-xyz"}, PAIRS),
        ({"userId": 12345, "sessionId": "abc-xyz"}, PAIRS),
        ({"a": None, "b": True, "c": {"d": [1]}, "e": 1.5}, {"a": "", "b": "true", "c": '{"d":[1]}', "e": "1.5"}),
        ("", {}),
        (None, {}),
        ("{}", {}),
        ({}, {}),
        ("a=b=c", {"a": "b=c"}),
        ("a=%2B1%2C2%3B3%3D4+5", {"a": "+1,2;3=4+5"}),
        ("a=", {"a": ""}),
        ("nothing;=x;a=b", {"a": "b"}),
        ("{broken;a=b", {"a": "b"}),
        ("[1]", {}),
        (7, {}),
        ([1], {}),
    ],
)
def test_extra_headers_in_every_form(value: Any, headers: dict[str, str]) -> None:
    start = {"event": "start", "start": {"callId": "C1", "streamId": "S1"}, "extra_headers": value}
    [event] = Provider(Settings(auth="none")).codec().decode(json.dumps(start))
    assert isinstance(event, Start)
    assert event.parameters == headers


def test_extra_headers_may_be_missing() -> None:
    [event] = Provider(Settings(auth="none")).codec().decode('{"event":"start","start":{"callId":"C1","streamId":"S1"}}')
    assert isinstance(event, Start)
    assert event.parameters == {}


@steady
@given(st.dictionaries(st.text(), st.text(), max_size=5))
def test_headers_that_we_write_are_safe_and_short(pairs: dict[str, str]) -> None:
    """Only letters, digits, `_.-~%=` and commas, and never more than 512 bytes; what is written is read back."""
    written = _plivo.write_headers(pairs)
    assert len(written) <= 512
    assert written.isascii()
    assert not set(written) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~%=,")
    assert _plivo.read_headers(written).items() <= pairs.items()


def test_numbers_have_one_spelling() -> None:
    """Calls come without plus, probes with it."""
    for number in ("15550100001", "+15550100001"):
        form = {"CallUUID": "C1", "From": number, "To": "sip:bot@phone.example.com", "Direction": "inbound"}
        call = Provider(Settings(auth="none")).call(SignedRequest("POST", "https://h/p/answer", form=form))
        assert (call.caller, call.called) == ("15550100001", "sip:bot@phone.example.com")


@pytest.mark.parametrize(
    ("form", "ms"),
    [
        (MediaFormat(Encoding.MULAW, 8000), 1536),
        (MediaFormat(Encoding.PCM_S16LE, 8000), 768),
        (MediaFormat(Encoding.PCM_S16LE, 16000), 384),
    ],
)
def test_long_audio_is_cut_into_frames_of_16_kb_of_base64(form: MediaFormat, ms: int) -> None:
    codec, carrier = Provider(Settings(auth="none", media_format=form)).codec(), Carrier()
    for frame in carrier.encode(Start("S1", "C1", media_format=form)):
        list(codec.decode(frame))
    audio = bytes(index % 251 for index in range(form.bytes_for(5000)))
    frames = list(codec.encode(Audio(audio)))
    assert max(len(json.loads(frame)["media"]["payload"]) for frame in frames) == 16_384
    pieces = [command for frame in frames for command in carrier.decode(frame)]
    assert all(isinstance(piece, Audio) and form.duration_ms(len(piece.payload)) <= ms for piece in pieces)
    assert b"".join(piece.payload for piece in pieces if isinstance(piece, Audio)) == audio


def test_messages_above_64_kb_are_refused() -> None:
    carrier = Carrier()
    list(carrier.encode(Start("S1", "C1")))
    media = {"contentType": "audio/x-mulaw", "sampleRate": 8000, "payload": "////" * 16_400}
    with pytest.raises(MalformedFrame, match="64 KB"):
        carrier.decode(json.dumps({"event": "playAudio", "media": media}))


def test_chunks_are_counted_per_track_and_time_goes_on_by_itself() -> None:
    """Without timestamps the carrier half counts the audio it has told."""
    carrier = Carrier()
    list(carrier.encode(Start("S1", "C1", parameters={"a": "b"})))
    told = [json.loads(frame) for _ in range(3) for frame in carrier.encode(Audio(bytes(160)))]
    assert [frame["sequenceNumber"] for frame in told] == [2, 3, 4]
    assert [frame["media"]["chunk"] for frame in told] == [1, 2, 3]
    assert [frame["media"]["timestamp"] for frame in told] == ["0", "20", "40"]
    assert {frame["extra_headers"] for frame in told} == {"a=b"}
