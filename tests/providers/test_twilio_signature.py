"""Twilio's signatures against the official library, wherever that is right, and against every bit that may be wrong.

The library is wrong or silent about: `wss` with a port (it adds :80), userinfo and IPv6 addresses with a port (it cuts the
authority at its first colon), a JSON body without a hash (it lets it through, or raises).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote_to_bytes, urlencode

import pytest
from twilio.request_validator import RequestValidator, get_signature_algorithm

from gateway.errors import SignatureMismatch
from gateway.provider import Identity, SignedRequest
from providers import _signature
from providers.twilio_conversation_relay import Provider as Relay
from providers.twilio_conversation_relay import Settings as RelaySettings
from providers.twilio_media_streams import Provider, Settings
from tests.doubles.twilio_media import signature as doubled

FORM = {"content-type": "application/x-www-form-urlencoded; charset=UTF-8"}
JSON = {"content-type": "application/json"}
UPGRADE = {"upgrade": "websocket", "connection": "Upgrade"}
SHA256 = {"x-twilio-webhooks-signature-settings": "key=webhooks_sharedkey_1,algorithm=HMAC_SHA256"}

TOKEN = "12345"
MYAPP = "https://mycompany.com/myapp.php?foo=1&bar=2"
CALL = {"CallSid": "CA1234567890ABCDE", "Caller": "+14158675309", "Digits": "1234", "From": "+14158675309", "To": "+18005551212"}
STREAM = "https://voice.example.com/twilio/stream/k3"


class Multi(dict[str, list[str]]):
    """Repeated parameters as Django gives them to the library."""

    def getlist(self, name: str) -> list[str]:
        return self[name]


def request(method: str, url: str, signature: str, headers: dict[str, str] | None = None, body: bytes = b"") -> SignedRequest:
    return SignedRequest.read(method, url, {"x-twilio-signature": signature} | (headers or {}), body)


def form(url: str, signature: str, fields: dict[str, str] | list[tuple[str, str]], **headers: str) -> SignedRequest:
    return request("POST", url, signature, FORM | headers, urlencode(fields).encode())


def accepted(signed: SignedRequest, auth_token: Any = TOKEN, signing_key: Any = None) -> bool:
    """The answer of both kinds of account, which is one."""
    answers = []
    for provider in (
        Provider(Settings(auth_token=auth_token, signing_key=signing_key)),
        Relay(RelaySettings(auth_token=auth_token, signing_key=signing_key)),
    ):
        try:
            provider.authenticate(signed)
        except SignatureMismatch:
            answers.append(False)
        else:
            answers.append(True)
    assert answers[0] == answers[1]
    return answers[0]


def refused(signed: SignedRequest, auth_token: Any = TOKEN, signing_key: Any = None) -> SignatureMismatch:
    with pytest.raises(SignatureMismatch) as refusal:
        Provider(Settings(auth_token=auth_token, signing_key=signing_key)).authenticate(signed)
    return refusal.value


def by_library(url: str, params: Any = None, secret: str = TOKEN, algorithm: str | None = None) -> str:
    return str(RequestValidator(secret).compute_signature(url, params or {}, algorithm))


# --- published vectors -------------------------------------------------------------------------------------------------------


def test_the_vectors_of_the_documentation() -> None:
    assert accepted(form(MYAPP, "RSOYDt4T1cUTdK1PDd93/VVr8B8=", CALL))
    at_port = "https://mycompany.com:443/myapp.php?foo=1&bar=2"
    for url, signature in ((MYAPP, "kvajT1Ptam85bY51eRf/AJRuM3w="), (at_port, "RSOYDt4T1cUTdK1PDd93/VVr8B8=")):
        assert accepted(form(url, signature, CALL))
    body = b'{"property": "value", "boolean": true}'
    url = f"{MYAPP}&bodySHA256={hashlib.sha256(body).hexdigest()}"
    assert accepted(request("POST", url, "a9nBmqA0ju/hNViExpshrM61xv4=", JSON, body))


# --- what is signed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("Empty", "")],
        [("A", " leading and trailing ")],
        [("A", "a+b %2B & = ;")],
        [("a", "1"), ("A", "2"), ("_", "3"), ("Z", "4")],
        [("Same", "b"), ("Same", "a"), ("Same", "b")],
        [("CallerName", "Zoë 名 \U0001f600"), ("名", "x")],
        [("A", "\r\n\t\0")],
        [("SpeechResult", 'it\'s <fine> "really"')],
        [("New" + str(index), str(index)) for index in range(200)],
    ],
)
def test_every_parameter_counts_as_it_was_received(fields: list[tuple[str, str]]) -> None:
    """Unknown ones, empty ones, white space, repetitions, any script; a value with one character more is another one."""
    params = Multi()
    for name, value in fields:
        params.setdefault(name, []).append(value)
    signature = by_library(MYAPP, params)
    assert accepted(form(MYAPP, signature, fields))
    assert accepted(form(MYAPP, signature, list(reversed(fields))))
    for index, (name, value) in enumerate(fields[:4]):
        assert not accepted(form(MYAPP, signature, [*fields[:index], (name, value + " "), *fields[index + 1 :]]))
    assert not accepted(form(MYAPP, signature, [*fields, ("Extra", "")]))


def test_raw_bytes_count_not_what_somebody_made_of_them() -> None:
    """A form that says something else than the body does not help; nor does a Content-Type that would read it differently."""
    body = urlencode(CALL).encode()
    signature = by_library(MYAPP, CALL)
    lied = SignedRequest("POST", MYAPP, FORM | {"x-twilio-signature": signature}, b"CallSid=CAevil", CALL)
    assert not accepted(lied)
    utf16 = request("POST", MYAPP, signature, {"content-type": "application/x-www-form-urlencoded; charset=utf-16"}, body)
    assert accepted(utf16)
    assert utf16.form == CALL
    multipart = request("POST", MYAPP, by_library(MYAPP), {"content-type": "multipart/form-data; boundary=x"}, body)
    assert not accepted(multipart)


def test_a_form_of_more_than_1000_fields_is_nobodys() -> None:
    """Sorting and signing it would be work for a flood's benefit, even with the right signature."""
    for size, fits in ((1000, True), (1001, False)):
        fields = {f"k{index}": "v" for index in range(size)}
        assert accepted(form(MYAPP, by_library(MYAPP, fields), fields)) is fits
    assert "covers no body" in str(refused(form(MYAPP, by_library(MYAPP), fields)))


