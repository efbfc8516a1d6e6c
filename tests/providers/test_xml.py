"""Answers: XML that the vendors' own libraries would have written, and what their reader would say against it."""

from __future__ import annotations

import random
import re
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree
from xml.etree.ElementTree import Element
from xml.parsers import expat

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plivo import plivoxml
from twilio.twiml.voice_response import Connect, ConversationRelay, Dial, Start, Stream, VoiceResponse

import providers
from gateway.errors import MalformedFrame
from gateway.media import MULAW_8K, Encoding, MediaFormat
from gateway.provider import Call, SignedRequest
from providers import _xml

steady = settings(deadline=None)  # other tests run beside these: a slow moment is no failure
URL = "wss://voice.example.com/p/stream/k3?a=1&b=2"
ACTION = "https://voice.example.com/p/action?a=1&b=2"
STATUS = "https://voice.example.com/p/status?a=1&b=2"
CALL = Call("CA1", "+15550100001", "+15550100002", "inbound", "AC1")
FACTS = {"gw_direction": "inbound", "gw_caller": "+15550100001", "gw_called": "+15550100002"}


def answer(kind: str, call: Call = CALL, *, action_url: str | None = None, status_url: str | None = None, **config: Any) -> str:
    provider = providers.load(kind)
    request = provider.webhook(call, "https://voice.example.com/p/answer")
    signed = SignedRequest("POST", request.url, form=request.form)
    return provider_of(kind, **config).answer(signed, URL, action_url=action_url, status_url=status_url).body


def provider_of(kind: str, **config: Any) -> Any:
    provider = providers.load(kind)
    return provider(msgspec.convert({"auth": "none"} | config, provider.Config))


def parse(document: str) -> Element:
    return ElementTree.fromstring(document)  # noqa: S314 - our own answers and the vendors' libraries'


def shape(document: object) -> Any:
    """Tags, attributes, texts and children, whatever the order of attributes or the white space between."""
    root = parse(str(document))

    def of(element: Element) -> Any:
        return element.tag, dict(element.attrib), (element.text or "").strip(), [of(child) for child in element]

    return of(root)


def test_media_streams_answer_is_what_twilios_library_writes() -> None:
    response, connect = VoiceResponse(), Connect()
    stream = Stream(url=URL)
    for name, value in {**FACTS, "token": '"k3" & <more>'}.items():
        stream.parameter(name=name, value=value)
    connect.append(stream)
    response.append(connect)
    response.redirect("/next?a=1&b=2")
    config = {"parameters": {"token": '"k3" & <more>'}, "after": "<Redirect>/next?a=1&amp;b=2</Redirect>"}
    assert shape(answer("twilio_media_streams", **config)) == shape(response)


def test_action_status_and_name_are_where_twilios_library_writes_them() -> None:
    response, connect = VoiceResponse(), Connect(action=ACTION)
    stream = Stream(url=URL, name='m"1', status_callback=STATUS)
    for name, value in FACTS.items():
        stream.parameter(name=name, value=value)
    connect.append(stream)
    response.append(connect)
    written = answer("twilio_media_streams", action_url=ACTION, status_url=STATUS, stream_name='m"1', after="<Hangup/>")
    assert shape(written) == shape(response)
    dial = providers.load("twilio_media_streams").dial(written)
    assert (dial.action_url, dial.status_url) == (ACTION, STATUS)

    response, connect = VoiceResponse(), Connect(action=ACTION)
    connect.append(ConversationRelay(url=URL, events="speaker-events tokens-played", dtmf_detection=True, partial_prompts=True))
    response.append(connect)
    assert shape(answer("twilio_conversation_relay", action_url=ACTION, status_url=STATUS)) == shape(response)


