"""The laws of a provider, for every name in the registry: the two halves of each protocol plugged together."""

from __future__ import annotations

import json
from typing import Any, get_args
from urllib.parse import urlencode
from xml.etree import ElementTree
from xml.parsers import expat

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import ValidationError, convert
from rich.pretty import pretty_repr

import providers
from gateway.errors import MalformedFrame, NotStarted, SignatureMismatch, UnsupportedCommand
from gateway.events import (
    COMMAND_NAMES,
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
    Language,
    Message,
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
from gateway.media import MULAW_8K, MediaFormat, Track
from gateway.provider import Call, Codec, Dial, SignedRequest

steady = settings(deadline=None)  # other tests run beside these: a slow moment is no failure
every_provider = pytest.mark.parametrize("kind", providers.names())

CALL = Call("CA0001", "+15550100001", "+15550100002", "inbound", "AC0001")
STREAM_URL = "wss://voice.example.com/twilio/stream/k3"

EVENTS: dict[type[Message], list[Event]] = {
    Start: [],  # told by `started`
    Audio: [Audio(bytes(range(160)), timestamp_ms=40), Audio(b"\0\1", timestamp_ms=2**41)],
    Dtmf: [Dtmf(key) for key in "0123456789*#"],
    Checkpoint: [Checkpoint(name, Outcome.PLAYED) for name in ("a", "g1:160", 'quote " back \\ ünïcode \U0001f600', "7")],
    Clear: [Clear()],
    Transcript: [Transcript("Where is", False, "en-US"), Transcript("", True, "")],
    BargeIn: [BargeIn("Your order", 702), BargeIn()],
    Speech: [Speech(who, active) for who in Party for active in (True, False)],
    Spoken: [Spoken(" Holding. "), Spoken("1w2")],
    Gap: [Gap(40)],
    Flow: [Flow(FlowState.PAUSE, 60_000)],
    Fault: [Fault(code, "why") for code in ("carrier_error", "incorrectPayload", "playFailed", "error")],
    Unknown: [Unknown("surprise")],
    Stop: [Stop(StopReason.CALLER_HANGUP)],
}
COMMANDS: dict[type[Message], list[Command]] = {
    Audio: [Audio(bytes(320)), Audio(bytes(range(256)) * 400)],
    Dtmf: [Dtmf("12#"), Dtmf("0*")],
    Checkpoint: [Checkpoint("a"), Checkpoint('quote " back \\ ünïcode \U0001f600')],
    Clear: [Clear()],
    Say: [Say("Hello", False), Say("", True, "de-DE", True, False), Say("ünïcode", interruptible=False, preemptible=True)],
    Play: [Play("https://media.example.com/a.mp3"), Play("https://media.example.com/a.mp3", 0, True, False)],
    Language: [Language("de-DE"), Language(None, "de-DE"), Language("de-DE", "fr-FR")],
    Stop: [Stop(), Stop(handoff="{}")],
}


def provider_of(kind: str, **config: Any) -> Any:
    provider = providers.load(kind)
    return provider(provider.Config(**{"auth": "none"} | config))  # type: ignore[arg-type]


def webhook(kind: str, call: Call = CALL) -> SignedRequest:
    request = providers.load(kind).webhook(call, "https://voice.example.com/p/answer")
    return SignedRequest(request.method, request.url, request.headers, form=request.form)


def dialled(kind: str, provider: Any, call: Call = CALL) -> Dial:
    return providers.load(kind).dial(provider.answer(webhook(kind, call), STREAM_URL).body)


def started(kind: str, **config: Any) -> tuple[Codec, Any, Start]:
    """Both halves after the start that this carrier sends when it has read our answer; and what our half made of it."""
    provider = provider_of(kind, **config)
    dial = dialled(kind, provider)
    tracks = tuple(Track(track) for track in dial.tracks)
    told = Start("ST0001", CALL.call_id, CALL.account_id, CALL.caller, CALL.called, CALL.direction, dial.media_format, tracks)
    codec, carrier = provider.codec(), providers.load(kind).carrier()
    told = Start(**{name: getattr(told, name) for name in told.__struct_fields__} | {"parameters": dict(dial.parameters)})
    [start] = [event for frame in carrier.encode(told) for event in codec.decode(frame)]
    assert isinstance(start, Start)
    return codec, carrier, start


def test_samples_cover_both_unions() -> None:
    """A new event or command without a sample here is red."""
    assert set(EVENTS) == set(get_args(Event))
    assert set(COMMANDS) == set(get_args(Command)) == set(COMMAND_NAMES)


@every_provider
def test_a_call_becomes_a_start(kind: str) -> None:
    """Webhook, answer, dial, start: who calls whom survives the way, and nothing of ours stays among the parameters."""
    codec, _, start = started(kind, parameters={"token": "k3 & more"})
    call = provider_of(kind).call(webhook(kind))
    assert (start.stream_id, start.call_id, start.account_id) == ("ST0001", CALL.call_id, CALL.account_id)
    assert (start.caller, start.called, start.direction) == (call.caller, call.called, call.direction)
    assert start.caller.removeprefix("+") == CALL.caller.removeprefix("+")
    assert start.parameters == {"token": "k3 & more"}
    assert start.accepts == tuple(sorted(COMMAND_NAMES[command] for command in codec.accepts))


@every_provider
@pytest.mark.parametrize("direction", ["inbound", "outbound"])
def test_webhook_is_read_as_the_same_call(kind: str, direction: str) -> None:
    call = Call("CA7", "15550100001", "15550100002", direction, "AC7")
    assert provider_of(kind).call(webhook(kind, call)) == call


@every_provider
def test_webhook_without_a_call_is_malformed(kind: str) -> None:
    with pytest.raises(MalformedFrame, match="missing_field"):
        provider_of(kind).call(SignedRequest("POST", "https://voice.example.com/p/answer", form={"From": "+1"}))


@every_provider
def test_every_event_survives_the_wire(kind: str) -> None:
    """What the carrier half tells is what our half hears; events outside `emits` put nothing on the wire."""
    emits = providers.load(kind).emits
    for event_type, events in EVENTS.items():
        for event in events:
            codec, carrier, _ = started(kind)
            frames = list(carrier.encode(event))
            heard = [each for frame in frames for each in codec.decode(frame)]
            if event_type not in emits:
                assert frames == [], event
            elif isinstance(event, Fault) and frames:  # the code may be the codec's own word
                assert [each.message for each in heard if isinstance(each, Fault)] == [event.message]
            elif frames:
                assert heard == [event], event
            else:  # a carrier's own choice, such as Plivo's undocumented stop
                assert isinstance(event, Stop | Fault), event


@every_provider
def test_every_emitted_event_has_a_frame(kind: str) -> None:
    _, carrier, _ = started(kind)
    emits, says_stop = providers.load(kind).emits, carrier.habits.says_stop
    told = {type(event) for events in EVENTS.values() for event in events if list(carrier.encode(event))}
    assert told | {Start} == emits - (set() if says_stop else {Stop})


@every_provider
def test_every_accepted_command_survives_the_wire(kind: str) -> None:
    """What our half writes is text that the carrier reads as the same command; long audio in several frames, no byte lost."""
    codec, carrier, _ = started(kind)
    for command_type in codec.accepts:
        for command in COMMANDS[command_type]:
            frames = list(codec.encode(command))
            assert all(isinstance(frame, str) and len(frame) < 60_000 for frame in frames)
            read = [each for frame in frames for each in carrier.decode(frame)]
            if isinstance(command, Audio):
                assert b"".join(each.payload for each in read) == command.payload
            elif frames:
                assert read == [command]
            else:
                assert isinstance(command, Stop | Checkpoint)


@every_provider
def test_what_is_not_accepted_is_refused(kind: str) -> None:
    """Never ignored in silence; the sentence names the command. Only Stop is always possible: by closing the socket."""
    for mode in ({}, {"mode": "listen", "then": "<Hangup/>"}):
        if mode and "mode" not in providers.load(kind).Config.__struct_fields__:
            continue
        codec, _, _ = started(kind, **mode)
        assert mode == {} or codec.accepts == frozenset()
        for command_type, name in COMMAND_NAMES.items():
            if command_type not in codec.accepts and command_type is not Stop:
                for command in COMMANDS[command_type]:
                    with pytest.raises(UnsupportedCommand, match=name):
                        list(codec.encode(command))


@every_provider
def test_nothing_is_sent_before_the_start(kind: str) -> None:
    """Every command that needs a frame is refused while the stream has no name."""
    codec, carrier = provider_of(kind).codec(), providers.load(kind).carrier()
    for command_type in codec.accepts - {Stop}:
        with pytest.raises(NotStarted):
            list(codec.encode(COMMANDS[command_type][0]))
    with pytest.raises(NotStarted):
        list(carrier.encode(Dtmf("1")))


@every_provider
def test_a_second_start_is_ignored_or_malformed(kind: str) -> None:
    codec, _, start = started(kind)
    again = Start(start.stream_id, start.call_id, media_format=start.media_format)
    other = Start("ST0002", start.call_id, media_format=start.media_format)
    assert [event for frame in providers.load(kind).carrier().encode(again) for event in codec.decode(frame)] == []
    with pytest.raises(MalformedFrame, match="second_start"):
        [event for frame in providers.load(kind).carrier().encode(other) for event in codec.decode(frame)]


@every_provider
def test_streams_do_not_share_state(kind: str) -> None:
    """A fresh codec knows nothing of the stream before it."""
    provider = provider_of(kind)
    for stream_id in ("ST1", "ST2"):
        codec, carrier = provider.codec(), provider.carrier()
        start = Start(stream_id, "CA1", media_format=dialled(kind, provider).media_format)
        [heard] = [event for frame in carrier.encode(start) for event in codec.decode(frame)]
        assert isinstance(heard, Start)
        assert heard.stream_id == stream_id


# --- signatures ----------------------------------------------------------------------------------------------------------


def requests(kind: str) -> list[SignedRequest]:
    """A webhook by POST and by GET, and an upgrade; unsigned."""
    asked = providers.load(kind).webhook(CALL, "https://voice.example.com/p/answer")
    form = urlencode(asked.form)
    return [
        SignedRequest.read("POST", asked.url, asked.headers, form.encode()),
        SignedRequest.read("GET", f"{asked.url}?{form}", {}),
        SignedRequest.read("GET", "https://voice.example.com/p/stream/k3", {"Upgrade": "websocket"}),
    ]


def with_headers(request: SignedRequest, headers: Any) -> SignedRequest:
    return SignedRequest(request.method, request.url, {**request.headers, **headers}, request.body, request.form)


@every_provider
def test_only_open_accounts_let_anybody_in(kind: str) -> None:
    """Fails closed: with a token, an unsigned request is refused, and the refusal names what was tried."""
    for request in requests(kind):
        assert provider_of(kind).authenticate(request) == ""
        assert provider_of(kind).sign(request) == {}
        for token in ("s3cret", ["s3cret", "older"]):
            with pytest.raises(SignatureMismatch) as refused:
                provider_of(kind, auth=None, auth_token=token).authenticate(request)
            assert any("://voice.example.com/p/" in form for form in refused.value.tried)


@every_provider
def test_what_is_signed_is_let_in(kind: str) -> None:
    """By any of the account's tokens, on any kind of request; not by another's, and not after a change."""
    for request in requests(kind):
        headers = provider_of(kind, auth=None, auth_token=["s3cret", "unused"]).sign(request)
        assert all(name == name.lower() for name in headers)
        signed = with_headers(request, headers)
        for tokens in ("s3cret", ["s3cret"], ["newer", "s3cret"]):
            provider_of(kind, auth=None, auth_token=tokens).authenticate(signed)
        moved = SignedRequest(signed.method, signed.url.replace("/p/", "/q/"), signed.headers, signed.body)
        larger = SignedRequest(signed.method, signed.url, signed.headers, signed.body + b"&x=1")
        for token, changed in (("newer", signed), ("s3cret", moved), ("s3cret", larger)):
            with pytest.raises(SignatureMismatch):
                provider_of(kind, auth=None, auth_token=token).authenticate(changed)


@every_provider
def test_a_signed_request_has_an_identity_that_nothing_unsigned_changes(kind: str) -> None:
    """Each its own; a carrier that signs no nonce has the same for the same request."""
    account = provider_of(kind, auth=None, auth_token=["s3cret", "unused"])
    signed = [with_headers(request, account.sign(request)) for request in requests(kind)]
    identities = [account.identity(request) for request in signed]
    assert len(set(identities)) == len(signed)
    for request, identity in zip(signed, identities, strict=True):
        assert identity is not None
        odd = with_headers(request, {"user-agent": "x", "x-plivo-signature-v2-nonce": "1", "i-twilio-idempotency-token": "2"})
        account.authenticate(odd)
        assert identity == account.identity(odd)
        bare = with_headers(request, dict.fromkeys(account.sign(request), ""))
        again = account.identity(with_headers(bare, account.sign(bare)))
        assert identity.nonce is (again != identity)
        assert provider_of(kind).identity(request) is None


@every_provider
def test_only_an_empty_document_ends_the_call(kind: str) -> None:
    (request, *_) = requests(kind)
    for option, asked in (("after", "after"), ("service_lost", "gone")):
        assert getattr(provider_of(kind), asked)(request).ends_call
        assert not getattr(provider_of(kind, **{option: "<Redirect>/x</Redirect>"}), asked)(request).ends_call
    assert not provider_of(kind).answer(request, "wss://voice.example.com/p/stream/k3").ends_call
    assert not provider_of(kind).overflow().ends_call
    assert not provider_of(kind).call(request).over


@every_provider
def test_a_signed_request_says_the_same_to_everybody(kind: str) -> None:
    """The form is read from what was signed, so that the call is the signed one."""
    post, get, _ = requests(kind)
    assert provider_of(kind).call(post) == provider_of(kind).call(get) == provider_of(kind).call(webhook(kind))
    for content_type in ("multipart/form-data; boundary=x", "application/x-www-form-urlencoded; charset=utf-16", "text/plain"):
        assert SignedRequest.read("POST", post.url, {"Content-Type": content_type}, post.body).form == post.form


odd_text = st.text(st.characters(exclude_categories=()), max_size=40)
odd_headers = st.dictionaries(
    st.sampled_from(
        ["upgrade", "content-type", "x-twilio-signature", "x-twilio-webhooks-signature-settings"]
        + [f"x-plivo-signature-{name}" for name in ("v3", "ma-v3", "v3-nonce", "v2", "ma-v2", "v2-nonce")]
    ),
    odd_text
    | st.sampled_from(["websocket", "application/json", "application/x-www-form-urlencoded", "algorithm=HMAC_SHA256", "1"]),
)


@every_provider
@steady
@given(
    method=st.sampled_from(["GET", "POST"]) | odd_text,
    url=odd_text
    | odd_text.map("https://voice.example.com/{}".format)
    | odd_text.map("https://{}".format)
    | st.from_regex(r"https?://[][@:.a-f0-9]{0,12}(/[a%?&=]{0,8})?(\?[%a-f0-9&=+]{0,12})?", fullmatch=True),
    headers=odd_headers,
    body=st.binary(max_size=60) | st.from_regex(rb"[%a-f0-9&=+\xff]{0,40}", fullmatch=True),
)
@example("POST", "https://h/", {}, b"&=" * 32_768)
@example("GET", "https://h/?" + "a&" * 32_768, {"upgrade": "websocket"}, b"")
@example("GET", "https://" + "a@" * 8000 + "[:", {}, b"")
@example("POST", "https://[::1/?\ud800", {"content-type": "application/json"}, b"\xff")
@example("GET", "https://h/", {"x-plivo-signature-v3": "," * 8000, "x-plivo-signature-v3-nonce": "\ud800"}, b"")
def test_odd_requests_are_mismatches_and_nothing_else(
    kind: str, method: str, url: str, headers: dict[str, str], body: bytes
) -> None:
    """Whatever a request is made of. What is told about it can be logged: short, on one line, without a value of the query."""
    request = SignedRequest.read(method, url, headers, body)
    options = {"accept_v2": True} if "accept_v2" in providers.load(kind).Config.__struct_fields__ else {"signing_key": "k2"}
    provider = provider_of(kind, auth=None, auth_token=["s3cret", "é"], **options)
    with pytest.raises(SignatureMismatch) as refused:
        provider.authenticate(request)
    # At most: with or without userinfo, three ports, with or without a slash, two readings of the query.
    assert 0 < len(refused.value.tried) <= 2 * 3 * 2 * 2
    assert all(form.isprintable() and len(form) <= 200 for form in refused.value.tried)
    assert "s3cret" not in f"{refused.value} {refused.value.tried}"
    assert provider.status(request).event == "other"
    with_headers(request, provider.sign(request))


@every_provider
def test_secrets_are_not_shown(kind: str) -> None:
    """Neither by repr nor by rich, which prints the locals of a traceback; what is no secret is."""
    provider = providers.load(kind)
    options = {"auth_token": ["s3cret-1", "s3cret-2"], "after": "<Hangup/>"}
    if "signing_key" in provider.Config.__struct_fields__:
        options["signing_key"] = "s3cret-3"
    config = provider.Config(**options)
    for shown in (repr(config), str(config), pretty_repr(config), f"{config!r:>5}"):
        assert "s3cret" not in shown
        assert "auth_token='***'" in shown
        assert "<Hangup/>" in shown
    assert "auth_token=None" in repr(provider.Config(auth="none"))  # type: ignore[call-arg]


# --- what a carrier gets besides ---------------------------------------------------------------------------------------------


def elements(answer: Any) -> list[str]:
    root = ElementTree.fromstring(answer.body)  # noqa: S314 - our own answer
    assert (root.tag, answer.status, answer.content_type) == ("Response", 200, "application/xml")
    return [child.tag for child in root]


@every_provider
def test_what_follows_is_asked_for_or_stands_in_the_answer(kind: str) -> None:
    """With an action URL the carrier asks; without one the elements come along."""
    provider, request = provider_of(kind, after=" <Play>a</Play><Hangup/> "), webhook(kind)
    alone, asking = provider.answer(request, STREAM_URL), provider.answer(request, STREAM_URL, action_url="https://h/a?b=1&c=2")
    assert elements(alone)[1:] == ["Play", "Hangup"]
    assert "Hangup" not in elements(asking)
    assert providers.load(kind).dial(alone.body).action_url is None
    assert providers.load(kind).dial(asking.body).action_url == "https://h/a?b=1&c=2"
    assert elements(provider.after(request)) == ["Play", "Hangup"]
    assert elements(provider_of(kind).after(request)) == []


@every_provider
def test_a_lost_service_and_overload_have_answers_of_their_own(kind: str) -> None:
    request = webhook(kind)
    assert elements(provider_of(kind).gone(request)) == []
    assert elements(provider_of(kind, after="<Hangup/>").gone(request)) == ["Hangup"]
    assert elements(provider_of(kind, after="<Hangup/>", service_lost="<Play>a</Play>").gone(request)) == ["Play"]
    assert elements(provider_of(kind, after="<Hangup/>").overflow()) in (["Reject"], ["Hangup"])
    assert 'reason="busy"' in provider_of(kind).overflow().body
    assert elements(provider_of(kind, overflow="<Play>a</Play><Hangup/>").overflow()) == ["Play", "Hangup"]


@every_provider
def test_status_of_nothing_is_other(kind: str) -> None:
    status = provider_of(kind).status(SignedRequest("POST", "https://h/p/status"))
    assert (status.call_id, status.stream_id, status.event, status.reason) == ("", "", "other", "")


@every_provider
@pytest.mark.parametrize(
    "config",
    [
        {"auth": None},
        {"auth": "none", "auth_token": "t"},
        {"auth": None, "auth_token": ""},
        {"auth": None, "auth_token": []},
        {"auth": None, "auth_token": ["t", ""]},
        {"parameters": {"gw_caller": "x"}},
        {"parameters": {"": "x"}},
        {"parameters": {"a": "x" * 500}},
        {"after": "<a>"},
        {"after": "hello"},
        {"after": "</Response><Response>"},
        {"after": "<a/>\ud800"},
        {"service_lost": "<a>"},
        {"overflow": "busy"},
        {"auth": None, "auth_token": "t\n"},
        {"auth": None, "auth_token": ["t", " t"]},
    ],
)
def test_impossible_configurations_are_refused(kind: str, config: dict[str, Any]) -> None:
    """ValueError, each argument `key: sentence`, so that the configuration reader can point at the line."""
    with pytest.raises(ValueError, match=r"^\w+: .") as refused:
        provider_of(kind, **config)
    fields = providers.load(kind).Config.__struct_fields__
    assert all(str(problem).split(":")[0] in fields for problem in refused.value.args)


@every_provider
def test_an_unknown_option_is_refused(kind: str) -> None:
    with pytest.raises(ValidationError, match="unknown field `auth_tokn`"):
        convert({"auth": "none", "auth_tokn": "t"}, providers.load(kind).Config)


@every_provider
def test_every_option_is_documented(kind: str) -> None:
    """The docstring of a Config has a line for each field: the configuration reference is made from it."""
    config = providers.load(kind).Config
    documented = {line.split(":")[0].strip() for line in (config.__doc__ or "").splitlines() if ":" in line}
    assert set(config.__struct_fields__) <= documented


@every_provider
def test_limits_hold_and_can_be_overridden(kind: str) -> None:
    limits = provider_of(kind).codec().limits
    assert 0 < limits.frame_ms <= limits.max_frame_ms <= limits.lead_ms <= limits.ceiling_ms
    if "lead_ms" in providers.load(kind).Config.__struct_fields__:
        assert provider_of(kind, lead_ms=400).codec().limits.lead_ms == 400
        for lead_ms in (0, limits.ceiling_ms + 1):
            with pytest.raises(ValueError, match="lead_ms"):
                provider_of(kind, lead_ms=lead_ms)


# --- properties at the edges ---------------------------------------------------------------------------------------------

any_text = st.text(st.characters(exclude_categories=()), max_size=60)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.sampled_from(["inbound", "/w==", "ST0001", "1"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(any_text, values, max_size=3),
    max_leaves=8,
)


def frames_of(kind: str) -> list[str]:
    """One frame of each message in both directions."""
    codec, carrier, _ = started(kind)
    told = [frame for events in EVENTS.values() for event in events for frame in carrier.encode(event)]
    sent = [frame for command_type in codec.accepts for frame in codec.encode(COMMANDS[command_type][0])]
    start = providers.load(kind).carrier().encode(Start("ST0001", "CA1", media_format=format_of(kind)))
    return [*start, *told, *sent]


def format_of(kind: str) -> MediaFormat | None:
    return dialled(kind, provider_of(kind)).media_format


FRAMES = {kind: frames_of(kind) for kind in providers.names()}


def only_malformed(kind: str, frame: str | bytes) -> None:
    """Both halves, before and after the start."""
    for codec, carrier in ((provider_of(kind).codec(), providers.load(kind).carrier()), started(kind)[:2]):
        for decode in (codec.decode, carrier.decode):
            refusal: MalformedFrame | None = None
            events: list[Event | Command] = []
            try:
                events = list(decode(frame))
            except MalformedFrame as error:
                refusal = error
            if refusal is not None:
                assert 0 < len(refusal.reason) <= 24
                assert len(str(refusal)) < 1000
            for event in events:
                assert not isinstance(event, Unknown) or len(event.kind) <= 64
                assert not isinstance(event, Fault) or len(event.message) <= 500


@every_provider
@steady
@given(st.data())
def test_mutated_frames_are_malformed_at_worst(kind: str, data: st.DataObject) -> None:
    """Characters replaced, cut, doubled."""
    frame = data.draw(st.sampled_from(FRAMES[kind]).filter(lambda text: len(text) < 2000))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(frame)))
        end = data.draw(st.integers(start, min(len(frame), start + 20)))
        frame = frame[:start] + data.draw(any_text) + frame[end:]
    only_malformed(kind, frame)