def test_a_get_is_signed_by_its_url_alone() -> None:
    url = "https://voice.example.com/twilio/answer?CallSid=CA1&From=%2B1+5&Name=Zo%C3%AB"
    assert accepted(request("GET", url, by_library(url)))
    assert not accepted(request("GET", url, by_library(url), body=b"CallSid=CAevil"))
    assert not accepted(request("GET", url.replace("+", "%20"), by_library(url)))
    assert not accepted(request("HEAD", url, by_library(url)))
    assert not accepted(request("PUT", url, by_library(url)))


def test_a_body_that_is_no_form_needs_its_hash() -> None:
    body = b'{"a": 1}'
    told = f"{MYAPP}&bodySHA256={hashlib.sha256(body).hexdigest()}"
    for content_type in ("application/json", "application/json; charset=utf-8", "application/scim+json", "text/plain", "x"):
        headers = {"content-type": content_type}
        assert accepted(request("POST", told, by_library(told), headers, body))
        assert not accepted(request("POST", told, by_library(told), headers, body + b" "))
        assert not accepted(request("POST", told, by_library(told), headers))
        assert accepted(request("POST", f"{told}#top", by_library(told), headers, body))
        assert str(refused(request("POST", MYAPP, by_library(MYAPP), headers, body))) == (
            "the signature is right, but covers no body: a body that is no form needs bodySHA256 in the query, and a GET has none"
        )
        upper = f"{MYAPP}&bodySHA256={hashlib.sha256(body).hexdigest().upper()}"
        assert not accepted(request("POST", upper, by_library(upper), headers, body))
    assert not accepted(request("POST", told, by_library(told), FORM, body))


