"""One-use stream tokens: who may connect a stream, for which call, until when. Pure: time and randomness are arguments.

A token stands in the path of the stream's URL. Any instance with the same secret can read it, without shared memory; that it
is used only once is `gateway.ledger`'s business.

    token = base64url(mac, 16 bytes) + base64url(expires 4 · provider 8 · nonce 16 · length of call id 1 · call id · route)

A document that a carrier is to fetch, such as what a call is transferred to, travels in the path of its own URL likewise, sealed:
any instance can answer with it, and logs of proxies show nothing of it.

    sealed = base64url(mac, 16 bytes · expires 4 · provider 8 · nonce 16 · document, XORed with SHAKE-256(key · nonce))

`mac` is HMAC-SHA256, cut to 128 bits, over the text that follows it: one token has one spelling. `provider` is a keyed hash of
the provider's name. There is no phone number inside; the call id is there for whoever cares to decode it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Literal

from msgspec import Struct

from gateway.errors import MalformedFrame, RemoteError

LIFETIME_SECS = 60
"""From the webhook's answer to the carrier's connection; a carrier dials within a second or two, and tries again."""

LEEWAY_SECS = 5
"""How far the clocks of the instances behind one public URL may be apart."""

NONCE_BYTES = 16
MAX_CALL_ID_BYTES = 128
MAX_ROUTE_BYTES = 32

MAX_DOCUMENT_BYTES = 1000
"""Of a sealed document in UTF-8: its URL stays below 1500 characters, which nobody on the way refuses."""

_MAC_BYTES = 16
_MAC_CHARACTERS = 22
_HASH_BYTES = 8
_HEAD = 4 + _HASH_BYTES + NONCE_BYTES + 1
_FORM = re.compile(rf"[A-Za-z0-9_-]{{{_MAC_CHARACTERS + 40},300}}")
_SEALED = re.compile(r"[A-Za-z0-9_-]{56,1400}")

Reason = Literal["malformed", "forged", "other_provider", "expired"]


class TokenError(RemoteError):
    """A token that opens nothing. `reason` is for logs and metrics; whoever showed the token learns only that it is refused."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class Ticket(Struct, frozen=True):
    """What a token says. `provider` is the name in the configuration, `route` a route's label, `expires` seconds since 1970."""

    provider: str
    call_id: str
    route: str
    expires: int
    nonce: bytes


class Document(Struct, frozen=True):
    """What was sealed; `expires` in seconds since 1970."""

    text: str
    expires: int
    nonce: bytes