@every_provider
@steady
@given(st.data())
def test_frames_with_foreign_values_are_malformed_at_worst(kind: str, data: st.DataObject) -> None:
    """Any value of any type in any place of a real frame."""
    frame = json.loads(data.draw(st.sampled_from(FRAMES[kind])))
    owner = frame
    while True:
        name = data.draw(st.sampled_from(sorted(owner)))
        if not isinstance(owner[name], dict) or not owner[name] or data.draw(st.booleans()):
            break
        owner = owner[name]
    owner[name] = data.draw(json_values)
    only_malformed(kind, json.dumps(frame))


@every_provider
@steady
@given(frame=any_text | st.binary(max_size=60))
@example("[" * 100_000)
@example('{"a":' * 50_000)
@example('{"event":"media","media":' * 1)
@example('{"event":"media","media":{"payload":"/w==","timestamp":' + "9" * 50_000 + "}}")
@example('{"event":"media","media":{"payload":"/w==","timestamp":"' + "9" * 50_000 + '"}}')
@example('{"event":"media","media":{"payload":"\ud800"}}')
@example('{"event":"\\ud800"}')
@example('{"event":"start","extra_headers":' + '{"a":' * 20_000)
@example(
    '{"event":"start","start":{"callId":"a","streamId":"b"},"extra_headers":"' + '{\\"a\\":' * 20_000 + '"}',
)
@example('{"type":"info","name":"tokensPlayed","value":' + "[" * 500 + "]" * 500 + "}")
@example('{"type":"info","name":"tokensPlayed","value":' + "9" * 5000 + "}")
@example('{"type":"prompt","voicePrompt":"\\ud800","last":true}')
@example(b"\xff")
@example(b"")
@example("")
def test_any_frame_is_malformed_at_worst(kind: str, frame: str | bytes) -> None:
    only_malformed(kind, frame)


