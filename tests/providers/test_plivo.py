"""What only Plivo has: extra_headers in every form, two number spellings, frames of bounded size."""

from __future__ import annotations

import hmac
import json
import re
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import MalformedFrame, SignatureMismatch, UnsupportedCommand
from gateway.events import Audio, Dtmf, Fault, Start, Stop
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.provider import Limits, SignedRequest
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


def test_a_call_sounds_200_ms_ahead_in_frames_of_20_to_60_ms() -> None:
    assert Provider(Settings(auth="none")).codec().limits == Limits(200, 40_000, 20, 60)
    assert Provider(Settings(auth="none", lead_ms=40_000)).codec().limits == Limits(40_000, 40_000, 20, 60)


LEVEL = "noise_cancellation_level: {} is out of range; it is 60 to 100 and needs `noise_cancellation: true`"


@pytest.mark.parametrize(
    ("right", "wrong", "why"),
    [
        (
            {"noise_cancellation": True, "noise_cancellation_level": 60},
            {"noise_cancellation_level": 60},
            LEVEL.format(60),
        ),
        (
            {"noise_cancellation": True, "noise_cancellation_level": 100},
            {"noise_cancellation": True, "noise_cancellation_level": 101},
            LEVEL.format(101),
        ),
        (
            {"noise_cancellation": True},
            {"noise_cancellation": True, "noise_cancellation_level": 59},
            LEVEL.format(59),
        ),
        (
            {"stream_timeout_secs": 1},
            {"stream_timeout_secs": 0},
            "stream_timeout_secs: 0 is out of range; Plivo wants a positive number of seconds",
        ),
        (
            {"media_format": MediaFormat(Encoding.PCM_S16LE, 16000)},
            {"media_format": MediaFormat(Encoding.MULAW, 16000)},
            "media_format: Plivo carries mulaw/8000, pcm_s16le/8000 and pcm_s16le/16000, not mulaw/16000",
        ),
    ],
)
def test_options_that_plivo_does_not_take_are_refused_with_the_reason(
    right: dict[str, Any], wrong: dict[str, Any], why: str
) -> None:
    Settings(auth="none", **right)
    with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
        Settings(auth="none", **wrong)


def test_plivos_older_signature_does_only_where_it_was_asked_for() -> None:
    url, token, nonce = "https://h/p/answer", "k" * 40, "12345678901234567890"
    signature = b64encode(hmac.digest(token.encode(), f"{url}{nonce}".encode(), "sha256")).decode()
    headers = {"X-Plivo-Signature-V2": signature, "X-Plivo-Signature-V2-Nonce": nonce}
    request = SignedRequest.read("POST", url, headers, b"CallUUID=C1")
    Provider(Settings(auth_token=token, accept_v2=True)).authenticate(request)
    with pytest.raises(SignatureMismatch):
        Provider(Settings(auth_token=token)).authenticate(request)


def opened(form: MediaFormat = MULAW_8K) -> Carrier:
    carrier = Carrier()
    list(carrier.encode(Start("S1", "C1", media_format=form)))
    return carrier


PLAY = {"event": "playAudio", "media": {"contentType": "audio/x-mulaw", "sampleRate": 8000, "payload": "/w=="}}


@pytest.mark.parametrize(
    "frame",
    [
        PLAY,
        {"event": "checkpoint", "streamId": "S1", "name": "a"},
        {"event": "clearAudio", "streamId": "S1"},
        {"event": "sendDTMF", "dtmf": "1"},
    ],
)
def test_a_member_too_many_is_an_incorrect_payload(frame: dict[str, Any]) -> None:
    carrier = opened()
    assert len(list(carrier.decode(json.dumps(frame)))) == 1
    with pytest.raises(MalformedFrame, match=r"^incorrectPayload: ") as refused:
        carrier.decode(json.dumps(frame | {"id": "1"}))
    assert refused.value.reason == "incorrectPayload"


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (PLAY | {"media": PLAY["media"] | {"extra": 1}}, "unknown field"),  # type: ignore[operator]
        (PLAY | {"media": PLAY["media"] | {"sampleRate": 16000}}, "'audio/x-mulaw' at 16000 on a stream of mulaw/8000"),  # type: ignore[operator]
        (PLAY | {"media": PLAY["media"] | {"contentType": "audio/x-l16"}}, "'audio/x-l16' at 8000 on a stream of mulaw"),  # type: ignore[operator]
        (PLAY | {"media": PLAY["media"] | {"payload": ""}}, "0 bytes are no whole number"),  # type: ignore[operator]
        (PLAY | {"streamId": "S2"}, "streamId 'S2' is not this stream's"),
        ({"event": "checkpoint", "streamId": "S2", "name": "a"}, "streamId 'S2' is not this stream's"),
        ({"event": "sendDTMF", "dtmf": ""}, "digits ''"),
        ({"event": "sendDTMF", "dtmf": "w"}, "digits 'w'"),
        ({"event": "hello"}, "unknown event 'hello'"),
    ],
)
def test_what_plivo_would_not_take(frame: dict[str, Any], why: str) -> None:
    with pytest.raises(MalformedFrame, match=f"^incorrectPayload: .*{why}"):
        opened().decode(json.dumps(frame))


