"""What Plivo's protocols share: webhooks, media types, and the two directions of `extraHeaders`.

Sources: plivo.com/docs/voice-agents/audio-streaming/concepts/audio-streaming-reference and
/docs/voice/xml/audio-streaming, read November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal
from urllib.parse import quote, unquote

from gateway.errors import MalformedFrame
from gateway.media import Encoding, MediaFormat
from gateway.provider import Call, HttpRequest, SignedRequest, StreamEnd, StreamStatus

from ._json import excerpt, read_object, texts

BAD_ANSWER = "8011"
"""Plivo's hangup code "Invalid Answer XML": what a refused answer looks like from the outside."""

MEDIA_TYPES = {Encoding.MULAW: "audio/x-mulaw", Encoding.PCM_S16LE: "audio/x-l16"}
"""L16 is little-endian here, whatever the IANA type of that name says."""

FORMATS = frozenset(
    {
        MediaFormat(Encoding.MULAW, 8000),
        MediaFormat(Encoding.PCM_S16LE, 8000),
        MediaFormat(Encoding.PCM_S16LE, 16000),
    }
)
"""All that a stream can carry; there is no mu-law at 16 kHz and no A-law."""

HEADER_BYTES = 512
"""`extraHeaders` holds no more."""

ROOM_FOR_FACTS = 192
"""Of those, what is kept for the call's own facts: three names and two numbers or short SIP addresses."""

BUSY = '<Hangup reason="busy"/>'
"""What a caller gets when there is no room: a busy tone, without the call being answered or paid for."""

# Two pages, two namings; which one a callback really has is not known.
_STATUS: Mapping[str, Literal["started", "stopped", "failed", "degraded"]] = {
    "startstream": "started",
    "started": "started",
    "stopstream": "stopped",
    "stopped": "stopped",
    "droppedstream": "failed",
    "failed": "failed",
    "degradedstream": "degraded",
}

_SEPARATORS = re.compile("[;,]")


def media_format(encoding: str, sample_rate: int) -> MediaFormat:
    """The format of a start frame. `audio/x-l16`, the test client's older `audio/l16`, any case. Raises MalformedFrame."""
    for known in FORMATS:
        word = "mulaw" if known.encoding is Encoding.MULAW else "l16"
        if known.sample_rate == sample_rate and word in encoding.lower():
            return known
    raise MalformedFrame("unsupported_format", f"{excerpt(encoding, 64)} at {sample_rate} Hz")


def content_type(form: MediaFormat) -> str:
    """The format as the XML attribute says it."""
    return f"{MEDIA_TYPES[form.encoding]};rate={form.sample_rate}"


def write_headers(pairs: Mapping[str, str]) -> str:
    """`k=v,k2=v2`, percent-encoded. A pair past the limit of 512 bytes is left out: the call goes on without it."""
    fitting: dict[str, str] = {}
    for name, value in pairs.items():
        if len(join_headers(fitting | {name: value}, ",")) <= HEADER_BYTES:
            fitting[name] = value
    return join_headers(fitting, ",")


def join_headers(pairs: Mapping[str, str], separator: str) -> str:
    """`k=v` pairs, percent-encoded until only letters, digits and `_.-~` are left besides."""
    # A lone surrogate has no UTF-8: a question mark in its place can at least be seen.
    return separator.join(
        f"{quote(name, safe='', errors='replace')}={quote(value, safe='', errors='replace')}" for name, value in pairs.items()
    )


def check_headers(parameters: Mapping[str, str]) -> Iterable[str]:
    """The parameters leave room for the call's own facts; else yields what is wrong."""
    size = len(join_headers(parameters, ","))
    if size > HEADER_BYTES - ROOM_FOR_FACTS:
        yield f"parameters: take {size} bytes in extraHeaders; there is room for {HEADER_BYTES - ROOM_FOR_FACTS}"


def read_headers(value: Any) -> dict[str, str]:
    """`extra_headers` in every form that was seen or documented: `k=v;k2=v2`, `k=v,k2=v2`, JSON in a string, an object, nothing.

    Never raises: what reads as none of these is no header. A call isn't lost over a decoration.
    """
    if isinstance(value, dict):
        return texts(value)
    if not isinstance(value, str):
        return {}
    if value.lstrip().startswith("{") and (read := read_object(value)) is not None:
        return texts(read)
    split = (part.partition("=") for part in _SEPARATORS.split(value))
    return {unquote(name.strip()): unquote(text.strip()) for name, equals, text in split if equals and name.strip()}


def call(request: SignedRequest) -> Call:
    """The call of an answer request, numbers as digits without plus. Raises MalformedFrame when it has no CallUUID."""
    form = request.form
    if not form.get("CallUUID"):
        raise MalformedFrame("missing_field", "the webhook has no CallUUID")
    return Call(
        call_id=form["CallUUID"],
        # "usually digits without +"; Plivo's own probes send it. One spelling, so that routes match either.
        caller=form.get("From", "").removeprefix("+"),
        called=form.get("To", "").removeprefix("+"),
        direction="outbound" if form.get("Direction") == "outbound" else "inbound",
        account_id=form.get("AuthID") or form.get("ParentAuthID", ""),
        over=form.get("Event", "") == "Hangup",
    )


def status(request: SignedRequest) -> StreamStatus:
    """What a stream's status callback says, or a placed call's hang-up callback. Never raises."""
    form = request.form
    word = form.get("Event", "").lower()
    reason = form.get("StatusReason") or form.get("Error", "")
    if word == "hangup":  # of a call that we placed: a busy line, no answer, …
        reason = form.get("HangupCauseName") or form.get("CallStatus", "")
    return StreamStatus(form.get("CallUUID", ""), form.get("StreamID", ""), _STATUS.get(word, "other"), excerpt(reason))


def webhook(call: Call, url: str, ended: StreamEnd | None = None) -> HttpRequest:
    """Plivo's POST that asks what to do with a call, or, once its stream has ended, what the `<Redirect>` after that says."""
    outbound = call.direction == "outbound"
    form = {
        "CallUUID": call.call_id,
        "From": call.caller.removeprefix("+"),
        "To": call.called.removeprefix("+"),
        "Direction": "outbound" if outbound else "inbound",
        "CallStatus": "in-progress" if outbound or ended else "ringing",
        "Event": "Redirect" if ended else "StartApp",
        "ParentAuthID": call.account_id,
    }
    if outbound:
        form |= {"RequestUUID": call.call_id, "ALegUUID": call.call_id, "ALegRequestUUID": call.call_id}
    return HttpRequest("POST", url, {"content-type": "application/x-www-form-urlencoded"}, form)