@every_provider
@steady
@given(text=any_text, url=any_text, caller=any_text)
@example("]]>\0\v￾\ud800\r\n\t&<>\"'", "wss://h/\0?a=1&b=<2>", "sip:\0\ud800;a=b,c@h")
def test_answers_are_well_formed_for_every_string(kind: str, text: str, url: str, caller: str) -> None:
    """Checked by expat, the strictest reader at hand."""
    options = {"welcome_greeting": text} if "welcome_greeting" in providers.load(kind).Config.__struct_fields__ else {}
    if "stream_name" in providers.load(kind).Config.__struct_fields__:
        options["stream_name"] = text
    provider = provider_of(kind, parameters={"p": text[:20]}, **options)
    call = Call("CA1", caller, text, "outbound")
    for action_url, status_url in ((None, None), (url, caller)):
        body = provider.answer(webhook(kind, call), url, action_url=action_url, status_url=status_url).body
        expat.ParserCreate().Parse(body.encode(), True)


@every_provider
@steady
@given(st.dictionaries(st.text("abcXYZ019_-", min_size=1, max_size=8), st.text(max_size=6), max_size=3))
@example({"a": "x=y;z,w %41+ü\U0001f600", "b": " spaces "})
def test_parameters_arrive_as_they_were_configured(kind: str, parameters: dict[str, str]) -> None:
    """Through our answer, the carrier's reading and its start frame; only characters that XML can't write are lost."""
    printable = {name: "".join(filter(lambda char: char >= " " and char not in "￾￿", text)) for name, text in parameters.items()}
    assert started(kind, parameters=printable)[2].parameters == printable