def test_a_message_has_at_most_64_kb_and_comes_after_the_start() -> None:
    carrier, frame = opened(), json.dumps(PLAY | {"streamId": "S1"})
    assert len(list(carrier.decode(frame + " " * (65_536 - len(frame))))) == 1
    with pytest.raises(MalformedFrame, match="a message of 65537 bytes, more than 64 KB"):
        carrier.decode(frame + " " * (65_537 - len(frame)))
    with pytest.raises(MalformedFrame, match="a frame before the start"):
        Carrier().decode(frame)


def test_no_audio_is_no_frame() -> None:
    codec = Provider(Settings(auth="none")).codec()
    [_] = codec.decode('{"event":"start","start":{"callId":"C1","streamId":"S1"}}')
    assert list(codec.encode(Audio(b""))) == []


def test_half_samples_are_nobodys() -> None:
    form = MediaFormat(Encoding.PCM_S16LE, 16000)
    codec = Provider(Settings(auth="none", media_format=form)).codec()
    [_] = codec.decode('{"event":"start","start":{"callId":"C1","streamId":"S1"}}')
    with pytest.raises(UnsupportedCommand, match="3 bytes are no whole number of pcm_s16le/16000 samples"):
        codec.encode(Audio(b"abc"))
    odd = PLAY | {"media": {"contentType": "audio/x-l16", "sampleRate": 16000, "payload": "YWJj"}}
    with pytest.raises(MalformedFrame, match="3 bytes are no whole number of pcm_s16le/16000 samples"):
        opened(form).decode(json.dumps(odd))


@pytest.mark.parametrize("mode", [{}, {"mode": "listen", "then": "<Hangup/>"}])
def test_any_stream_is_ended_by_closing_its_socket(mode: dict[str, str]) -> None:
    """Also one that has not started, and one that takes nothing."""
    assert list(Provider(Settings(auth="none", **mode)).codec().encode(Stop())) == []  # type: ignore[arg-type]


def test_digits_are_those_of_a_telephone() -> None:
    codec = Provider(Settings(auth="none")).codec()
    [_] = codec.decode('{"event":"start","start":{"callId":"C1","streamId":"S1"}}')
    for digits, shown in (("", "''"), ("1w", "'1w'"), ("1x", "'1x'"), ("w" * 80, "'" + "w" * 63 + "…'")):
        with pytest.raises(UnsupportedCommand, match=f"Plivo sends the digits 0-9 A-D . #, not {shown}$"):
            codec.encode(Dtmf(digits))
    assert list(codec.encode(Dtmf("0AD*#"))) == ['{"event":"sendDTMF","dtmf":"0AD*#"}']


def test_a_start_that_says_little_has_what_is_configured() -> None:
    form = MediaFormat(Encoding.PCM_S16LE, 8000)
    codec = Provider(Settings(auth="none", media_format=form)).codec()
    [start] = codec.decode('{"event":"start","start":{"callId":"C1","streamId":"S1"}}')
    assert isinstance(start, Start)
    assert (start.account_id, start.tracks, start.media_format) == ("", (Track.INBOUND,), form)
    assert codec.number('{"event":"stop","sequenceNumber":7}') == 7
    with pytest.raises(MalformedFrame, match="second_start: the stream is S1, and another start names S2"):
        codec.decode('{"event":"start","start":{"callId":"C1","streamId":"S2"}}')


