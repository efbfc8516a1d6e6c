"""What every provider's account shares: who signs, what is passed along to the stream, and the facts of a call that our answer
hands to our own codec because the carrier's start frame leaves them out."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from gateway.errors import MalformedFrame, UnsupportedCommand
from gateway.events import COMMAND_NAMES, Command, Message
from gateway.provider import Answer, Call

from . import _xml

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


def check_tokens(auth: str | None, **secrets: str | list[str] | None) -> Problems:
    """There is exactly one way to tell friend from foe; `secrets` are the options that each hold one, or a list."""
    given = {name: secret for name, secret in secrets.items() if secret is not None}
    if (auth is None) == (not given):
        yield "auth: give exactly one of `auth_token: …` and `auth: none`"
    elif auth is not None:
        return
    for name, secret in given.items():
        if not (secret and all(secret)):
            yield f"{name}: is empty; give the account's secret, a list of secrets, or `auth: none`"
        elif any(each != each.strip() for each in ([secret] if isinstance(secret, str) else secret)):
            yield f"{name}: begins or ends with white space, which no carrier's secret does"


def check_api(account_id: str | None, auth_token: str | list[str] | None, api_url: str) -> Problems:
    """With an account's id its API can be asked: at a URL to which credentials may be sent, and with a secret to show."""
    if account_id is not None and not auth_token:
        yield "account_id: needs `auth_token` beside it; the API is asked with both"
    try:
        parts = urlsplit(api_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    plain = parts.scheme == "http" and host in _LOOPBACK
    if not host or not (parts.scheme == "https" or plain) or not api_url.isascii() or not api_url.isprintable() or " " in api_url:
        yield "api_url: is no https:// URL; write scheme and host, such as https://api.example.com"
    elif "@" in parts.netloc or "?" in api_url or "#" in api_url or api_url.endswith("/"):
        yield "api_url: has more than scheme, host and perhaps path; write it without credentials, `?`, `#` and a last slash"


def basic(account_id: str | None, auth_token: str | list[str] | None) -> str:
    """The Authorization header for the account's API, by its first secret. Raises UnsupportedCommand without credentials."""
    if account_id is None or not auth_token:
        raise UnsupportedCommand("the provider's configuration has no account_id, so its API can't be asked")
    secret = auth_token if isinstance(auth_token, str) else auth_token[0]
    return f"Basic {b64encode(f'{account_id}:{secret}'.encode()).decode()}"


def check_names(parameters: dict[str, str]) -> Problems:
    """No parameter has a name that the gateway itself uses."""
    for name in parameters:
        if not name or name.startswith(_RESERVED):
            yield f"parameters: the name {name!r} is taken; names are not empty and don't begin with {_RESERVED}"


def check_lead(lead_ms: int | None, ceiling_ms: int) -> Problems:
    """The carrier can hold the lead."""
    if lead_ms is not None and not 20 <= lead_ms <= ceiling_ms:
        yield f"lead_ms: {lead_ms} is out of range; this carrier holds 20 to {ceiling_ms} ms"


def check_mode(mode: str, track: str, then: str, **afterwards: str) -> Problems:
    """The options fit the direction of the stream."""
    if mode == "listen":
        if not then.strip():
            yield "mode: listen needs `then`, such as <Dial>…</Dial>: with no next element the call ends at once"
        for name in (name for name, elements in afterwards.items() if elements):
            yield f"{name}: has no effect with `mode: listen`; what runs meanwhile goes into `then`"
    else:
        if track != "inbound":
            yield f"track: {track} needs `mode: listen`; a conversation hears the inbound track only"
        if then:
            yield "then: needs `mode: listen`; what runs once a conversation has ended goes into `after`"


_SECRETS = frozenset({"auth_token", "signing_key"})


def masked(settings: Struct) -> list[tuple[str, Any]]:
    """Names and values of an account's options, for its repr: secrets as `***`."""
    values = [(name, getattr(settings, name)) for name in settings.__struct_fields__]
    return [(name, "***" if name in _SECRETS and value is not None else value) for name, value in values]


def shown(settings: Struct) -> str:
    """The repr of an account's options, without its secrets."""
    return f"{type(settings).__name__}({', '.join(f'{name}={value!r}' for name, value in masked(settings))})"


def elements(*configured: str) -> Answer:
    """An answer of the first of these options that is set; none of them: an empty document, which ends the call."""
    text = next((text.strip() for text in configured if text.strip()), "")
    return Answer(_xml.response(text), ends_call=not text)


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