@pytest.mark.parametrize("track", ["inbound", "outbound", "both"])
def test_listening_answer_is_what_twilios_library_writes(track: str) -> None:
    """There is no action: Twilio goes on at once."""
    response, start = VoiceResponse(), Start()
    stream = Stream(url=URL, track=f"{track}_track{'s' * (track == 'both')}", name="tap", status_callback=STATUS)
    for name, value in FACTS.items():
        stream.parameter(name=name, value=value)
    start.append(stream)
    response.append(start)
    response.append(Dial("+15550100003"))
    config = {"mode": "listen", "track": track, "then": "<Dial>+15550100003</Dial>", "stream_name": "tap"}
    assert shape(answer("twilio_media_streams", action_url=ACTION, status_url=STATUS, **config)) == shape(response)


def test_relay_answer_is_what_twilios_library_writes() -> None:
    """Every option, under the name that the vendor's library gives it."""
    config: dict[str, Any] = {
        "welcome_greeting": 'Hello "you" & all',
        "welcome_greeting_interruptible": "speech",
        "language": "en-US",
        "tts_language": "en-GB",
        "transcription_language": "en-AU",
        "tts_provider": "Google",
        "voice": "en-US-Journey-O",
        "transcription_provider": "Deepgram",
        "speech_model": "flux",
        "interruptible": "any",
        "interrupt_sensitivity": "low",
        "dtmf_detection": False,
        "report_input_during_agent_speech": "dtmf",
        "preemptible": True,
        "profanity_filter": False,
        "deepgram_smart_format": True,
        "speech_timeout": 900,
        "eot_threshold": 0.7,
        "ignore_backchannel": True,
        "elevenlabs_text_normalization": "auto",
        "partial_prompts": False,
        "debug": "debugging",
        "intelligence_service": "GA1",
        "background_noise_reduction": "medium",
        "conversation_configuration": "IS1",
        "conversation_id": "CH1",
    }
    response, connect = VoiceResponse(), Connect()
    camel = {"deepgram_smart_format": "deepgramSmartFormat", "speech_timeout": "speechTimeout"}
    camel |= {"ignore_backchannel": "ignoreBackchannel", "eot_threshold": "eotThreshold"}
    camel |= {"background_noise_reduction": "backgroundNoiseReduction"}
    named = {camel.get(name, name): value for name, value in config.items()}
    relay = ConversationRelay(url=URL, events="speaker-events tokens-played", hints="Twilio,Plivo", **named)
    relay.language(code="de-DE", tts_provider="Google", voice="de-x", transcription_provider="Deepgram", speech_model="nova-3")
    relay.parameter(name="token", value="k3")
    connect.append(relay)
    response.append(connect)
    german = {"code": "de-DE", "tts_provider": "Google", "voice": "de-x", "transcription_provider": "Deepgram"}
    config |= {"hints": ["Twilio", "Plivo"], "languages": [german | {"speech_model": "nova-3"}], "parameters": {"token": "k3"}}
    assert shape(answer("twilio_conversation_relay", **config)) == shape(response)


def test_relay_asks_for_what_the_gateway_needs_by_default() -> None:
    [connect] = parse(answer("twilio_conversation_relay"))
    assert connect[0].attrib == {
        "url": URL,
        "dtmfDetection": "true",
        "partialPrompts": "true",
        "events": "speaker-events tokens-played",
    }


