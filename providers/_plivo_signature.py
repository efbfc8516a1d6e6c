"""Plivo's signatures: V3 and Ma-V3, and on request V2.

Sources: plivo.com/docs/voice/concepts/signature-validation, read November 2026, and plivo-python 4.63, whose `GET` and `POST`
forms are followed where it does not fail; the "manual validation" sample of the page signs something else and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from secrets import randbelow

from gateway.provider import Identity, SignedRequest

from . import _signature

V3, MA_V3, V3_NONCE = "x-plivo-signature-v3", "x-plivo-signature-ma-v3", "x-plivo-signature-v3-nonce"
V2, MA_V2, V2_NONCE = "x-plivo-signature-v2", "x-plivo-signature-ma-v2", "x-plivo-signature-v2-nonce"
"""Ma is the main account's; the other is of the account or subaccount that owns the number."""

_UPGRADE_SCHEMES = ("http", "https", "wss")
"""What may be signed of a WebSocket URL: live calls signed the first, an older page of Plivo's says the last."""

# Text and nonce are joined by a dot (V3) or by nothing (V2). With a dot or a slash in the nonce the border could be moved: the
# end of a signed value would become a part of the nonce. Plivo's nonces are digits.
_NONCE = re.compile(r"[0-9A-Za-z_+=-]{1,256}")
_MOST_SIGNATURES = 32


class Signer:
    """One account's tokens. `accept_v2` admits the older signature, which covers neither query nor body."""

    def __init__(self, auth_token: str | list[str] | None, *, accept_v2: bool) -> None:
        self._tokens = _signature.keys(auth_token)
        self._accept_v2 = accept_v2

    def verify(self, request: SignedRequest) -> str:
        """The form of the URL that was signed, for a log.

        Raises SignatureMismatch, and nothing else, unless a token of this account signed the request.
        """
        forms = _forms(request)
        tail = _tail(request)
        fits = [each & tail[1] for each in self._fits(request, [form + tail[0] for form in forms], ".", (V3, MA_V3, V3_NONCE))]
        if self._accept_v2:
            fits += self._fits(request, forms, "", (V2, MA_V2, V2_NONCE))
        if True not in fits:
            raise _signature.mismatch(_complaint(request, accept_v2=self._accept_v2), forms)
        return _signature.shown(forms[fits.index(True) % len(forms)])

    def identity(self, request: SignedRequest) -> Identity:
        """The nonce of the signature that is right: whoever replays a request can write what he likes beside it."""
        version, nonce = "v3", request.headers.get(V3_NONCE, "")
        if self._accept_v2:
            tail, covered = _tail(request)
            texts = [form + tail for form in _forms(request)]
            if not (covered and True in self._fits(request, texts, ".", (V3, MA_V3, V3_NONCE))):
                version, nonce = "v2", request.headers.get(V2_NONCE, "")
        return Identity(f"{version} {nonce}", nonce=True)

    def sign(self, request: SignedRequest) -> Mapping[str, str]:
        """The headers that Plivo would send with this request, made with the first token; a nonce already there is kept."""
        nonce = request.headers.get(V3_NONCE) or f"{randbelow(10**20):020d}"
        text = f"{_forms(request)[0]}{_tail(request)[0]}.{nonce}"
        signature = _signature.sign(self._tokens[0], _signature.utf8(text), "sha256").decode()
        return {V3: signature, MA_V3: signature, V3_NONCE: nonce}

    def _fits(self, request: SignedRequest, texts: list[str], separator: str, headers: tuple[str, str, str]) -> list[bool]:
        """Which of the texts was signed with the nonce behind it."""
        *signatures, nonce = (request.headers.get(name, "") for name in headers)
        # Several signatures in a header are separated by commas, one for each active token; any of them will do.
        presented = [_signature.utf8(each.strip()) for each in ",".join(signatures).split(",", _MOST_SIGNATURES)]
        fits = []
        for text in texts:
            signed = _signature.utf8(f"{text}{separator}{nonce}")
            found = False
            for token in self._tokens:
                expected = _signature.sign(token, signed, "sha256")
                for each in presented:
                    found |= _signature.equal(each, expected)
            fits.append(found & (_NONCE.fullmatch(nonce) is not None))
        return fits


def _complaint(request: SignedRequest, *, accept_v2: bool) -> str:
    given = request.headers.keys()
    if not given & {V3, MA_V3} and not (accept_v2 and given & {V2, MA_V2}):
        return f"there is no {V3} header" + (", only V2, which `accept_v2: true` would admit" if given & {V2, MA_V2} else "")
    if not given & {V3_NONCE, V2_NONCE}:
        return f"there is no {V3_NONCE} header"
    return "no auth token gives this signature"


def _forms(request: SignedRequest) -> list[str]:
    """Scheme, host, port and path, as dialled; of a WebSocket in each of the schemes."""
    base = request.url.partition("#")[0].partition("?")[0]
    scheme, _, rest = base.partition("://")
    if not _signature.is_upgrade(request) or scheme not in ("http", "https", "ws", "wss"):
        return [base]
    return [f"{each}://{rest}" for each in _UPGRADE_SCHEMES]


def _tail(request: SignedRequest) -> tuple[str, bool]:
    """(what query and body add to the signed text, whether the signature covers them).

    Names and values decoded and sorted; a form without values has no tail, one without a query keeps its question mark.
    """
    query = _signature.pairs(request.url.partition("#")[0].partition("?")[2])
    body = _signature.pairs(request.body)
    if query is None or body is None:
        return "", False
    asked = "&".join(f"{name}={value}" for name, value in sorted(query))
    if request.method == "GET":
        return f"?{asked}" if asked else "", not request.body
    told = "".join(name + value for name, value in sorted(body))
    if not body:
        return f"?{asked}" if asked else "", request.method == "POST" and not request.body
    return f"?{asked}.{told}" if asked else f"?{told}", request.method == "POST"
