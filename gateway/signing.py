"""Requests signed as a carrier signs them: for the simulator, for `doctor`, for finding out what a proxy changes."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from msgspec import Struct

from gateway.errors import SignatureMismatch
from gateway.provider import HttpRequest, Provider, SignedRequest

UPGRADE = {"connection": "Upgrade", "upgrade": "websocket"}
"""Headers by which a request wants to become a WebSocket; a signature depends on that."""


class Signing:
    """Signs requests with an account's first secret, over the public URL, whatever address they are sent to.

    `public` is what carriers dial up to but without the provider's name, `reached` the same place as we reach it: a URL below
    either of them is signed as below the first and sent to the second.
    """

    def __init__(self, provider: Provider, public: str, reached: str = "") -> None:
        self._provider = provider
        self._public = public
        self._reached = reached or public

    def __call__(self, request: HttpRequest) -> HttpRequest:
        """The request with the account's signature in its headers; without it where the account has no secret."""
        path = request.url
        for base in (self._public, self._reached):
            path = path.removeprefix(base).removeprefix(websocket_url(base))
        if path == request.url:  # somewhere else, and signed as that
            return _with_headers(request, request.url, self._provider.sign(as_received(request, request.url)))
        public, reached = self._public, self._reached
        if request.url.startswith("ws"):
            public, reached = websocket_url(public), websocket_url(reached)
        return _with_headers(request, reached + path, self._provider.sign(as_received(request, public + path)))


class Verdict(Struct, frozen=True):
    """What the gateway would make of a request: `why` not, and which forms of the URL (fit for a log) it looked at."""

    good: bool
    signed: str = ""
    why: str = ""
    tried: tuple[str, ...] = ()
    hint: str = ""

    @property
    def sentences(self) -> list[str]:
        """For a person."""
        if self.good:
            first = (
                f"good: signed over {self.signed}" if self.signed else "good: this provider has `auth: none`, nothing is checked"
            )
            return [first, *([self.hint] if self.hint else [])]
        return [f"refused: {self.why}", *(f"  tried {url}" for url in self.tried), *([self.hint] if self.hint else [])]


def explain(provider: Provider, request: SignedRequest, public: str) -> Verdict:
    """Checks a request as the gateway does. `public` is its public URL."""
    hint = ""
    if not request.url.startswith((f"{public}/", f"{websocket_url(public)}/")):
        hint = f"note: the gateway checks URLs below {public} only, its `public_url`; this one is elsewhere"
    try:
        return Verdict(True, signed=provider.authenticate(request), hint=hint)
    except SignatureMismatch as error:
        return Verdict(False, why=str(error), tried=error.tried, hint=hint)


def as_received(request: HttpRequest, url: str, body: bytes = b"") -> SignedRequest:
    """A carrier's request as it arrives where it was sent to `url`."""
    encoded = urlencode(request.form)
    if request.method == "POST":
        return SignedRequest.read("POST", url, request.headers, body or encoded.encode())
    if encoded:
        url += f"{'&' if '?' in url else '?'}{encoded}"
    return SignedRequest.read(request.method, url, request.headers, body)


def websocket_url(url: str) -> str:
    """`https://…` as `wss://…`, `http://…` as `ws://…`."""
    return f"ws{url.removeprefix('http')}" if url.startswith("http") else url


def _with_headers(request: HttpRequest, url: str, headers: Mapping[str, str]) -> HttpRequest:
    return HttpRequest(request.method, url, {**request.headers, **headers}, request.form)