@every_provider
@pytest.mark.parametrize(
    "answer",
    ["", "no xml", "<Response/>", "<Answer/>", '{"json": true}', "<Response><Hangup/></Response>", "<Response>\ud800</Response>"],
)
def test_answers_that_start_nothing_are_refused(kind: str, answer: str) -> None:
    with pytest.raises(MalformedFrame):
        providers.load(kind).dial(answer)


@every_provider
@pytest.mark.parametrize(
    "url", ["https://voice.example.com/s", "ws://voice.example.com/s", "/s", "", "wss://", "wss://[::1", "wss://h:x/"]
)
def test_urls_that_no_carrier_dials_are_refused(kind: str, url: str) -> None:
    with pytest.raises(MalformedFrame):
        providers.load(kind).dial(provider_of(kind).answer(webhook(kind), url).body)


@every_provider
def test_plain_websockets_are_dialled_on_loopback_only(kind: str) -> None:
    for url in ("ws://127.0.0.1:8080/p/stream/k3", "ws://localhost/s", "ws://[::1]:80/s"):
        assert providers.load(kind).dial(provider_of(kind).answer(webhook(kind), url).body).url == url


def test_media_formats_of_answers_are_what_the_streams_carry() -> None:
    assert {kind: format_of(kind) for kind in providers.names()} == {
        "plivo_audio_streaming": MULAW_8K,
        "twilio_conversation_relay": None,
        "twilio_media_streams": MULAW_8K,
    }
