"""What Twilio's two protocols share: webhooks, TwiML around a stream, and the numbers of Twilio's errors.

Sources: twilio.com/docs/voice/twiml/stream, /voice/twiml/connect/conversationrelay, /voice/twiml, November 2026.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal
from xml.etree.ElementTree import Element

from gateway.errors import MalformedFrame
from gateway.provider import Answer, Call, HttpRequest, SignedRequest, StreamEnd, StreamStatus

from . import _xml
from ._json import excerpt

BAD_ANSWER = "12100"
"""Twilio's error for a document that is no TwiML."""

BUSY = '<Reject reason="busy"/>'
"""What a caller gets when there is no room: a busy tone, without the call being answered or paid for."""

_STATUS: Mapping[str, Literal["started", "stopped", "failed"]] = {
    "stream-started": "started",
    "stream-stopped": "stopped",
    "stream-error": "failed",
    "ended": "stopped",  # the three words for a session of ConversationRelay, told to the action URL
    "completed": "stopped",
    "failed": "failed",
}

_OVER = frozenset({"completed", "busy", "failed", "no-answer", "canceled"})

_PARAMETER_CHARACTERS = 500  # "name and value together under 500 characters"


def call(request: SignedRequest) -> Call:
    """The call of a voice webhook. Raises MalformedFrame when it has no CallSid."""
    form = request.form
    if not form.get("CallSid"):
        raise MalformedFrame("missing_field", "the webhook has no CallSid")
    return Call(
        call_id=form["CallSid"],
        caller=form.get("From", ""),
        called=form.get("To", ""),
        direction=direction(form.get("Direction", "")) or "inbound",
        account_id=form.get("AccountSid", ""),
        over=form.get("CallStatus", "") in _OVER,
    )


def status(request: SignedRequest) -> StreamStatus:
    """What a stream's status callback says, the action request after a session, or a placed call's callback. Never raises."""
    form = request.form
    word = form.get("StreamEvent") or form.get("SessionStatus", "")
    error = form.get("StreamError") or f"{form.get('ErrorCode', '')} {form.get('ErrorMessage', '')}".strip()
    if not word:  # of a call that we placed: completed, busy, no-answer, …
        error = form.get("CallStatus", "")
    stream = form.get("StreamSid") or form.get("SessionId", "")
    return StreamStatus(form.get("CallSid", ""), stream, _STATUS.get(word, "other"), excerpt(error))


def direction(word: str) -> str:
    """Twilio's direction in our words: `inbound`, or `outbound` for `outbound-api` and `outbound-dial`; else nothing."""
    if word.startswith("outbound"):
        return "outbound"
    return "inbound" if word == "inbound" else ""


def webhook(call: Call, url: str, ended: StreamEnd | None = None, *, session: bool = False) -> HttpRequest:
    """Twilio's POST that asks what to do with a call, or the action request once its stream has ended.

    After a `session` of ConversationRelay it tells how that went; which fields follow a Media Stream is documented nowhere.
    """
    form = {
        "AccountSid": call.account_id,
        "ApiVersion": "2010-04-01",
        "CallSid": call.call_id,
        "CallStatus": "in-progress" if call.direction == "outbound" else "ringing",
        "Called": call.called,
        "Caller": call.caller,
        "Direction": "outbound-api" if call.direction == "outbound" else "inbound",
        "From": call.caller,
        "To": call.called,
    }
    if ended is not None:
        form["CallStatus"] = "completed" if ended.cause == "hangup" else "in-progress"
    if ended is not None and session:
        form |= {
            "SessionId": ended.stream_id,
            "SessionStatus": {"request": "ended", "failure": "failed", "hangup": "completed"}[ended.cause],
            "SessionDuration": str(ended.duration_secs),
        }
        if ended.handoff is not None:
            form["HandoffData"] = ended.handoff
        if ended.cause == "failure":
            form |= {"ErrorCode": "64105", "ErrorMessage": "Websocket ended"}
    return HttpRequest("POST", url, {"content-type": "application/x-www-form-urlencoded; charset=UTF-8"}, form)


def answer(*verbs: str) -> Answer:
    """A TwiML document."""
    return Answer(_xml.response(*verbs))


def connect(noun: str, action_url: str | None, after: str) -> Answer:
    """A `<Connect>` document; what follows is asked for at the action URL, or without one stands in the document."""
    verb = _xml.element("Connect", {"action": action_url}, noun)
    return answer(verb, "" if action_url is not None else after.strip())


def check_parameters(parameters: Mapping[str, str]) -> Iterable[str]:
    """Twilio carries every pair; else yields what is wrong."""
    for name, value in parameters.items():
        if not _fits(name, value):
            yield f"parameters: {name[:64]!r} is too long; Twilio carries names and values of under 500 characters together"


def parameters(pairs: Mapping[str, str]) -> list[str]:
    """`<Parameter>` children. A pair that Twilio would not carry is left out, so that the call goes on without it."""
    return [_xml.element("Parameter", {"name": name, "value": value}) for name, value in pairs.items() if _fits(name, value)]


def _fits(name: str, value: str) -> bool:
    return len(name) + len(value) < _PARAMETER_CHARACTERS


def noun(document: str, name: str, within: Iterable[str]) -> tuple[Element, Element]:
    """(verb, noun) of the first `<verb><noun>` in an answer, as Twilio reads it."""
    root = _xml.parse(document, BAD_ANSWER)
    for verb in root:
        if verb.tag in within:
            for child in verb:
                if child.tag == name:
                    return verb, child
    raise MalformedFrame(BAD_ANSWER, f"the answer starts no <{name}>")


def read_parameters(stream: Element) -> dict[str, str]:
    """`<Parameter>` children as Twilio passes them on; of two with one name the last wins."""
    return {child.get("name", ""): child.get("value", "") for child in stream if child.tag == "Parameter"}
