"""X-Twilio-Signature: made as Twilio makes it, checked against every URL form that Twilio is known to sign.

Sources: twilio.com/docs/usage/security and /usage/webhooks/webhooks-security, read November 2026; the official libraries,
which try forms because "sig generation on back end is inconsistent"; for the SharedKey setting twilio-python 9.13.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from gateway.provider import Identity, SignedRequest

from . import _signature
from ._signature import Url

SIGNATURE = "x-twilio-signature"
SETTINGS = "x-twilio-webhooks-signature-settings"
"""`key=<id of the signing key>,algorithm=HMAC_SHA256`; absent, or without an algorithm, where the auth token signs by SHA-1."""

_ALGORITHMS = {"HMAC_SHA1": "sha1", "HMAC_SHA256": "sha256"}
_FORM = "application/x-www-form-urlencoded"
_DEFAULT_PORTS = {"http": ":80", "https": ":443", "wss": ":443"}


class Signer:
    """One account's secrets: auth tokens, which sign by SHA-1, and signing keys, which sign as the settings header says."""

    def __init__(self, auth_token: str | list[str] | None, signing_key: str | list[str] | None) -> None:
        self._tokens = _signature.keys(auth_token)
        self._keys = _signature.keys(signing_key)

    def verify(self, request: SignedRequest) -> str:
        """The form of the URL that was signed, for a log.

        Raises SignatureMismatch, and nothing else, unless a secret of this account signed the request.
        """
        presented = _signature.utf8(request.headers.get(SIGNATURE, ""))
        named = _algorithm(request.headers.get(SETTINGS, ""))
        by_token = named is None
        algorithm = _ALGORITHMS.get(named or "")
        parameters, covered = _parameters(request)
        forms = _forms(request)
        found = ""
        for form, text in forms.items():
            signed = _signature.utf8(text + parameters)
            fits = False
            for secret in self._tokens:
                fits |= _signature.equal(presented, _signature.sign(secret, signed, "sha1")) & by_token
            for secret in self._keys:
                fits |= _signature.equal(presented, _signature.sign(secret, signed, algorithm or "sha256")) & (
                    algorithm is not None
                )
            found = found or form if fits else found
        if found and not covered:
            raise _signature.mismatch(f"the signature is right, but covers no body: {_UNCOVERED}", forms)
        if not found:
            raise _signature.mismatch(self._complaint(presented, named), forms)
        return _signature.shown(found)

    def identity(self, request: SignedRequest) -> Identity:
        """The signature itself, for a secret has one for a text. Twilio retries, and comes back, with the same."""
        return Identity(request.headers.get(SIGNATURE, ""))

    def sign(self, request: SignedRequest) -> Mapping[str, str]:
        """The headers that Twilio would send with this request, made with the first secret."""
        url = _signature.split(request.url)
        if url is None:
            text = request.url
        elif _signature.is_upgrade(request):
            text = str(url._replace(scheme="wss", userinfo=""))
        else:  # voice over https is signed without a port, over http with it
            text = str(url._replace(userinfo="", port="" if url.scheme == "https" else url.port))
        signed = _signature.utf8(text + _parameters(request)[0])
        if self._tokens:
            return {SIGNATURE: _signature.sign(self._tokens[0], signed, "sha1").decode()}
        return {SIGNATURE: _signature.sign(self._keys[0], signed, "sha256").decode(), SETTINGS: "algorithm=HMAC_SHA256"}

    def _complaint(self, presented: bytes, named: str | None) -> str:
        if not presented:
            return f"there is no {SIGNATURE} header"
        if named is None:
            return "no auth token gives this signature" if self._tokens else "signed with an auth token, and none is configured"
        if named not in _ALGORITHMS:
            return "signed by an algorithm that is neither HMAC_SHA1 nor HMAC_SHA256"
        return "no signing key gives this signature" if self._keys else "signed with a signing key, and none is configured"


_UNCOVERED = "a body that is no form needs bodySHA256 in the query, and a GET has none"


def _algorithm(settings: str) -> str | None:
    """The algorithm of the settings header, upper case; None where it names none: an auth token has signed."""
    for part in settings.split(","):
        name, equals, value = part.partition("=")
        if equals and name.strip() == "algorithm" and value.strip():
            return value.strip().upper()
    return None


def _parameters(request: SignedRequest) -> tuple[str, bool]:
    """(what the body adds to the signed text, whether the signature covers the body at all)."""
    body = request.body
    if request.method != "POST":
        return "", request.method == "GET" and not body
    if request.headers.get("content-type", _FORM).partition(";")[0].strip().lower() == _FORM:
        form = _signature.pairs(body)
        if form is None:
            return "", False
        return "".join(name + value for name, value in sorted(set(form))), True
    query = _signature.pairs(request.url.partition("#")[0].partition("?")[2])
    told = next((value for name, value in query or () if name == "bodySHA256"), None)
    if told is None:
        return "", not body
    return "", _signature.equal(_signature.utf8(told), hashlib.sha256(body).hexdigest().encode())


def _forms(request: SignedRequest) -> dict[str, str]:
    """What Twilio may have signed besides the body: URL form, for the log, to signed text. As received comes first."""
    url = _signature.split(request.url)
    if url is None:
        return {request.url: request.url}
    if _signature.is_upgrade(request):
        return _upgrade_forms(url._replace(scheme="wss"))
    ports = (url.port, "") if url.port else ("", _DEFAULT_PORTS[url.scheme])
    return {str(form): str(form) for form in _at_ports(url, ports)}


def _upgrade_forms(url: Url) -> dict[str, str]:
    """The `wss://` URL of the noun, with and without port and trailing slash.

    With a query there is one more reading, in an official library (TAC): the URL without it, then names and values sorted.
    """
    other = url.path[:-1] if url.path.endswith("/") else f"{url.path}/"
    ports = (url.port, "", _DEFAULT_PORTS["wss"])
    urls = [form for at_path in (url, url._replace(path=other)) for form in _at_ports(at_path, ports)]
    forms = {str(form): str(form) for form in urls}
    if url.query:
        query = "".join(name + value for name, value in sorted(set(_signature.pairs(url.query[1:]) or ())))
        bare = [str(form._replace(query="")) for form in urls]
        forms |= {form: form + query for form in bare}
    return forms


def _at_ports(url: Url, ports: tuple[str, ...]) -> list[Url]:
    """`url` with each of these ports, with and without its userinfo, which Twilio drops."""
    userinfos = dict.fromkeys((url.userinfo, ""))
    return [url._replace(port=port, userinfo=userinfo) for userinfo in userinfos for port in dict.fromkeys(ports)]
