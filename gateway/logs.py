"""How the gateway logs: events are constants, values are keys; nothing private, and nothing a terminal would obey, gets out.

Lines go to stderr, one per event: JSON, or something readable where stderr is a terminal. `redact` stands last before the
renderer, so that nothing slips in behind it. What aiohttp and asyncio log takes the same way.
"""

from __future__ import annotations

import json as json_
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Literal

import msgspec
import structlog
from structlog.typing import EventDict, Processor

Level = Literal["debug", "info", "warning", "error"]
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_MASK = "***"
_HIDDEN = "•••"
_MAX_TEXT = 2_000
_MAX_TRACEBACK = 20_000
_MAX_DEPTH = 6
_MAX_ITEMS = 50

_SECRETS = (
    "token",
    "tokens",
    "secret",
    "secrets",
    "password",
    "authorization",
    "signature",
    "credentials",
    "cookie",
    "api_key",
    "signing_key",
    "payload",
)
_NUMBERS = ("caller", "called", "from", "to", "number", "phone")
_WORDS = ("digits", "text", "transcript", "heard", "handoff", "parameters", "extra_headers", "body")
_COUNTS = {
    "bad_frames",
    "unknown_frames",
    "faults",
}  # numbers under names that others may have chosen: `{"payload": 3}` is no audio
_PROSE = {"message", "detail", "details", "error", "errors", "reason", "exception", "problem", "cause"}
_KEY_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_VERSION = re.compile(r"(?i)([-_]?ma)?[-_]?v\d+([-_]?nonce)?$")  # X-Plivo-Signature-Ma-V3
_NO_NUMBER = {"", "anonymous", "private", "restricted", "unavailable", "unknown"}

# In running text (a URL, somebody else's message, a traceback): phone numbers, bearer tokens, stream tokens, `token=…`.
_NUMBER = re.compile(r"(?:(?<![\w])\+|%2[Bb])\d{7,15}(?!\d)|(?<![\w.-])\d{10,15}(?![\w.-])")
_CREDENTIAL = re.compile(r"(?i)\b(bearer|basic)\s+\S+|((?:/|%2F)stream(?:/|%2F))[^\s/?\"'%]+")
_ASSIGNED = re.compile(
    r"""(?i)((?:token|secret|password|authorization|(?:api|signing)_?key)s?["']?\s*[=:]\s*["']?)(?!\s)[^\s"'&,;)}\]]+"""
)
_SIGNATURE = re.compile(
    r"""(?i)(signature(?:-ma)?(?:-v\d)?(?:-nonce)?["']?\s*[=:]\s*["']?)(?!\s)[^\s"'&,;)}\]]+(?:,[^\s"'&,;)}\]]+|,\s+[\w+/=-]{16,})*"""
)

# In what somebody else wrote about an error, more is taken for private: any long number, unless a hexadecimal id is around it,
# and what a frame or a struct that is quoted there says of digits, words and custom parameters.
_LONG_NUMBER = re.compile(r"(?<![A-Za-z0-9])(?<![0-9A-Fa-f]{4}-)\+?\d{8,}(?![A-Za-z0-9]|-[0-9A-Fa-f]{4}-)")
_QUOTED = re.compile(
    r"""(?i)((?<![a-z])(?:custom_?parameters|parameters|extra_?headers|digits?|text|transcript|heard|handoff(?:_?data)?|voice_?prompt)
    ["']?\s*[=:]\s*)(?:\{.*|"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[0-9*#]+)""",
    re.VERBOSE,
)


def configure(*, json: bool | None = None, level: Level = "info", colors: bool | None = None, worker: int | None = None) -> None:
    """Sets up logging for this process; call it once, before the first event.

    `json` None means: JSON lines unless stderr is a terminal; `colors` None: only on a terminal, and never under NO_COLOR.
    `worker` is the slot of one of several, and is in each line.
    """
    terminal = sys.stderr.isatty()
    as_json = not terminal if json is None else json
    render: Processor = render_json
    if not as_json:
        painted = terminal and not os.environ.get("NO_COLOR") if colors is None else colors
        render = console(colors=bool(painted))
    named: list[Processor] = [partial(_of_worker, worker)] if worker is not None else []
    chain: list[Processor] = [
        *named,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
        render,
    ]
    structlog.configure(
        processors=chain,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=_Stderr,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Foreign)]:
        root.removeHandler(handler)
    root.addHandler(_Foreign([*named, *chain[len(named) + 2 :]]))
    root.setLevel(_LEVELS[level])
    logging.getLogger("aiohttp.access").disabled = True  # it prints paths, and stream paths hold tokens


def _of_worker(worker: int, _logger: Any, _method: str, event: EventDict) -> EventDict:
    event["worker"] = worker
    return event


def mask_number(number: str) -> str:
    """A phone number or SIP URI that can be recognised but not dialled: `+1415•••0100`, `sip:•••@example.com`."""
    number = number[:256]
    if number.strip().lower() in _NO_NUMBER:
        return number
    if match := re.fullmatch(r"(?i)(sips?:|tel:)?[^@]*@([a-z0-9.-]+)(?:[:;?>].*)?", number):
        host = _HIDDEN if re.search(r"\d{7}", match[2]) else match[2]
        return f"{match[1] or ''}{_HIDDEN}@{host}"
    digits = re.sub(r"[\s().-]", "", number)
    if not re.fullmatch(r"\+?[0-9]{8,}", digits):
        return _HIDDEN
    plus, digits = digits[: digits.startswith("+")], digits.lstrip("+")
    shown = 4 if len(digits) >= 11 else 2
    return f"{plus}{digits[:shown]}{_HIDDEN}{digits[-shown:]}"


def redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Every value as JSON knows it, without secrets, phone numbers, digits, words or audio. Never raises."""
    return {_scrub(str(key)): _clean(str(key), value, 0) for key, value in event.items()}


@lru_cache(maxsize=1024)
def _treatment(key: str) -> Callable[[Any], Any] | None:
    """How values under `key` are masked: by its last word, whatever its spelling (`auth_token`, `authToken`, `X-Auth-Token`)."""
    words = [word.lower() for word in _KEY_WORD.findall(_VERSION.sub("", key))]
    tails = {"_".join(words[-1:]), "_".join(words[-2:])}
    if tails & set(_SECRETS):
        return lambda value: value if value is None or isinstance(value, bool) else _MASK
    if tails & set(_NUMBERS):
        return lambda value: None if value is None else mask_number(_text(value))
    if tails & set(_WORDS):
        return lambda value: None if value is None else f"<{len(value) if hasattr(value, '__len__') else len(str(value))}>"
    return None


@lru_cache(maxsize=1024)
def _is_prose(key: str) -> bool:
    """Whether values under `key` are what somebody else said."""
    return (_KEY_WORD.findall(key) or [""])[-1].lower() in _PROSE


def _clean(key: str, value: Any, depth: int) -> Any:
    treatment = _treatment(key)
    if treatment is not None:
        return treatment(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= 64 else _HIDDEN
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        limit = _MAX_TRACEBACK if key == "exception" else _MAX_TEXT
        text = _scrub(str(value[: limit * 2]), prose=_is_prose(key))
        return text if len(text) <= limit else f"{text[:limit]}…"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if depth == _MAX_DEPTH:
        return "…"
    if isinstance(value, msgspec.Struct):
        value = {"type": type(value).__name__} | msgspec.structs.asdict(value)
    if isinstance(value, Mapping):
        if key in _COUNTS and all(type(count) is int for count in value.values()):
            return {_scrub(_text(name)): count for name, count in list(value.items())[:_MAX_ITEMS]}
        return {_scrub(_text(name)): _clean(_text(name), one, depth + 1) for name, one in list(value.items())[:_MAX_ITEMS]}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(key, one, depth + 1) for one in list(value)[:_MAX_ITEMS]]
    text = f"{type(value).__name__}: {_text(value)}" if isinstance(value, BaseException) else _text(value)
    return _scrub(text[:_MAX_TEXT], prose=isinstance(value, BaseException) or _is_prose(key))


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # a log line must not be what breaks a call
        return f"<{type(value).__name__}>"


def _scrub(text: str, *, prose: bool = False) -> str:
    if text.isidentifier() and not prose:
        return text  # one plain word: none of the other patterns can be in it
    text = _NUMBER.sub(lambda found: mask_number(found[0].replace("%2B", "+").replace("%2b", "+")), text)
    text = _CREDENTIAL.sub(lambda found: f"{found[1] + ' ' if found[1] else found[2]}{_MASK}", text)
    text = _SIGNATURE.sub(rf"\1{_MASK}", _ASSIGNED.sub(rf"\1{_MASK}", text))
    if prose:
        text = _LONG_NUMBER.sub(lambda found: mask_number(found[0]), _QUOTED.sub(rf"\1{_MASK}", text))
    return text


# --- rendering -----------------------------------------------------------------------------------------------------------


def render_json(_logger: Any, _method: str, event: EventDict) -> str:
    """One JSON object on one line, safe to `cat`: what a terminal would obey is written as \\u…."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    line = json_.dumps({**first, **event}, ensure_ascii=False, separators=(",", ":"), default=_text)
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else json_.dumps(char)[1:-1] for char in line)


_KEY = "\x1b[36m"
_PAINT = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31;1m"}


def console(*, colors: bool) -> Processor:
    """A renderer for people: time, level, event, then `key=value`; a traceback follows, indented."""

    def paint(text: str, code: str) -> str:
        return f"{code}{text}\x1b[0m" if colors and code else text

    def render(_logger: Any, _method: str, event: EventDict) -> str:
        time, level, name = (str(event.pop(key, "")) for key in ("timestamp", "level", "event"))
        traceback = str(event.pop("exception", "") or "")
        parts = [
            paint(printable(time[11:23]), "\x1b[2m"),
            paint(printable(f"{level:<7}"), _PAINT.get(level, "")),
            paint(printable(name), "\x1b[1m"),
            *(f"{paint(printable(str(key)), _KEY)}={_value(value)}" for key, value in event.items()),
        ]
        return "\n    ".join([" ".join(parts), *(printable(line) for line in traceback.split("\n") if line)])

    return render


def printable(text: str) -> str:
    """`text` on one line, with whatever a terminal would obey or reorder (C0, C1, bidi controls, U+2028) as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json_.dumps(value, ensure_ascii=False, default=_text)
    if isinstance(value, str) and (not text or re.search(r"[\s=\"']", text)):
        text = json_.dumps(text, ensure_ascii=False)
    return printable(text)


# --- in and out ----------------------------------------------------------------------------------------------------------


class _Stderr:
    """Writes finished lines. Looks stderr up each time, and loses a line rather than a call when it can't be written."""

    def __init__(self, *_args: Any) -> None: ...

    def msg(self, line: str) -> None:
        try:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            return

    debug = info = warning = error = critical = exception = fatal = warn = err = failure = log = msg


class _Foreign(logging.Handler):
    """Takes what libraries log through the standard module down the same chain."""

    def __init__(self, chain: list[Processor]) -> None:
        super().__init__()
        self._chain = chain
        self._out = _Stderr()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # arguments that don't fit their message
            message = _text(record.msg)
        event: Any = {"event": "library_message", "level": record.levelname.lower(), "logger": record.name, "message": message}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        for step in self._chain:
            event = step(None, "", event)
        self._out.msg(event)
