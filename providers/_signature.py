"""What the checks of all carriers' signatures share. Nothing here stops early because of a secret: every candidate is made
and compared, whatever the header says.
"""

from __future__ import annotations

import hmac
import re
from binascii import b2a_base64
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import parse_qsl

from gateway.errors import SignatureMismatch
from gateway.provider import MOST_FIELDS, SignedRequest

Pairs = list[tuple[str, str]]

_URL = re.compile(
    r"(?P<scheme>https?|wss?)://(?:(?P<userinfo>[^/?#]*)@)?(?P<host>\[[^]/?#@]*]|[^][:/?#@]*)(?::(?P<port>[0-9]*))?"
    r"(?P<path>(?:/[^?#]*)?)(?P<query>(?:\?[^#]*)?)(?:#.*)?",
    re.DOTALL,
)
_OPAQUE = re.compile(r"[^/]{32,}")  # a path segment as long as this is a token, not a word
_UNPRINTABLE = re.compile(r"[^ -~]")
_LONGEST_SHOWN = 200


class Url(NamedTuple):
    """The parts of a URL, character for character: `port` and `query` keep their `:` and `?`."""

    scheme: str
    userinfo: str
    host: str
    port: str
    path: str
    query: str

    def __str__(self) -> str:
        userinfo = f"{self.userinfo}@" if self.userinfo else ""
        return f"{self.scheme}://{userinfo}{self.host}{self.port}{self.path}{self.query}"


def split(url: str) -> Url | None:
    """The parts of `url` but for its fragment; None where it has not got them. urlsplit normalises, and raises."""
    if (parts := _URL.fullmatch(url)) is None:
        return None
    port = parts["port"]
    return Url(
        parts["scheme"], parts["userinfo"] or "", parts["host"], "" if port is None else f":{port}", parts["path"], parts["query"]
    )


def is_upgrade(request: SignedRequest) -> bool:
    """Whether the request wants to become a WebSocket."""
    return request.headers.get("upgrade", "").strip().lower() == "websocket"


def pairs(encoded: str | bytes) -> Pairs | None:
    """Names and values of a form or a query, decoded, empty values kept, in order; None when there are too many to sort.

    Bytes that are no UTF-8 stay what they are, as surrogates that `utf8` turns back.
    """
    text = encoded.decode("utf-8", "surrogateescape") if isinstance(encoded, bytes) else encoded
    try:
        return parse_qsl(text, keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:
        return None


def utf8(text: str) -> bytes:
    """The bytes that are signed. Never raises."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def keys(configured: str | list[str] | None) -> tuple[bytes, ...]:
    """The keys of an option that is one secret or, while rotating, a list of them."""
    if configured is None:
        return ()
    return tuple(utf8(secret) for secret in ([configured] if isinstance(configured, str) else configured))


def sign(secret: bytes, text: bytes, algorithm: str) -> bytes:
    """Base64 of the HMAC."""
    return b2a_base64(hmac.digest(secret, text, algorithm), newline=False)


def equal(presented: bytes, expected: bytes) -> bool:
    """In constant time: compare_digest walks over its second argument, whatever the length of the first."""
    return hmac.compare_digest(presented, expected)


def mismatch(why: str, tried: Iterable[str]) -> SignatureMismatch:
    """The refusal, with the URL forms that were tried: no credentials, no values of the query, no tokens of the path."""
    return SignatureMismatch(why, lambda: tuple(dict.fromkeys(shown(url) for url in tried)))


def shown(url: str) -> str:
    """`url` for a log: names of the query without values, `…` for userinfo and for what may be a token."""
    parts = split(url)
    if parts is None:
        return "not a URL"
    query = "&".join(f"{pair.partition('=')[0]}=…" for pair in parts.query[1:].split("&") if pair)
    userinfo = "…" if parts.userinfo else ""
    safe = parts._replace(userinfo=userinfo, path=_OPAQUE.sub("…", parts.path), query=f"?{query}" if query else "")
    text = _UNPRINTABLE.sub(lambda found: "…" if found[0] == "…" else "?", str(safe))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"