# --- which URL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "signed"),
    [
        (STREAM, "wss://voice.example.com/twilio/stream/k3"),
        (STREAM, "wss://voice.example.com/twilio/stream/k3/"),
        (STREAM, "wss://voice.example.com:443/twilio/stream/k3"),
        (STREAM, "wss://voice.example.com:443/twilio/stream/k3/"),
        (STREAM + "/", "wss://voice.example.com/twilio/stream/k3"),
        ("https://voice.example.com", "wss://voice.example.com"),
        ("https://voice.example.com", "wss://voice.example.com/"),
        ("https://voice.example.com/", "wss://voice.example.com"),
        ("https://voice.example.com:8443/s", "wss://voice.example.com:8443/s"),
        ("https://voice.example.com:8443/s", "wss://voice.example.com/s"),
        ("https://voice.example.com:8443/s", "wss://voice.example.com:443/s"),
        ("http://127.0.0.1:8080/s", "wss://127.0.0.1:8080/s"),
        ("https://[2001:db8::1]:8443/s", "wss://[2001:db8::1]:8443/s"),
        ("https://[2001:db8::1]:8443/s", "wss://[2001:db8::1]/s"),
        ("https://[2001:db8::1]/s", "wss://[2001:db8::1]:443/s"),
        ("https://user:pass@voice.example.com:8443/s", "wss://voice.example.com:8443/s"),
        ("https://user:pass@voice.example.com:8443/s", "wss://user:pass@voice.example.com/s"),
        ("https://voice.example.com/s?b=2&a=%2B1+", "wss://voice.example.com/s?b=2&a=%2B1+"),
        ("https://voice.example.com/s?b=2&a=%2B1+", "wss://voice.example.com/s/?b=2&a=%2B1+"),
        ("https://voice.example.com/s?b=2&a=%2B1+", "wss://voice.example.com/sa+1 b2"),
        ("https://voice.example.com/%C3%BC?a=%C3%BC", "wss://voice.example.com/%C3%BC?a=%C3%BC"),
        ("https://voice.example.com/ü", "wss://voice.example.com/ü"),
    ],
)
def test_upgrades_are_signed_as_wss_in_several_forms(url: str, signed: str) -> None:
    assert accepted(request("GET", url, by_library(signed), UPGRADE))
    assert accepted(request("GET", url, by_library(signed), {"upgrade": "WebSocket"}))
    assert not accepted(request("GET", url, by_library(signed)))


@pytest.mark.parametrize("scheme", ["https", "http", "ws"])
def test_other_schemes_sign_no_upgrade(scheme: str) -> None:
    """A captured webhook is no key to the stream, and the reverse."""
    assert not accepted(request("GET", STREAM, by_library(STREAM.replace("https", scheme)), UPGRADE))


@pytest.mark.parametrize(
    ("url", "signed", "fits"),
    [
        ("https://h.example/a", "https://h.example:443/a", True),
        ("https://h.example:8443/a", "https://h.example/a", True),
        ("http://h.example/a", "http://h.example:80/a", True),
        ("http://h.example:8080/a", "http://h.example:8080/a", True),
        ("https://u:p@h.example:8443/a", "https://h.example/a", True),
        ("https://u:p@h.example:8443/a", "https://h.example:8443/a", True),
        ("https://[2001:db8::1]:8443/a", "https://[2001:db8::1]/a", True),
        ("https://[2001:db8::1]/a", "https://[2001:db8::1]:443/a", True),
        ("https://h.example/a", "https://h.example/a/", False),
        ("https://h.example/a", "http://h.example/a", False),
        ("https://h.example:8443/a", "https://h.example:8444/a", False),
        ("https://h.example/a?x=%27", "https://h.example/a?x='", False),
        ("https://h.example/a?x=1&y=2", "https://h.example/a?y=2&x=1", False),
        ("https://h.example/a?", "https://h.example/a?", True),
        ("https://h.example", "https://h.example", True),
    ],
)
def test_webhooks_are_signed_with_or_without_port_and_userinfo(url: str, signed: str, fits: bool) -> None:
    assert accepted(form(url, by_library(signed, CALL), CALL)) is fits


