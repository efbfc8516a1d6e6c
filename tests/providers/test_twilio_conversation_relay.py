"""What only ConversationRelay has: options with ranges, a strict reader of ours, informations of any name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from msgspec import ValidationError, convert

from gateway.errors import MalformedFrame, UnsupportedCommand
from gateway.events import BargeIn, Dtmf, Fault, Language, Play, Say, Speech, Start, Stop, Transcript, Unknown
from gateway.provider import Call, Limits, SignedRequest, StreamEnd
from providers.twilio_conversation_relay import Carrier, Codec, Provider, Settings

SETUP = {"type": "setup", "sessionId": "VX1", "callSid": "CA1"}


def started() -> Codec:
    codec = Provider(Settings(auth="none")).codec()
    list(codec.decode(json.dumps(SETUP)))
    return codec


def one(codec: Codec, **frame: Any) -> Any:
    [event] = codec.decode(json.dumps(frame))
    return event


@pytest.mark.parametrize(
    ("option", "right", "wrong", "unit"),
    [
        ("speech_timeout", (600, 5000, "auto", None), (599, 5001, 0), " milliseconds, or auto"),
        ("eot_threshold", (0.5, 0.9, None), (0.49, 0.91), ""),
    ],
)
def test_numbers_are_as_large_as_twilio_takes(option: str, right: tuple[Any, ...], wrong: tuple[Any, ...], unit: str) -> None:
    for value in right:
        Settings(auth="none", **{option: value})
    for value in wrong:
        with pytest.raises(ValueError, match=f"{option}: {value} is out of range; Twilio takes {right[0]} to {right[1]}{unit}$"):
            Settings(auth="none", **{option: value})


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "text", "token": "hi"},
        {"type": "play", "source": "https://h/a"},
        {"type": "sendDigits", "digits": "1"},
        {"type": "language", "ttsLanguage": "de-DE"},
        {"type": "end"},
    ],
)
def test_a_member_too_many_is_an_invalid_message(frame: dict[str, str]) -> None:
    carrier = Carrier()
    assert len(list(carrier.decode(json.dumps(frame)))) == 1
    with pytest.raises(MalformedFrame, match=r"^64107: Invalid message received, code: 64107, {") as refused:
        carrier.decode(json.dumps(frame | {"id": "1"}))
    assert refused.value.reason == "64107"


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        ('{"type": "sendDigits", "digits": ""}', "digits are 0-9 w # *"),
        ('{"type": "sendDigits", "digits": "1A"}', "digits are 0-9 w # *"),
        ('{"type": "play", "source": ""}', "no source to play, or a negative loop"),
        ('{"type": "play", "source": "https://h/a", "loop": -1}', "no source to play, or a negative loop"),
        ('{"type": "language"}', "a language message without a language"),
        ('{"type": "hello"}', "unknown type 'hello'"),
        ('{"type": "text", "token": 7}', "wrong_type: Expected `str`, got `int` - at `$.token`"),
        ('{"type": "play", "source": "a", "loop": "3"}', "wrong_type: Expected `int`, got `str` - at `$.loop`"),
    ],
)
def test_what_twilio_would_not_take(frame: str, why: str) -> None:
    with pytest.raises(MalformedFrame) as refused:
        Carrier().decode(frame)
    assert str(refused.value) == f"64107: Invalid message received, code: 64107, {frame} ({why})"


def test_what_is_left_out_has_its_documented_value() -> None:
    carrier, codec = Carrier(), started()
    assert list(carrier.decode('{"type": "play", "source": "https://h/a", "loop": 0}')) == [Play("https://h/a", 0)]
    assert list(carrier.decode('{"type": "play", "source": "https://h/a"}')) == [Play("https://h/a", 1)]
    assert list(carrier.decode('{"type": "text", "token": "hi"}')) == [Say("hi", False)]
    assert one(codec, type="prompt", voicePrompt="hi", last=True) == Transcript("hi", True, "")
    assert one(codec, type="interrupt") == BargeIn("", 0)
    assert one(codec, type="error") == Fault("carrier_error", "")
    assert one(codec, type="error", description="x" * 500) == Fault("carrier_error", "x" * 199 + "…")


def test_an_information_of_any_other_name_is_unknown() -> None:
    """A name is a metric's label: bounded."""
    codec = started()
    assert one(codec, type="info", name="roundTrip", value=7) == Unknown("info:roundTrip")
    assert one(codec, type="info", name="n" * 80) == Unknown("info:" + "n" * 59)
    for value in ("maybe", 1, None, True):
        with pytest.raises(MalformedFrame, match=r"^bad_value: agentSpeaking is '.*', neither on nor off"):
            one(codec, type="info", name="agentSpeaking", value=value)
    assert isinstance(one(codec, type="info", name="agentSpeaking", value="on"), Speech)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (Dtmf(""), "sends the digits 0-9 w # *, not ''"),
        (Dtmf("1A"), "sends the digits 0-9 w # *, not '1A'"),
        (Dtmf("x"), "sends the digits 0-9 w # *, not 'x'"),
        (Dtmf("A" * 80), "not '" + "A" * 63 + "…'"),
        (Play(""), "plays a URL 0 (endlessly) or more times, not '' 1 times"),
        (Play("https://h/a", -1), "-1 times"),
        (Language(), "a language switch names a language of speech, of transcription, or both"),
    ],
)
def test_what_twilio_can_not_do_is_refused(command: Any, why: str) -> None:
    with pytest.raises(UnsupportedCommand, match=re.escape(why)):
        started().encode(command)