@pytest.mark.parametrize(("value", "written"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yaml_booleans_for_on_and_off(value: object, written: str) -> None:
    [connect] = parse(answer("twilio_conversation_relay", elevenlabs_text_normalization=value))
    assert connect[0].get("elevenlabsTextNormalization") == written


FORMATS = {
    "audio/x-mulaw;rate=8000": MULAW_8K,
    "audio/x-l16;rate=8000": MediaFormat(Encoding.PCM_S16LE, 8000),
    "audio/x-l16;rate=16000": MediaFormat(Encoding.PCM_S16LE, 16000),
}


@pytest.mark.parametrize("content_type", FORMATS)
def test_plivo_answer_is_what_plivos_library_writes(content_type: str) -> None:
    form = FORMATS[content_type]
    stream = plivoxml.StreamElement(
        URL,
        bidirectional=True,
        keepCallAlive=True,
        contentType=content_type,
        streamTimeout=3600,
        extraHeaders="token=k3%20%26,gw_direction=inbound,gw_caller=15550100001,gw_called=15550100002",
    )
    response = plivoxml.ResponseElement().add(stream).add(plivoxml.HangupElement())
    config = {"media_format": msgspec.to_builtins(form), "stream_timeout_secs": 3600, "parameters": {"token": "k3 &"}}
    body = answer("plivo_audio_streaming", after="<Hangup/>", **config)
    assert shape(body) == shape(response.to_string())
    assert providers.load("plivo_audio_streaming").dial(body).media_format == form


@pytest.mark.parametrize("track", ["inbound", "outbound", "both"])
def test_plivo_listening_answer_is_what_plivos_library_writes(track: str) -> None:
    """No keepCallAlive: the next element has to run at once."""
    headers = "gw_direction=inbound,gw_caller=15550100001,gw_called=15550100002"
    stream = plivoxml.StreamElement(
        URL, audioTrack=track, contentType="audio/x-mulaw;rate=8000", streamTimeout=86400, extraHeaders=headers
    )
    response = plivoxml.ResponseElement().add(stream).add(plivoxml.HangupElement())
    assert shape(answer("plivo_audio_streaming", mode="listen", track=track, then="<Hangup/>")) == shape(response.to_string())


def test_plivo_is_told_where_to_go_on_and_whom_to_tell() -> None:
    stream = plivoxml.StreamElement(
        URL,
        bidirectional=True,
        keepCallAlive=True,
        contentType="audio/x-mulaw;rate=8000",
        streamTimeout=86400,
        extraHeaders="gw_direction=inbound,gw_caller=15550100001,gw_called=15550100002",
        statusCallbackUrl=STATUS,
    )
    response = plivoxml.ResponseElement().add(stream).add(plivoxml.RedirectElement(ACTION))
    written = answer("plivo_audio_streaming", action_url=ACTION, status_url=STATUS, after="<Hangup/>")
    assert shape(written) == shape(response.to_string())
    dial = providers.load("plivo_audio_streaming").dial(written)
    assert (dial.action_url, dial.status_url) == (ACTION, STATUS)
    listening = answer("plivo_audio_streaming", action_url=ACTION, mode="listen", then="<Hangup/>")
    assert [child.tag for child in parse(listening)] == ["Stream", "Hangup"]


def test_a_busy_tone_is_what_the_libraries_write() -> None:
    response = VoiceResponse()
    response.reject(reason="busy")
    for kind in ("twilio_media_streams", "twilio_conversation_relay"):
        assert shape(provider_of(kind).overflow().body) == shape(response)
    hangup = plivoxml.ResponseElement().add(plivoxml.HangupElement(reason="busy"))
    assert shape(provider_of("plivo_audio_streaming").overflow().body) == shape(hangup.to_string())


TWILIO_STREAM = {
    "AccountSid": "AC1",
    "CallSid": "CA1",
    "StreamSid": "MZ1",
    "StreamName": "main",
    "Timestamp": "2026-11-20T09:00:00Z",
}
RELAY_SESSION = {"AccountSid": "AC1", "CallSid": "CA1", "SessionId": "VX1", "SessionDuration": "7"}
PLIVO_STREAM = {"CallUUID": "C1", "StreamID": "S1", "From": "1", "To": "2", "Timestamp": "2024-10-14 13:42:33"}


@pytest.mark.parametrize(
    ("kind", "form", "event", "reason"),
    [
        ("twilio_media_streams", TWILIO_STREAM | {"StreamEvent": "stream-started"}, "started", ""),
        ("twilio_media_streams", TWILIO_STREAM | {"StreamEvent": "stream-stopped"}, "stopped", ""),
        ("twilio_media_streams", TWILIO_STREAM | {"StreamEvent": "stream-error", "StreamError": "no"}, "failed", "no"),
        ("twilio_media_streams", TWILIO_STREAM | {"StreamEvent": "stream-new"}, "other", ""),
        ("twilio_conversation_relay", RELAY_SESSION | {"SessionStatus": "ended", "HandoffData": "{}"}, "stopped", ""),
        ("twilio_conversation_relay", RELAY_SESSION | {"SessionStatus": "completed"}, "stopped", ""),
        (
            "twilio_conversation_relay",
            RELAY_SESSION | {"SessionStatus": "failed", "ErrorCode": "64105", "ErrorMessage": "Websocket ended"},
            "failed",
            "64105 Websocket ended",
        ),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "StartStream"}, "started", ""),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "started"}, "started", ""),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "StopStream"}, "stopped", ""),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "stopped", "StatusReason": "completed"}, "stopped", "completed"),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "DroppedStream", "Error": "refused"}, "failed", "refused"),
        (
            "plivo_audio_streaming",
            PLIVO_STREAM | {"Event": "failed", "StatusReason": "connection_failed"},
            "failed",
            "connection_failed",
        ),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "DegradedStream"}, "degraded", ""),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "PlayedStream", "Name": "a"}, "other", ""),
        ("plivo_audio_streaming", PLIVO_STREAM | {"Event": "failed", "StatusReason": "x" * 9000}, "failed", "x" * 199 + "…"),
    ],
)
def test_status_callbacks_in_our_words(kind: str, form: dict[str, str], event: str, reason: str) -> None:
    """Both of Plivo's namings; by POST and by GET."""
    query = urlencode(form)
    for request in (
        SignedRequest.read("POST", "https://h/p/status", {}, query.encode()),
        SignedRequest.read("GET", f"https://h/p/status?{query}", {}),
    ):
        status = provider_of(kind).status(request)
        assert (status.event, status.reason) == (event, reason)
        assert (status.call_id, status.stream_id) in (("CA1", "MZ1"), ("CA1", "VX1"), ("C1", "S1"))


