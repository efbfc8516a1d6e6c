"""What every provider's account shares: who signs, what is passed along to the stream, and the facts of a call that our answer
hands to our own codec because the carrier's start frame leaves them out."""

from __future__ import annotations

from urllib.parse import urlsplit

from gateway.errors import MalformedFrame, SignatureMismatch
from gateway.provider import Call

CALLER, CALLED, DIRECTION = "gw_caller", "gw_called", "gw_direction"
"""Names under which our answer passes a call's facts to our codec; stripped from `Start.parameters` again."""

_RESERVED = "gw_"
_DIGITS = frozenset("0123456789*#ABCD")
_MAX_DIGITS = 64
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def check_tokens(auth_token: str | list[str] | None, auth: str | None) -> None:
    """Raises ValueError unless exactly one way to tell friend from foe is configured."""
    if (auth_token is None) == (auth is None):
        raise ValueError("give exactly one of `auth_token: …` and `auth: none`")
    if auth_token is not None and not all([auth_token] if isinstance(auth_token, str) else [*auth_token, auth_token]):
        raise ValueError("`auth_token` is empty; give the account's token, a list of tokens, or `auth: none`")


def check_names(parameters: dict[str, str]) -> None:
    """Raises ValueError for parameter names that the gateway itself uses."""
    for name in parameters:
        if not name or name.startswith(_RESERVED):
            raise ValueError(f"`parameters` has the name {name!r}; names are not empty and don't begin with {_RESERVED!r}")


def check_lead(lead_ms: int | None, ceiling_ms: int) -> None:
    """Raises ValueError for a lead that the carrier can't hold."""
    if lead_ms is not None and not 20 <= lead_ms <= ceiling_ms:
        raise ValueError(f"`lead_ms` is {lead_ms}; this carrier holds 20 to {ceiling_ms} ms")


def authenticate(auth: str | None) -> None:
    """Fails closed: until signatures are checked here, only an account with `auth: none` lets anybody in."""
    if auth != "none":
        raise SignatureMismatch("signatures can't be verified by this version; only `auth: none` admits requests")


def facts(call: Call) -> dict[str, str]:
    """The call's facts as parameters; empty ones are left out."""
    named = {DIRECTION: call.direction, CALLER: call.caller, CALLED: call.called}
    return {name: value for name, value in named.items() if value}


def take_facts(parameters: dict[str, str]) -> tuple[str, str, str]:
    """(caller, called, direction) out of a start frame's parameters, which lose them."""
    caller, called = parameters.pop(CALLER, ""), parameters.pop(CALLED, "")
    direction = parameters.pop(DIRECTION, "")
    return caller, called, direction if direction in ("inbound", "outbound") else ""


def heard_digits(text: str) -> str:
    """The valid keys in `text`, in order. Raises MalformedFrame when there is none, or too many for fingers."""
    digits = "".join(key for key in text.upper() if key in _DIGITS)
    if not digits:
        raise MalformedFrame("bad_digit", f"none of {text[:16]!r} is a key of a telephone")
    if len(digits) > _MAX_DIGITS:
        raise MalformedFrame("too_many_digits", f"{len(digits)} in one frame, more than {_MAX_DIGITS}")
    return digits


def check_stream_url(url: str, *, scheme: str, malformed: str) -> None:
    """Raises MalformedFrame as a carrier refuses to dial `url`: `scheme` is its complaint about anything but wss.

    Plain ws passes towards loopback only: no carrier can be there, but a double of one may.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise MalformedFrame(malformed, f"the stream URL {url!r} can't be read: {error}") from error
    if not host:
        raise MalformedFrame(malformed, f"the stream URL {url!r} names no host")
    if parts.scheme != "wss" and not (parts.scheme == "ws" and host in _LOOPBACK):
        raise MalformedFrame(scheme, f"the stream URL's scheme is {parts.scheme!r}; carriers dial wss:// only")


def check_mode(mode: str, track: str, then: str, after: str) -> None:
    """Raises ValueError for options that contradict the direction of the stream."""
    if mode == "listen":
        if not then:
            raise ValueError("`mode: listen` needs `then`, such as <Dial>…</Dial>: with no next element the call ends at once")
        if after:
            raise ValueError("`after` has no effect with `mode: listen`; the elements that run meanwhile go into `then`")
    elif track != "inbound" or then:
        raise ValueError("`track` and `then` belong to `mode: listen`; a conversation hears the inbound track only")