def test_a_language_has_no_unknown_option() -> None:
    with pytest.raises(ValidationError, match="unknown field `voise`"):
        convert({"auth": "none", "languages": [{"code": "de-DE", "voise": "x"}]}, Settings)


def test_a_session_that_goes_on_has_no_greeting() -> None:
    """Twilio would speak it again."""
    provider = Provider(Settings(auth="none", welcome_greeting="Hello", welcome_greeting_interruptible="any"))
    request = SignedRequest("POST", "https://h/p/answer", form={"CallSid": "CA1"})
    answer, again = (provider.answer(request, "wss://h/s", resumed=resumed).body for resumed in (False, True))
    assert (Provider.dial(answer).greeting, Provider.dial(again).greeting) == ("Hello", "")
    assert "Greeting" not in again
    assert 'dtmfDetection="true"' in again


@pytest.mark.parametrize("url", ["", ' url="nowhere"', ' url="https://h/s"', ' url="wss://[/"'])
def test_a_url_that_twilio_does_not_dial(url: str) -> None:
    with pytest.raises(MalformedFrame) as refused:
        Provider.dial(f"<Response><Connect><ConversationRelay{url}/></Connect></Response>")
    assert refused.value.reason == "64102"


def test_a_binary_message_is_told_by_its_length() -> None:
    with pytest.raises(
        MalformedFrame, match=r"^64107: Invalid message received, code: 64107, 2 bytes \(binary_frame: 2 bytes\)$"
    ):
        Carrier().decode(b"{}")


def test_a_setup_says_who_calls_and_a_second_one_nothing() -> None:
    codec = Provider(Settings(auth="none")).codec()
    start = one(codec, **SETUP)
    assert (start.account_id, start.caller, start.called, start.media_format, start.tracks) == ("", "", "", None, ())
    assert list(codec.decode(json.dumps(SETUP))) == []
    with pytest.raises(MalformedFrame, match="second_start: the session is VX1, and another setup names VX2"):
        codec.decode(json.dumps(SETUP | {"sessionId": "VX2"}))
    assert codec.limits == Limits()
    assert list(codec.encode(Stop(handoff="{}"))) == ['{"type":"end","handoffData":"{}"}']


def test_a_call_rings_until_its_first_session_or_until_somebody_was_called() -> None:
    def says(carrier: Carrier, direction: str) -> tuple[str, str]:
        [frame] = carrier.encode(Start("VX1", "CA1", direction=direction))
        setup = json.loads(frame)
        assert {"", "PSTN"} == {setup[name] for name in ("parentCallSid", "forwardedFrom", "callerName", "callType")}
        return setup["callStatus"], setup["direction"]

    again = Carrier()
    again.come_back()
    assert says(Carrier(), "inbound") == ("RINGING", "inbound")
    assert says(Carrier(), "outbound") == ("IN_PROGRESS", "outbound-api")
    assert says(again, "inbound") == ("IN_PROGRESS", "inbound")
    habits = Carrier.habits
    assert (habits.id_prefixes, habits.text, habits.says_stop, habits.tells_hangup) == (("CA", "VX", "AC"), True, False, True)


def test_twilio_tells_how_a_session_went() -> None:
    asked = Provider.webhook(Call("CA1"), "https://h/p/action", StreamEnd("VX1", "request", 7, handoff="{}"))
    assert (asked.form["SessionId"], asked.form["SessionStatus"], asked.form["HandoffData"]) == ("VX1", "ended", "{}")