class Tokens:
    """Mints and reads tokens with one shared secret."""

    def __init__(self, secret: str) -> None:
        master = secret.encode("utf-8", "surrogatepass")
        self._mac_key = hmac.digest(master, b"telephony-gateway: stream token, version 1", hashlib.sha256)
        self._seal_key = hmac.digest(master, b"telephony-gateway: sealed document, version 1", hashlib.sha256)
        self._veil_key = hmac.digest(master, b"telephony-gateway: veil of a document, version 1", hashlib.sha256)
        self._name_key = hmac.digest(master, b"telephony-gateway: provider in a token, version 1", hashlib.sha256)

    def mint(self, provider: str, call_id: str, route: str, *, now: float, nonce: bytes) -> str:
        """A token for one call. `now` is in seconds since 1970, `nonce` NONCE_BYTES of the system's best randomness.

        Raises MalformedFrame when the carrier's call id is empty or longer than MAX_CALL_ID_BYTES, before anything was reserved
        for it; ValueError when the nonce or the route's label has the wrong length.
        """
        try:
            call, label = call_id.encode(), route.encode()
        except UnicodeEncodeError:
            raise MalformedFrame("bad_call_id", "not Unicode") from None
        if not 0 < len(call) <= MAX_CALL_ID_BYTES:
            raise MalformedFrame("bad_call_id", f"{len(call)} bytes; 1 to {MAX_CALL_ID_BYTES} are allowed")
        if len(nonce) != NONCE_BYTES or len(label) > MAX_ROUTE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes, a label at most {MAX_ROUTE_BYTES}: {len(nonce)}, {len(label)}")
        expires = (int(now) + LIFETIME_SECS).to_bytes(4)
        body = _text(b"".join([expires, self._hash(provider), nonce, len(call).to_bytes(1), call, label]))
        return f"{self._mac(body)}{body}"

    def read(self, token: str, provider: str, *, now: float) -> Ticket:
        """What the token says, if this secret made it for `provider` and it has not expired.

        Raises TokenError and nothing else. Nothing in a token is looked at before its MAC was found right, in constant time.
        Take the ticket to the ledger once the start frame has come; until then the carrier may connect again with it.
        """
        if _FORM.fullmatch(token) is None:
            raise TokenError("malformed")
        mac, body = token[:_MAC_CHARACTERS], token[_MAC_CHARACTERS:]
        if not hmac.compare_digest(self._mac(body), mac):
            raise TokenError("forged")
        raw = urlsafe_b64decode(f"{body}==")  # as many as are ever needed
        if not hmac.compare_digest(self._hash(provider), raw[4 : 4 + _HASH_BYTES]):
            raise TokenError("other_provider")
        expires = int.from_bytes(raw[:4])
        if now > expires + LEEWAY_SECS:
            raise TokenError("expired")
        end = _HEAD + raw[_HEAD - 1]
        return Ticket(
            provider=provider,
            call_id=raw[_HEAD:end].decode(),
            route=raw[end:].decode(),
            expires=expires,
            nonce=raw[4 + _HASH_BYTES : _HEAD - 1],
        )

    def seal(self, document: str, provider: str, *, now: float, nonce: bytes) -> str:
        """A document for `provider` to fetch, within LIFETIME_SECS. Arguments as in `mint`; a nonce must never come twice.

        Raises ValueError for more than MAX_DOCUMENT_BYTES.
        """
        clear = document.encode()
        if len(clear) > MAX_DOCUMENT_BYTES or len(nonce) != NONCE_BYTES:
            raise ValueError(f"{len(clear)} bytes; a document has at most {MAX_DOCUMENT_BYTES}")
        head = (int(now) + LIFETIME_SECS).to_bytes(4) + self._hash(provider) + nonce
        body = head + self._veiled(clear, nonce)
        return _text(hmac.digest(self._seal_key, body, hashlib.sha256)[:_MAC_BYTES] + body)

    def unseal(self, sealed: str, provider: str, *, now: float) -> Document:
        """What was sealed for `provider` and has not expired. Raises TokenError; take its nonce to the ledger."""
        if _SEALED.fullmatch(sealed) is None or len(sealed) % 4 == 1:  # no bytes are written like that
            raise TokenError("malformed")
        raw = urlsafe_b64decode(f"{sealed}==")
        mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        # The last character of base64 may have bits to spare: one document has one spelling.
        if not hmac.compare_digest(hmac.digest(self._seal_key, body, hashlib.sha256)[:_MAC_BYTES], mac) or _text(raw) != sealed:
            raise TokenError("forged")
        if not hmac.compare_digest(self._hash(provider), body[4 : 4 + _HASH_BYTES]):
            raise TokenError("other_provider")
        expires = int.from_bytes(body[:4])
        if now > expires + LEEWAY_SECS:
            raise TokenError("expired")
        nonce = body[4 + _HASH_BYTES : _HEAD - 1]
        return Document(self._veiled(body[_HEAD - 1 :], nonce).decode(), expires, nonce)

    def _veiled(self, document: bytes, nonce: bytes) -> bytes:
        veil = hashlib.shake_256(self._veil_key + nonce).digest(len(document))
        return bytes(a ^ b for a, b in zip(document, veil, strict=True))

    def _mac(self, body: str) -> str:
        return _text(hmac.digest(self._mac_key, body.encode("ascii"), hashlib.sha256)[:_MAC_BYTES])

    def _hash(self, provider: str) -> bytes:
        return hmac.digest(self._name_key, provider.encode("utf-8", "surrogatepass"), hashlib.sha256)[:_HASH_BYTES]


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
