"""What every provider's account shares: who signs, what is passed along to the stream, and the facts of a call that our answer
hands to our own codec because the carrier's start frame leaves them out."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from gateway.errors import MalformedFrame, SignatureMismatch, UnsupportedCommand
from gateway.events import COMMAND_NAMES, Command, Message
from gateway.provider import Call

CALLER, CALLED, DIRECTION = "gw_caller", "gw_called", "gw_direction"
"""Names under which our answer passes a call's facts to our codec; stripped from `Start.parameters` again."""

_RESERVED = "gw_"
_DIGITS = frozenset("0123456789*#ABCD")
_MAX_DIGITS = 64
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


Problems = Iterable[str]
"""What is wrong with a section of the configuration: `key: sentence`, each."""


def object_to(*checks: Problems) -> None:
    """Raises ValueError with everything that the checks found, one argument each; nothing if they found nothing."""
    if problems := [problem for check in checks for problem in check]:
        raise ValueError(*problems)


def check_tokens(auth_token: str | list[str] | None, auth: str | None) -> Problems:
    """There is exactly one way to tell friend from foe."""
    if (auth_token is None) == (auth is None):
        yield "auth: give exactly one of `auth_token: …` and `auth: none`"
    elif auth_token is not None and not (auth_token and all(auth_token)):
        yield "auth_token: is empty; give the account's token, a list of tokens, or `auth: none`"


def check_names(parameters: dict[str, str]) -> Problems:
    """No parameter has a name that the gateway itself uses."""
    for name in parameters:
        if not name or name.startswith(_RESERVED):
            yield f"parameters: the name {name!r} is taken; names are not empty and don't begin with {_RESERVED}"


def check_lead(lead_ms: int | None, ceiling_ms: int) -> Problems:
    """The carrier can hold the lead."""
    if lead_ms is not None and not 20 <= lead_ms <= ceiling_ms:
        yield f"lead_ms: {lead_ms} is out of range; this carrier holds 20 to {ceiling_ms} ms"


def check_mode(mode: str, track: str, then: str, after: str) -> Problems:
    """The options fit the direction of the stream."""
    if mode == "listen":
        if not then.strip():
            yield "mode: listen needs `then`, such as <Dial>…</Dial>: with no next element the call ends at once"
        if after:
            yield "after: has no effect with `mode: listen`; what runs meanwhile goes into `then`"
    else:
        if track != "inbound":
            yield f"track: {track} needs `mode: listen`; a conversation hears the inbound track only"
        if then:
            yield "then: needs `mode: listen`; what runs once a conversation has ended goes into `after`"


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


def accepted(accepts: frozenset[type[Message]]) -> tuple[str, ...]:
    """Commands by their words, sorted: `Start.accepts`."""
    return tuple(sorted(COMMAND_NAMES[command] for command in accepts))


def unsupported(who: str, command: Command, accepts: frozenset[type[Message]]) -> UnsupportedCommand:
    """The refusal of a command that this stream's wire has no word for."""
    words = ", ".join(accepted(accepts)) or "nothing"
    return UnsupportedCommand(f"{who} can't carry {COMMAND_NAMES[type(command)]!r} on this stream; it accepts: {words}")


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