def test_plivo_noise_cancellation() -> None:
    """Attributes of the reference page; the vendor's library does not have them."""
    [stream] = parse(answer("plivo_audio_streaming", noise_cancellation=True, noise_cancellation_level=70))
    assert (stream.get("noiseCancellation"), stream.get("noiseCancellationLevel")) == ("true", "70")


@pytest.mark.parametrize("kind", ["twilio_media_streams", "plivo_audio_streaming"])
@pytest.mark.parametrize(
    "config",
    [
        {"mode": "listen"},
        {"mode": "listen", "then": " "},
        {"mode": "listen", "then": "<Hangup/>", "after": "<Hangup/>"},
        {"mode": "listen", "then": "<Hangup/>", "service_lost": "<Hangup/>"},
        {"track": "both"},
        {"then": "<Hangup/>"},
        {"mode": "listen", "then": "Dial"},
    ],
)
def test_contradictions_are_refused(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"(mode|track|then|after|service_lost): "):
        answer(kind, **config)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("plivo_audio_streaming", {"media_format": {"encoding": "alaw", "sample_rate": 8000}}),
        ("plivo_audio_streaming", {"media_format": {"encoding": "mulaw", "sample_rate": 16000}}),
        ("plivo_audio_streaming", {"media_format": {"encoding": "pcm_s16le", "sample_rate": 24000}}),
        ("plivo_audio_streaming", {"noise_cancellation_level": 70}),
        ("plivo_audio_streaming", {"noise_cancellation": True, "noise_cancellation_level": 59}),
        ("plivo_audio_streaming", {"stream_timeout_secs": 0}),
        ("plivo_audio_streaming", {"parameters": {"a": "b" * 319}}),
        ("twilio_conversation_relay", {"speech_timeout": 599}),
        ("twilio_conversation_relay", {"speech_timeout": "never"}),
        ("twilio_conversation_relay", {"eot_threshold": 0.95}),
        ("twilio_conversation_relay", {"interruptible": "sometimes"}),
        ("twilio_conversation_relay", {"mode": "listen"}),
    ],
)
def test_options_that_the_carrier_would_refuse(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        answer(kind, **config)


def test_facts_too_long_for_a_header_are_left_out() -> None:
    """A SIP address of 400 characters does not cost the call, nor the parameters that do fit."""
    call = Call("CA1", "sip:" + "x" * 400 + "@example.com", "15550100002", "inbound")
    dial = providers.load("plivo_audio_streaming").dial(answer("plivo_audio_streaming", call, parameters={"token": "k" * 200}))
    assert dial.parameters == {"gw_direction": "inbound", "gw_called": "15550100002", "token": "k" * 200}


def test_parameters_too_long_for_twilio_are_left_out() -> None:
    call = Call("CA1", "sip:" + "x" * 500, "+15550100002", "inbound")
    dial = providers.load("twilio_media_streams").dial(answer("twilio_media_streams", call))
    assert dial.parameters == {"gw_direction": "inbound", "gw_called": "+15550100002"}


# --- the carriers' reading -------------------------------------------------------------------------------------------------


def test_twilio_loses_the_query_of_a_stream_url() -> None:
    dial = providers.load("twilio_media_streams").dial(answer("twilio_media_streams"))
    assert (dial.url, dial.tracks, dial.bidirectional) == ("wss://voice.example.com/p/stream/k3", ("inbound",), True)
    assert dial.parameters == FACTS
    for url in ("wss://h/s#top", "wss://h/s?a=1#top", "wss://h/s"):
        assert providers.load("twilio_media_streams").dial(wrap("Connect", f'<Stream url="{url}"/>')).url == "wss://h/s"


@pytest.mark.parametrize("kind", ["twilio_conversation_relay", "plivo_audio_streaming"])
def test_others_keep_it(kind: str) -> None:
    assert providers.load(kind).dial(answer(kind)).url == URL


@pytest.mark.parametrize("kind", ["twilio_media_streams", "plivo_audio_streaming"])
def test_listening_is_read_as_such(kind: str) -> None:
    for track, tracks in (("inbound", ("inbound",)), ("outbound", ("outbound",)), ("both", ("inbound", "outbound"))):
        dial = providers.load(kind).dial(answer(kind, mode="listen", track=track, then="<Hangup/>"))
        assert (dial.tracks, dial.bidirectional) == (tracks, False)


def wrap(verb: str, stream: str) -> str:
    return f"<Response><{verb}>{stream}</{verb}></Response>" if verb else f"<Response>{stream}</Response>"


@pytest.mark.parametrize(
    ("kind", "document", "complaint"),
    [
        ("twilio_media_streams", wrap("Connect", '<Stream url="https://h/s"/>'), "31922"),
        ("twilio_media_streams", wrap("Connect", '<Stream url="ws://h/s"/>'), "31922"),
        ("twilio_media_streams", wrap("Connect", '<Stream url="nowhere"/>'), "31923"),
        ("twilio_media_streams", wrap("Connect", "<Stream/>"), "31923"),
        ("twilio_media_streams", wrap("Connect", '<Stream url="wss://h/s" track="both_tracks"/>'), "31941"),
        ("twilio_media_streams", wrap("Start", '<Stream url="wss://h/s" track="inbound_track outbound_track"/>'), "31941"),
        ("twilio_media_streams", wrap("Dial", '<Stream url="wss://h/s"/>'), "12100"),
        ("twilio_media_streams", "{}", "12100"),
        ("twilio_conversation_relay", wrap("Connect", '<ConversationRelay url="https://h/s"/>'), "64102"),
        ("twilio_conversation_relay", wrap("Start", '<ConversationRelay url="wss://h/s"/>'), "12100"),
        (
            "plivo_audio_streaming",
            wrap("", '<Stream contentType="audio/x-mulaw;rate=8000">ws://h/s</Stream>'),
            "connection_failed",
        ),
        ("plivo_audio_streaming", wrap("", "<Stream>wss://h/s</Stream>"), "invalid_content_type"),
        ("plivo_audio_streaming", wrap("", '<Stream contentType="audio/x-mulaw">wss://h/s</Stream>'), "invalid_content_type"),
        (
            "plivo_audio_streaming",
            wrap("", f'<Stream contentType="audio/x-mulaw;rate=8000">wss://h/{"s" * 2048}</Stream>'),
            "connection_failed",
        ),
        (
            "plivo_audio_streaming",
            wrap("", '<Stream contentType="audio/x-mulaw;rate=8000" bidirectional="true" audioTrack="both">wss://h/s</Stream>'),
            "8011",
        ),
        (
            "plivo_audio_streaming",
            wrap("", f'<Stream contentType="audio/x-mulaw;rate=8000" extraHeaders="a={"b" * 511}">wss://h/s</Stream>'),
            "8011",
        ),
        ("plivo_audio_streaming", wrap("Connect", '<Stream contentType="audio/x-mulaw;rate=8000">wss://h/s</Stream>'), "8011"),
    ],
)
def test_complaints_have_the_carriers_numbers(kind: str, document: str, complaint: str) -> None:
    with pytest.raises(MalformedFrame) as refused:
        providers.load(kind).dial(document)
    assert refused.value.reason == complaint


def test_white_space_around_plivos_url_is_trimmed() -> None:
    document = wrap("", '<Stream contentType="audio/x-mulaw;rate=8000">\n  wss://h/s\n</Stream>')
    assert providers.load("plivo_audio_streaming").dial(document).url == "wss://h/s"


# --- the builder -----------------------------------------------------------------------------------------------------------


@steady
@given(st.text(st.characters(exclude_categories=())))
@example("\0\x08\v\f\x0e\x1f￾￿\ud800\udfff")
@example("\t\r\n <>&\"' ]]> \x7f\x85\u2028\U0010ffff")
def test_text_survives_but_for_what_xml_cannot_write(text: str) -> None:
    """Read back by ElementTree, as an attribute and as text."""
    kept = "".join(
        char
        for char in text
        if char in "\t\n\r" or " " <= char <= "\ud7ff" or "\ue000" <= char <= "\ufffd" or char >= "\U00010000"
    )
    root = parse(_xml.element("a", {"b": text}, _xml.escape(text)))
    assert (root.get("b"), root.text or "") == (kept, kept)


def attributes(document: str) -> list[str]:
    """The values of every `b`."""
    read: list[str] = []
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda name, attributes: read.extend(attributes.values())
    parser.Parse(document.encode(), True)
    return read


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_million_strings_survive() -> None:
    """As the test above, by expat alone: half of them printable, half of the characters that break things."""
    rng = random.Random(3)
    odd = [
        *map(chr, range(0x20)),
        *"\x7f\x85\u2028\ud7ff\ud800\udfff\ue000\ufffd\ufffe\uffff\U00010000\U0010ffff",
        *"&<>\"'];#x-",
    ]
    for _ in range(1000):
        texts = ["".join(rng.choices(odd, k=rng.randrange(12))) for _ in range(500)]
        texts += ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(6))) for _ in range(500)]
        read = attributes(_xml.response(*(_xml.element("a", {"b": text}, _xml.escape(text)) for text in texts)))
        assert read == [re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text) for text in texts]


def test_values_are_written_as_carriers_expect() -> None:
    attributes: dict[str, _xml.Value] = {"yes": True, "no": False, "none": None, "number": 7, "fraction": 0.5, "empty": ""}
    assert _xml.element("a", attributes) == '<a yes="true" no="false" number="7" fraction="0.5" empty=""/>'