def test_a_fault_says_why_or_what_plivo_sent() -> None:
    codec = Provider(Settings(auth="none")).codec()
    for event in ("incorrectPayload", "playFailed", "error"):
        frame = json.dumps({"event": event, "code": 7})
        assert list(codec.decode(frame)) == [Fault(event, frame)]
        assert list(codec.decode(json.dumps({"event": event, "reason": "no"}))) == [Fault(event, "no")]
        assert list(opened().encode(Fault(event, "no"))) != []
    assert list(opened().encode(Fault("local_error", "no"))) == []


def test_the_carrier_half_is_plivo() -> None:
    habits = Carrier.habits
    assert (habits.says_stop, habits.confirms_clear, habits.subprotocol) == (False, True, "audio.plivo.com")
    assert (habits.stream_attempts, habits.retries_silence) == (3, True)
    assert Provider.subprotocols == (habits.subprotocol,), "what Plivo asks for is what is granted"
    with pytest.raises(UnsupportedCommand, match="Plivo carries mulaw/8000, pcm_s16le/8000 and pcm_s16le/16000, not mulaw/16000"):
        Carrier().encode(Start("S1", "C1", media_format=MediaFormat(Encoding.MULAW, 16000)))
    carrier = opened()
    frames = [json.loads(frame) for at in (57, None, None) for frame in carrier.encode(Audio(bytes(160), timestamp_ms=at))]
    frames += [json.loads(frame) for frame in carrier.encode(Audio(bytes(160), Track.OUTBOUND))]
    told = [
        (each["media"]["track"], each["media"]["chunk"], each["media"]["timestamp"], each["sequenceNumber"]) for each in frames
    ]
    assert told == [("inbound", 1, "57", 2), ("inbound", 2, "77", 3), ("inbound", 3, "97", 4), ("outbound", 1, "0", 5)]
    [key] = (json.loads(frame) for frame in carrier.encode(Dtmf("5")))
    assert key["dtmf"] == {"track": "inbound", "digit": "5", "timestamp": "117"}


def answered(*, url: str = "wss://h/s", attributes: str = 'contentType="audio/x-mulaw;rate=8000"', after: str = "") -> str:
    return f"<Response><Speak>One moment</Speak><Stream {attributes}>{url}</Stream>{after}<Speak>Bye</Speak></Response>"


def test_plivo_dials_urls_of_2048_characters_and_takes_512_bytes_of_headers() -> None:
    long = "wss://h/" + "s" * 2040
    assert Provider.dial(answered(url=long)).url == long
    with pytest.raises(MalformedFrame, match=r"^connection_failed: the stream URL has 2049 characters, more than 2048$"):
        Provider.dial(answered(url=f"{long}s"))
    attributes = 'contentType="audio/x-mulaw;rate=8000" extraHeaders="a={}"'
    assert Provider.dial(answered(attributes=attributes.format("b" * 510))).parameters == {"a": "b" * 510}
    with pytest.raises(MalformedFrame, match=r"^8011: extraHeaders has more than 512 bytes$"):
        Provider.dial(answered(attributes=attributes.format("b" * 509 + "ü")))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (answered(url=""), "connection_failed: the stream URL '' names no host"),
        (answered(url="wss://h:port/s"), "connection_failed: the stream URL 'wss://h:port/s' can't be read"),
        (answered(attributes=""), "invalid_content_type: contentType ''"),
    ],
)
def test_what_plivo_makes_nothing_of(answer: str, why: str) -> None:
    with pytest.raises(MalformedFrame, match=f"^{re.escape(why)}"):
        Provider.dial(answer)


@pytest.mark.parametrize(
    ("after", "action_url"),
    [
        ("<Redirect> https://h/p/action </Redirect>", "https://h/p/action"),
        ("<Redirect/>", ""),
        ("<Speak>Wait</Speak><Redirect>https://h/p/action</Redirect>", None),
        ("", None),
    ],
)
def test_a_redirect_right_behind_the_stream_is_where_the_call_goes_on(after: str, action_url: str | None) -> None:
    dial = Provider.dial(answered(after=after))
    assert (dial.action_url, dial.parameters) == (action_url, {})