def test_a_refusal_names_the_forms_and_no_secret() -> None:
    """For the operator's log: no query values, no credentials, no token of the path, and nothing that is not printable."""
    token = "eyJhbGciOiJIUzI1NiJ9.c2VjcmV0.c2VjcmV0LXNpZ25hdHVyZQ"
    url = f"https://user:hunter2@voice.example.com:8443/twilio/stream/{token}?pin=hunter2&x=\x1b"
    tried = refused(request("GET", url, "x" * 28, UPGRADE)).tried
    assert tried[0] == "wss://…@voice.example.com:8443/twilio/stream/…?pin=…&x=…"
    assert "wss://voice.example.com/twilio/stream/…/?pin=…&x=…" in tried
    assert not any(word in "".join(tried) for word in ("hunter2", token, "\x1b", TOKEN))
    assert refused(form(MYAPP, "", CALL)).tried == (
        "https://mycompany.com/myapp.php?foo=…&bar=…",
        "https://mycompany.com:443/myapp.php?foo=…&bar=…",
    )


@pytest.mark.parametrize(
    ("headers", "secrets", "why"),
    [
        ({}, {}, "no auth token gives this signature"),
        ({"x-twilio-signature": ""}, {}, "there is no x-twilio-signature header"),
        ({}, {"auth_token": None, "signing_key": "k"}, "signed with an auth token, and none is configured"),
        (SHA256, {}, "signed with a signing key, and none is configured"),
        (SHA256, {"signing_key": "k"}, "no signing key gives this signature"),
        (
            {"x-twilio-webhooks-signature-settings": "algorithm=NONE"},
            {"signing_key": "k"},
            "signed by an algorithm that is neither HMAC_SHA1 nor HMAC_SHA256",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong(headers: dict[str, str], secrets: dict[str, str], why: str) -> None:
    assert why == str(refused(request("GET", STREAM, "x" * 28, UPGRADE | headers), **secrets))
    assert "there is no x-twilio-signature header" == str(refused(SignedRequest("GET", STREAM, UPGRADE)))


def test_the_form_that_was_signed_is_told_and_the_signature_is_the_requests_identity() -> None:
    provider = Provider(Settings(auth_token=TOKEN))
    signature = by_library("wss://voice.example.com:443/twilio/stream/k3")
    signed = request("GET", STREAM, signature, UPGRADE)
    assert "wss://voice.example.com:443/twilio/stream/k3" == provider.authenticate(signed)
    assert Identity(signature, nonce=False) == provider.identity(signed)


# --- which secret ------------------------------------------------------------------------------------------------------------


def test_any_token_of_a_rotation_will_do() -> None:
    for token in ("new", "old"):
        signed = form(MYAPP, by_library(MYAPP, CALL, token), CALL)
        assert accepted(signed, ["new", "old"])
        assert accepted(signed, ["old", "new"])
        assert not accepted(signed, ["other"])


def test_signing_keys_sign_by_the_algorithm_that_the_header_names() -> None:
    """The library leaves the choice of the secret to its caller: with the header the signing key, without it the auth token."""
    both: dict[str, Any] = {"auth_token": TOKEN, "signing_key": ["older", "k"]}
    strong, weak = (by_library(MYAPP, CALL, "k", algorithm) for algorithm in ("HMAC_SHA256", "HMAC_SHA1"))
    settings = "x-twilio-webhooks-signature-settings"
    assert accepted(form(MYAPP, strong, CALL, **SHA256), **both)
    assert accepted(form(MYAPP, strong, CALL, **SHA256), auth_token=None, signing_key="k")
    assert accepted(form(MYAPP, strong, CALL, **{settings: " algorithm = hmac_sha256 ,key=x"}), **both)
    assert accepted(form(MYAPP, weak, CALL, **{settings: "key=x,algorithm=HMAC_SHA1"}), **both)
    assert not accepted(form(MYAPP, weak, CALL, **SHA256), **both)
    assert not accepted(form(MYAPP, strong, CALL), **both)
    assert not accepted(form(MYAPP, strong, CALL, **{settings: "algorithm=HMAC_SHA512"}), **both)
    assert not accepted(form(MYAPP, by_library(MYAPP, CALL, TOKEN, "HMAC_SHA256"), CALL, **SHA256), **both)
    assert accepted(form(MYAPP, by_library(MYAPP, CALL), CALL), **both)
    assert accepted(form(MYAPP, by_library(MYAPP, CALL), CALL, **{settings: "key=x"}), **both)
    assert not accepted(form(MYAPP, by_library(MYAPP, CALL), CALL, **SHA256), **both)
    wss = by_library(STREAM.replace("https", "wss"), None, "k", "HMAC_SHA256")
    assert accepted(request("GET", STREAM, wss, UPGRADE | SHA256), **both)


@pytest.mark.parametrize("signing_key", [None, ["k1", "k2"]])
@pytest.mark.parametrize("headers", [{}, SHA256, {"x-twilio-webhooks-signature-settings": "algorithm=?"}])
@pytest.mark.parametrize("sample", ["form", "upgrade"])
def test_every_signature_costs_the_same(
    monkeypatch: pytest.MonkeyPatch, sample: str, headers: dict[str, str], signing_key: list[str] | None
) -> None:
    """As many HMACs over as many bytes and as many comparisons for a right signature as for a missing, short, long, wrong one."""
    work: list[tuple[str, int]] = []
    sign, equal = _signature.sign, _signature.equal
    monkeypatch.setattr(_signature, "sign", lambda *args: (work.append(("sign", len(args[1]))), sign(*args))[1])
    monkeypatch.setattr(_signature, "equal", lambda *args: (work.append(("equal", len(args[1]))), equal(*args))[1])
    right = by_library(STREAM.replace("https", "wss")) if sample == "upgrade" else by_library(MYAPP, CALL)
    seen = set()
    for signature in (right, "", right[:5], right + "x" * 5000, "x" * 28, "é", right[:-1] + "!"):
        work.clear()
        body = urlencode(CALL).encode()
        signed = (
            request("GET", STREAM, signature, UPGRADE | headers)
            if sample == "upgrade"
            else request("POST", MYAPP, signature, FORM | headers, body)
        )
        accepted(signed, ["other", TOKEN], signing_key)
        seen.add(tuple(work))
    assert len(seen) == 1
    assert len(work) == 2 * 2 * (4 if sample == "upgrade" else 2) * (2 + len(signing_key or ()))


# --- every bit ---------------------------------------------------------------------------------------------------------------


def flips(data: bytes) -> Iterator[bytes]:
    for index in range(len(data)):
        for bit in range(8):
            yield data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]


BODY = b"CallSid=CA1&Empty=&From=%2B15550100001&Name=Zo%C3%AB+%F0%9F%98%80&To=sip%3Aa%40b.example"
SAMPLES = {
    "form": ("POST", MYAPP, dict(parse_qsl(BODY.decode(), keep_blank_values=True)), FORM, BODY),
    "get": ("GET", "https://voice.example.com/twilio/answer?CallSid=CA1&From=%2B1", {}, {}, b""),
    "json": ("POST", f"{MYAPP}&bodySHA256={hashlib.sha256(b'[1]').hexdigest()}", {}, JSON, b"[1]"),
    "upgrade": ("GET", "https://voice.example.com/twilio/stream/k3?a=1", {}, UPGRADE, b""),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_flipped_bit_is_refused(sample: str) -> None:
    """Of the signature, of the URL, of the body; only a body that means the same to the letter (`%2b`) is the same."""
    method, url, params, headers, body = SAMPLES[sample]
    signature = by_library(url.replace("https", "wss") if sample == "upgrade" else url, params)
    provider = Provider(Settings(auth_token=["rotated", TOKEN]))

    def passes(signature: str = signature, url: str = url, body: bytes = body) -> bool:
        try:
            provider.authenticate(SignedRequest(method, url, headers | {"x-twilio-signature": signature}, body))
        except SignatureMismatch:
            return False
        return True

    assert passes()
    assert not any(passes(signature=flipped.decode("latin-1")) for flipped in flips(signature.encode()))
    assert not any(passes(url=flipped.decode("latin-1")) for flipped in flips(url.encode()))
    same = [flipped for flipped in flips(body) if passes(body=flipped)]
    assert all(flipped.lower() == body.lower() and sorted(decoded(flipped)) == sorted(decoded(body)) for flipped in same)
    assert len(same) == (sum(char.isalpha() for char in "2BC3ABF09F98803A40") if sample == "form" else 0)


def decoded(body: bytes) -> list[tuple[bytes, bytes]]:
    split = (pair.partition(b"=") for pair in body.replace(b"+", b" ").split(b"&"))
    return [(unquote_to_bytes(name), unquote_to_bytes(value)) for name, _, value in split]


# --- the library as an oracle ------------------------------------------------------------------------------------------------

CHARACTERS = "aZ09 _-.~!*'();:@&=+$,/?%[]{}|\\^`\"<>\t\r\n\0é名\U0001f600\u0301\x7f"
IN_URL = "aZ09_-.~!*'():@&=+$,/%[]|{}é"  # no semicolon: the library loses one at the end of a path


def text(rng: random.Random, characters: str, most: int, least: int = 0) -> str:
    return "".join(rng.choices(characters, k=rng.randint(least, most)))


def encoded(rng: random.Random, text: str) -> str:
    """A form's spelling of `text`: as browsers, as URLs, or every byte escaped in either case."""
    match rng.randrange(4):
        case 0:
            return quote(text, safe="")
        case 1:
            return "".join(f"%{byte:02x}" for byte in text.encode())
        case _:
            return quote_plus(text)


def case(rng: random.Random) -> tuple[SignedRequest, bool, bool]:
    """A request, most often with something wrong; what we say to it, and what the library says."""
    secret, algorithm = rng.choice(["12345", "sécret", "k" * 32]), rng.choice([None, None, "HMAC_SHA256", "HMAC_SHA1"])
    scheme = rng.choice(["https", "https", "http"])
    host = rng.choice(["voice.example.com", "h", "10.0.0.1", "VOICE.example.com"])
    port = rng.choice(["", "", "", ":443", ":80", ":8443"])
    path = rng.choice(["", "/", "/twilio/answer", "/" + text(rng, IN_URL, 12)])
    query = rng.choice(["", "", "?a=1&b=2", "?" + text(rng, IN_URL + "?", 12, 1)])
    headers: dict[str, str] = {}
    params: Any = Multi()
    body = b""
    method = rng.choice(["POST", "POST", "GET"])
    if method == "POST" and rng.random() < 0.2:
        document = text(rng, CHARACTERS, 30, 1)
        body, told = document.encode(), document.encode()
        if rng.random() < 0.3:
            told += b" "
        if rng.random() < 0.8:
            query += ("&" if query else "?") + f"bodySHA256={hashlib.sha256(told).hexdigest()}"
        headers, params = JSON, document
    elif method == "POST":
        for _ in range(rng.randint(0, 6)):
            name = rng.choice(["CallSid", "From", "To", "callsid", text(rng, CHARACTERS, 6)])
            params.setdefault(name, []).append(text(rng, CHARACTERS, 8))
        pairs = [(name, value) for name, values in params.items() for value in values]
        rng.shuffle(pairs)
        headers, body = FORM, "&".join(f"{encoded(rng, name)}={encoded(rng, value)}" for name, value in pairs).encode()
    url = f"{scheme}://{host}{port}{path}{query}"
    signed_port = rng.choice([port, port, port, "", ":443", ":80"])
    signed_url, signed_params = f"{scheme}://{host}{signed_port}{path}{query}", {} if isinstance(params, str) else Multi(params)
    signed_secret = secret
    match rng.randrange(8):
        case 0:
            signed_secret += rng.choice("x ")
        case 1 if signed_params:
            name = rng.choice([*signed_params])
            signed_params[name] = [value + " " for value in signed_params[name]]
        case 2:
            signed_url += rng.choice(["/", "x", "&", "%20"])
        case _:
            pass
    signature = by_library(signed_url, signed_params, signed_secret, algorithm)
    match rng.randrange(12):
        case 0:
            at = rng.randrange(len(signature))
            signature = signature[:at] + chr(ord(signature[at]) ^ 1 << rng.randrange(7)) + signature[at + 1 :]
        case 1:
            signature = rng.choice(["", signature[:-1], signature + "=", signature.lower(), f" {signature}", signature * 2])
        case _:
            pass
    if algorithm is not None:
        headers = headers | {"x-twilio-webhooks-signature-settings": f"key=webhooks_sharedkey_1,algorithm={algorithm}"}
    if isinstance(params, str) and "bodySHA256=" not in url:
        verdict = False  # the library raises: the page says to refuse
    else:
        settings = get_signature_algorithm(headers.get("x-twilio-webhooks-signature-settings"))
        verdict = bool(RequestValidator(secret).validate(url, params, signature, settings))
    signed = request(method, url, signature, headers, body)
    secrets: dict[str, Any] = {"auth_token": secret} if algorithm is None else {"signing_key": secret}
    try:
        Provider(Settings(**secrets)).authenticate(signed)
    except SignatureMismatch:
        return signed, False, verdict
    return signed, True, verdict


def upgrade_case(rng: random.Random) -> tuple[SignedRequest, bool, bool]:
    """The same for an upgrade; signed with or without its port, where the library is right about wss."""
    host = rng.choice(["voice.example.com", "h", "10.0.0.1"])
    port, path = rng.choice(["", ":443", ":8443"]), rng.choice(["", "/", "/s/k3", "/" + text(rng, IN_URL, 12)])
    query = rng.choice(["", "", "?a=1&b=2", "?" + text(rng, IN_URL + "?", 12, 1)])
    wrong = rng.choice(["", "", "x", "&"]) if query else rng.choice(["", "", "x", "?"])
    signature = by_library(f"wss://{host}{rng.choice([port, ''])}{path}{query}{wrong}", None, rng.choice([TOKEN, TOKEN, "x"]))
    if rng.random() < 0.1:
        signature = rng.choice(["", signature[:-1], signature.swapcase()])
    signed = request("GET", f"https://{host}{port}{path}{query}", signature, UPGRADE)
    theirs = bool(RequestValidator(TOKEN).validate(f"wss://{host}{port}{path}{query}", {}, signature))
    return signed, accepted(signed), theirs


def agree(cases: int, seed: int) -> None:
    rng = random.Random(seed)
    right = 0
    for _ in range(cases):
        signed, ours, theirs = (upgrade_case if rng.random() < 0.1 else case)(rng)
        assert ours == theirs, signed
        right += theirs
    assert 0.2 < right / cases < 0.8  # both answers are common


def test_the_official_library_agrees() -> None:
    agree(400, 1)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_official_library_agrees_100_000_times() -> None:
    agree(100_000, 2)


def test_the_double_of_the_tests_signs_the_same() -> None:
    """A third implementation, which knows neither ours nor the library."""
    assert accepted(form(MYAPP, doubled(TOKEN, MYAPP, CALL), CALL))
    assert accepted(request("GET", STREAM, doubled(TOKEN, STREAM.replace("https", "wss")), UPGRADE))


def test_our_own_signing_is_the_librarys() -> None:
    """What the simulator sends: https without port, http with it, an upgrade as wss."""
    provider, keyed = Provider(Settings(auth_token=[TOKEN, "older"])), Provider(Settings(signing_key=["k", "older"]))
    body = urlencode(CALL).encode()
    for url, signed in (
        (MYAPP, MYAPP),
        ("https://u:p@h.example:8443/a", "https://h.example/a"),
        ("http://h.example:8080/a", "http://h.example:8080/a"),
    ):
        unsigned = SignedRequest.read("POST", url, FORM, body)
        assert provider.sign(unsigned) == {"x-twilio-signature": by_library(signed, CALL)}
        strong = {"x-twilio-signature": by_library(signed, CALL, "k", "HMAC_SHA256")}
        assert keyed.sign(unsigned) == strong | {"x-twilio-webhooks-signature-settings": "algorithm=HMAC_SHA256"}
    upgrade = SignedRequest("GET", "http://127.0.0.1:8080/s", UPGRADE)
    assert provider.sign(upgrade) == {"x-twilio-signature": by_library("wss://127.0.0.1:8080/s")}
    assert provider.sign(SignedRequest("GET", "no-url")) == {"x-twilio-signature": by_library("no-url")}
    told = f"{MYAPP}&bodySHA256={hashlib.sha256(b'[]').hexdigest()}"
    assert provider.sign(SignedRequest("POST", told, JSON, b"[]")) == {"x-twilio-signature": by_library(told)}
