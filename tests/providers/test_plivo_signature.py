"""Plivo's signatures against the official library, wherever that is right, and against every bit that may be wrong.

The library fails on a percent-encoded non-ASCII value of the query, on any URL but http and https, and treats a GET with
parameters of its own as if the query had overridden them; it takes any nonce, and no white space after a comma.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, urlencode

import pytest
from plivo.utils import validate_signature, validate_v3_signature

from gateway.errors import SignatureMismatch
from gateway.provider import Identity, SignedRequest
from providers import _signature
from providers.plivo_audio_streaming import Provider, Settings
from tests.doubles.plivo import signature_v3

NONCE = "05429567804466091622"
TOKEN = "MDEyMzQ1Njc4OWFiY2RlZg"
ANSWER = "https://voice.example.com/plivo/answer"
STREAM = "https://voice.example.com/plivo/stream/k3"
FORM = {"content-type": "application/x-www-form-urlencoded"}
UPGRADE = {"upgrade": "websocket", "connection": "Upgrade"}
CALL = {"CallUUID": "4vbc", "CallStatus": "ringing", "From": "15551111111", "To": "sip:bot@phone.example.com", "Empty": ""}


def hmac_of(signed: str, token: str = TOKEN) -> str:
    """What the page says, over a text written out by hand."""
    return base64.b64encode(hmac.new(token.encode(), signed.encode(), hashlib.sha256).digest()).decode()


def request(
    method: str, url: str, signature: str, body: bytes = b"", nonce: str = NONCE, name: str = "V3", **headers: str
) -> SignedRequest:
    signed = {f"X-Plivo-Signature-{name}": signature, f"X-Plivo-Signature-{name.removeprefix('Ma-')}-Nonce": nonce}
    return SignedRequest.read(method, url, signed | headers, body)


def accepted(signed: SignedRequest, auth_token: Any = TOKEN, accept_v2: bool = False) -> bool:
    try:
        Provider(Settings(auth_token=auth_token, accept_v2=accept_v2)).authenticate(signed)
    except SignatureMismatch:
        return False
    return True


def refused(signed: SignedRequest, accept_v2: bool = False) -> SignatureMismatch:
    with pytest.raises(SignatureMismatch) as refusal:
        Provider(Settings(auth_token=TOKEN, accept_v2=accept_v2)).authenticate(signed)
    return refusal.value


# --- what is signed, written out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "url", "body", "signed"),
    [
        (
            "POST",
            "https://example.com/abcd?foo=bar",
            "Digits=1234&From=%2B15551111111&To=%2B15555555555&CallUuid=4vbc",
            "https://example.com/abcd?foo=bar.CallUuid4vbcDigits1234From+15551111111To+15555555555",
        ),
        ("GET", "https://example.com/abcd", "", "https://example.com/abcd"),
        ("GET", "https://example.com", "", "https://example.com"),
        ("GET", "https://example.com/", "", "https://example.com/"),
        ("GET", "https://example.com/abcd?", "", "https://example.com/abcd"),
        ("GET", "https://example.com/abcd#top", "", "https://example.com/abcd"),
        ("GET", "https://example.com/abcd?b=2&a=%2B1+x&B=&a=%20", "", "https://example.com/abcd?B=&a= &a=+1 x&b=2"),
        ("GET", "https://example.com/abcd?foo=bar#ct=2000&rt=5000", "", "https://example.com/abcd?foo=bar"),
        ("GET", "https://example.com:8443/abcd", "", "https://example.com:8443/abcd"),
        ("GET", "https://[2001:db8::1]:8443/abcd", "", "https://[2001:db8::1]:8443/abcd"),
        ("GET", "https://user:pass@example.com/abcd", "", "https://user:pass@example.com/abcd"),
        ("GET", "https://example.com/%C3%BC", "", "https://example.com/%C3%BC"),
        ("GET", "https://example.com/a?n=%C3%A9", "", "https://example.com/a?n=é"),
        ("POST", "https://example.com/abcd", "", "https://example.com/abcd"),
        ("POST", "https://example.com/abcd?foo=bar", "", "https://example.com/abcd?foo=bar"),
        ("POST", "https://example.com/abcd", "a=1", "https://example.com/abcd?a1"),
        ("POST", "https://example.com/abcd", "a=2&a=1&a=2&b=", "https://example.com/abcd?a1a2a2b"),
        (
            "POST",
            "https://example.com/abcd?x=1&x=0",
            "CallUUID=u&CallStatus=s",
            "https://example.com/abcd?x=0&x=1.CallStatussCallUUIDu",
        ),
        ("POST", "https://example.com/abcd", "n=Zo%C3%AB+%F0%9F%98%80&%26=%3D", "https://example.com/abcd?&=nZoë 😀"),
        ("POST", "https://example.com/abcd", "n= a ", "https://example.com/abcd?n a "),
    ],
)
def test_the_signed_text_of_v3(method: str, url: str, body: str, signed: str) -> None:
    """And it is the signature, whatever the Content-Type; one character more, less or elsewhere is another text."""
    for name in ("V3", "Ma-V3"):
        assert accepted(request(method, url, hmac_of(f"{signed}.{NONCE}"), body.encode(), name=name))
    for wrong in (f"{signed}{NONCE}", f"{signed}..{NONCE}", f"{signed}?.{NONCE}", f"{signed} .{NONCE}", f"GET{signed}{NONCE}"):
        assert not accepted(request(method, url, hmac_of(wrong), body.encode()))
    assert not accepted(request(method, url, hmac_of(f"{signed}.{NONCE}"), body.encode() + b"&z="))
    assert not accepted(request(method, url.replace("://", "://x"), hmac_of(f"{signed}.{NONCE}"), body.encode()))


@pytest.mark.parametrize("scheme", ["http", "https", "wss"])
@pytest.mark.parametrize("dialled", ["https", "http", "wss", "ws"])
@pytest.mark.parametrize("rest", ["://voice.example.com/plivo/stream/k3", "://127.0.0.1:8443/s", "://voice.example.com"])
def test_upgrades_are_signed_in_three_schemes(scheme: str, dialled: str, rest: str) -> None:
    for query, told in (("", ""), ("?v=1&t=%2B", "?t=+&v=1")):
        signature = hmac_of(f"{scheme}{rest}{told}.{NONCE}")
        signed = request("GET", f"{dialled}{rest}{query}", signature, Upgrade="websocket")
        assert accepted(signed)
        assert accepted(request("GET", f"{dialled}{rest}{query}", signature)) is (scheme == dialled)
        assert not accepted(request("GET", f"{dialled}{rest}{query}", hmac_of(f"ws{rest}{told}.{NONCE}"), Upgrade="websocket"))


def test_other_methods_and_bodies_of_a_get_are_refused() -> None:
    signature = hmac_of(f"{ANSWER}?a=1.{NONCE}")
    assert accepted(request("GET", f"{ANSWER}?a=1", signature))
    for method in ("get", "HEAD", "PUT", ""):
        assert not accepted(request(method, f"{ANSWER}?a=1", signature))
    assert not accepted(request("GET", f"{ANSWER}?a=1", signature, b"CallUUID=evil"))
    assert not accepted(request("POST", f"{ANSWER}?a=1", signature, b"&"))


def test_the_border_between_text_and_nonce_can_not_be_moved() -> None:
    """Else the end of the last value, cut off at a dot, would become a part of the nonce, and the signature still be right."""
    signature = hmac_of(f"{ANSWER}?Tosip:bot@phone.example.com.{NONCE}")
    assert accepted(request("POST", ANSWER, signature, b"To=sip:bot@phone.example.com"))
    assert not accepted(request("POST", ANSWER, signature, b"To=sip:bot@phone.example", nonce=f"com.{NONCE}"))
    v2 = hmac_of(f"{ANSWER}{NONCE}")
    assert accepted(request("POST", ANSWER, v2, name="V2"), accept_v2=True)
    shorter = "https://voice.example.com/plivo"
    assert not accepted(request("POST", shorter, v2, name="V2", nonce=f"/answer{NONCE}"), accept_v2=True)


@pytest.mark.parametrize("nonce", ["", " ", "a b", "a.b", "1\n", "é", "1" * 257, "\ud800"])
def test_odd_nonces_are_refused(nonce: str) -> None:
    signed = f"{ANSWER}.{nonce}".encode("utf-8", "surrogatepass")
    signature = base64.b64encode(hmac.new(TOKEN.encode(), signed, hashlib.sha256).digest()).decode()
    assert not accepted(request("GET", ANSWER, signature, nonce=nonce))


# --- several signatures, several tokens --------------------------------------------------------------------------------------


def test_any_signature_of_a_list_will_do() -> None:
    right, wrong = hmac_of(f"{ANSWER}.{NONCE}"), hmac_of("else")
    for listed in (
        f"{right},{wrong}",
        f"{wrong},{right}",
        f"{wrong}, {right} ,x",
        f",{right}",
        f"{wrong},{wrong},{wrong},{right}",
    ):
        assert accepted(request("GET", ANSWER, listed))
        assert accepted(request("GET", ANSWER, listed, name="Ma-V3"))
        assert accepted(request("GET", ANSWER, wrong, **{"X-Plivo-Signature-Ma-V3": listed}))
    for listed in ("", ",", wrong, f"{wrong},{wrong}", f"{right};{wrong}", right[:-1], f"{right}=", f"{right} {wrong}"):
        assert not accepted(request("GET", ANSWER, listed))
    for others, fits in ((31, True), (32, False), (10_000, False)):  # no carrier has as many tokens
        assert accepted(request("GET", ANSWER, "x," * others + right)) is fits


def test_more_than_1000_fields_are_nobodys() -> None:
    """Neither sorted nor signed, and not taken for none."""
    for size, fits in ((1000, True), (1001, False)):
        names = sorted(f"k{index}" for index in range(size))
        form = "&".join(f"{name}=v" for name in names)
        assert accepted(request("GET", f"{ANSWER}?{form}", hmac_of(f"{ANSWER}?{form}.{NONCE}"))) is fits
        told = "".join(f"{name}v" for name in names)
        assert accepted(request("POST", ANSWER, hmac_of(f"{ANSWER}?{told}.{NONCE}"), form.encode())) is fits
    assert not accepted(request("GET", f"{ANSWER}?{form}", hmac_of(f"{ANSWER}.{NONCE}")))
    assert not accepted(request("POST", ANSWER, hmac_of(f"{ANSWER}.{NONCE}"), form.encode()))


def test_any_token_of_a_rotation_will_do() -> None:
    for token in ("new", "old"):
        signed = request("GET", ANSWER, hmac_of(f"{ANSWER}.{NONCE}", token))
        assert accepted(signed, ["new", "old"])
        assert accepted(signed, ["old", "new"])
        assert not accepted(signed, ["other"])


def test_v2_is_accepted_on_request_only() -> None:
    """It covers neither query nor body, as its test shows."""
    signature = hmac_of(f"{ANSWER}{NONCE}")
    for name in ("V2", "Ma-V2"):
        signed = request("POST", f"{ANSWER}?a=1", signature, b"CallUUID=any", name=name)
        assert accepted(signed, accept_v2=True)
        assert not accepted(signed)
    assert not accepted(request("POST", ANSWER + "/", signature, name="V2"), accept_v2=True)
    assert not accepted(request("POST", ANSWER, signature, name="V3"), accept_v2=True)
    upgrade = request("GET", STREAM, hmac_of(f"http{STREAM.removeprefix('https')}{NONCE}"), name="V2", Upgrade="websocket")
    assert accepted(upgrade, accept_v2=True)
    assert not accepted(upgrade)


def test_the_form_that_was_signed_is_told() -> None:
    signer = Provider(Settings(auth_token=TOKEN))
    assert "https://voice.example.com/plivo/stream/x" == signer.authenticate(
        request("GET", "https://voice.example.com/plivo/stream/x", hmac_of(f"https://voice.example.com/plivo/stream/x.{NONCE}"))
    )
    for scheme in ("http", "wss"):
        url = "wss://voice.example.com/plivo/stream/x"
        signed = f"{scheme}://voice.example.com/plivo/stream/x"
        assert signed == signer.authenticate(request("GET", url, hmac_of(f"{signed}.{NONCE}"), Upgrade="websocket"))


def test_a_request_is_known_by_the_nonce_of_the_signature_that_is_right() -> None:
    """A nonce beside it is anybody's word."""
    v3, v2 = hmac_of(f"{ANSWER}.{NONCE}"), hmac_of(f"{ANSWER}{NONCE}")
    only_v2 = request("GET", ANSWER, v2, name="V2")
    disguised = SignedRequest(
        "GET", ANSWER, dict(only_v2.headers) | {"x-plivo-signature-v3-nonce": "7", "x-plivo-signature-v3": v3}
    )
    for accept_v2, signed, version in ((False, request("GET", ANSWER, v3), "v3"), (True, request("GET", ANSWER, v3), "v3"),
                                       (True, only_v2, "v2"), (True, disguised, "v2")):  # fmt: skip
        provider = Provider(Settings(auth_token=TOKEN, accept_v2=accept_v2))
        provider.authenticate(signed)
        assert Identity(f"{version} {NONCE}", nonce=True) == provider.identity(signed)


def test_a_refusal_names_the_forms_and_what_is_wrong() -> None:
    token = "k3" * 20
    url = f"https://user:hunter2@voice.example.com/plivo/stream/{token}?pin=hunter2"
    refusal = refused(request("GET", url, hmac_of("else"), Upgrade="websocket"))
    assert refusal.tried == tuple(f"{scheme}://…@voice.example.com/plivo/stream/…" for scheme in ("http", "https", "wss"))
    assert str(refusal) == "no auth token gives this signature"
    for accept_v2 in (False, True):
        assert str(refused(SignedRequest("GET", ANSWER), accept_v2)) == "there is no x-plivo-signature-v3 header"
    v2 = request("GET", ANSWER, "x", name="V2")
    assert str(refused(v2)) == "there is no x-plivo-signature-v3 header, only V2, which `accept_v2: true` would admit"
    assert str(refused(v2, accept_v2=True)) == "no auth token gives this signature"
    unfinished = SignedRequest("GET", ANSWER, {"x-plivo-signature-v3": "x"})
    assert str(refused(unfinished)) == "there is no x-plivo-signature-v3-nonce header"


@pytest.mark.parametrize("accept_v2", [False, True])
@pytest.mark.parametrize("sample", ["webhook", "upgrade"])
def test_every_signature_costs_the_same(monkeypatch: pytest.MonkeyPatch, sample: str, accept_v2: bool) -> None:
    """As many HMACs over as many bytes and as many comparisons for a right signature as for a missing, short, long, wrong one."""
    work: list[tuple[str, int]] = []
    sign, equal = _signature.sign, _signature.equal
    monkeypatch.setattr(_signature, "sign", lambda *args: (work.append(("sign", len(args[1]))), sign(*args))[1])
    monkeypatch.setattr(_signature, "equal", lambda *args: (work.append(("equal", len(args[1]))), equal(*args))[1])
    body = b"" if sample == "upgrade" else urlencode(CALL).encode()
    told = "".join(name + value for name, value in sorted(CALL.items()))
    right = hmac_of(f"http{STREAM[5:]}.{NONCE}" if sample == "upgrade" else f"{STREAM}?{told}.{NONCE}")
    seen = set()
    headers = UPGRADE if sample == "upgrade" else FORM
    for signature in (right, "", right[:5], right + "x" * 5000, "x" * 44, "é"):
        work.clear()
        signed = request("GET" if sample == "upgrade" else "POST", STREAM, signature, body, **headers)
        assert accepted(signed, ["other", TOKEN], accept_v2) is (signature == right)
        seen.add(tuple(work))
    assert len(seen) == 1


# --- every bit ---------------------------------------------------------------------------------------------------------------


def flips(data: bytes) -> Iterator[bytes]:
    for index in range(len(data)):
        for bit in range(8):
            yield data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]


BODY = b"CallUUID=4vbc&Empty=&From=%2B1555&Name=Zo%C3%AB+%F0%9F%98%80&To=sip%3Aa%40b.example"
SAMPLES = {
    "post": ("POST", ANSWER, {}, BODY, f"{ANSWER}?CallUUID4vbcEmptyFrom+1555NameZoë 😀Tosip:a@b.example"),
    "post with query": ("POST", f"{ANSWER}?b=%2B2&a=1", {}, b"a=1&b=2", f"{ANSWER}?a=1&b=+2.a1b2"),
    "get": ("GET", f"{ANSWER}?CallUUID=4vbc&From=1", {}, b"", f"{ANSWER}?CallUUID=4vbc&From=1"),
    "upgrade": ("GET", f"{STREAM}?a=1", UPGRADE, b"", f"http{STREAM[5:]}?a=1"),
}


def meaning(url: str, body: bytes) -> Any:
    base, _, query = url.partition("#")[0].partition("?")
    return base, *(sorted(parse_qsl(each, keep_blank_values=True)) for each in (query, body.decode("latin-1")))


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_flipped_bit_is_refused(sample: str) -> None:
    """Of the signature, the nonce, the URL, the body; only what means the same to the letter (`%2b`) is the same."""
    method, url, headers, body, signed = SAMPLES[sample]
    signature = hmac_of(f"{signed}.{NONCE}")
    provider = Provider(Settings(auth_token=["rotated", TOKEN]))

    def passes(signature: str = signature, nonce: str = NONCE, url: str = url, body: bytes = body) -> bool:
        given = {"x-plivo-signature-v3": signature, "x-plivo-signature-v3-nonce": nonce}
        try:
            provider.authenticate(SignedRequest(method, url, headers | given, body))
        except SignatureMismatch:
            return False
        return True

    assert passes()
    assert passes(signature=f"{hmac_of('else')},{signature}")
    assert not any(passes(signature=flipped.decode("latin-1")) for flipped in flips(signature.encode()))
    assert not any(passes(signature=f"{hmac_of('else')},{flipped.decode('latin-1')}") for flipped in flips(signature.encode()))
    assert not any(passes(nonce=flipped.decode("latin-1")) for flipped in flips(NONCE.encode()))
    urls = [flipped for each in flips(url.encode()) if passes(url=(flipped := each.decode("latin-1")))]
    assert all(meaning(flipped, body) == meaning(url, body) for flipped in urls)
    assert len(urls) == sum(char.isalpha() for char in "".join(re.findall("%(..)", url.partition("?")[2])))
    bodies = [flipped for flipped in flips(body) if passes(body=flipped)]
    assert all(meaning(url, flipped) == meaning(url, body) for flipped in bodies)
    assert len(bodies) == sum(char.isalpha() for char in "".join(re.findall("%(..)", body.decode())))


# --- the library as an oracle ------------------------------------------------------------------------------------------------

CHARACTERS = "aZ09 _-.~!*'();:@&=+$,/?%[]{}|\\^`\"<>\t\r\n\0é名\U0001f600\u0301\x7f"
ASCII = "".join(filter(str.isascii, CHARACTERS))


def text(rng: random.Random, characters: str, most: int, least: int = 0) -> str:
    return "".join(rng.choices(characters, k=rng.randint(least, most)))


def encoded(rng: random.Random, text: str) -> str:
    match rng.randrange(4):
        case 0:
            return quote(text, safe="")
        case 1:
            return "".join(f"%{byte:02x}" for byte in text.encode())
        case _:
            return quote_plus(text)


def spelled(rng: random.Random, pairs: list[tuple[str, str]]) -> str:
    rng.shuffle(pairs)
    return "&".join(f"{encoded(rng, name)}={encoded(rng, value)}" for name, value in pairs)


def some_pairs(rng: random.Random, characters: str, least: int = 0) -> list[tuple[str, str]]:
    names = ["CallUUID", "From", "To", "calluuid", text(rng, characters, 6, 1)]
    return [(rng.choice(names), text(rng, characters, 8)) for _ in range(rng.randint(least, 6))]


def grouped(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """As a web framework gives them to the library: a string, or where a name is repeated, a list."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def case(rng: random.Random) -> tuple[SignedRequest, bool, bool, bool, bool]:
    """A request, most often with something wrong; what we and the library say to it by V3, then by V2."""
    host = rng.choice(["voice.example.com", "10.0.0.1", "h.example", "VOICE.example.com"]) + rng.choice(["", "", ":8443", ":443"])
    path = rng.choice(["", "/", "/plivo/answer", "/a%20b", "/%C3%BC/x", "/~a'()"])
    query = rng.choice(["", "", "a=1&b=2", spelled(rng, some_pairs(rng, ASCII))])
    base = f"{rng.choice(['https', 'http'])}://{host}{path}"
    url = f"{base}?{query}" if query else base
    nonce, token = text(rng, "0123456789abcXYZ_-", 24, 1), rng.choice([TOKEN, "sécret"])
    method = rng.choice(["POST", "POST", "GET"])
    pairs = some_pairs(rng, CHARACTERS) if method == "POST" else []
    body = spelled(rng, list(pairs))
    # Signed by the page's rules, from its other end: the pairs, not their spelling.
    asked = "&".join(f"{name}={value}" for name, value in sorted(parse_qsl(query, keep_blank_values=True)))
    told = "".join(name + value for name, value in sorted(pairs))
    tail = f"?{asked}" if asked or pairs else ""
    tail += f".{told}" if asked and pairs else told
    wrong = rng.randrange(10)
    tail += rng.choice([".", " ", "x", "?"]) if wrong == 0 else ""
    signature = hmac_of(f"{base}{tail}.{nonce}", token + ("x" if wrong == 1 else ""))
    older = hmac_of(f"{base}{'/' if wrong == 2 else ''}{nonce}", token)
    if wrong in (3, 4):
        at = rng.randrange(len(signature))
        signature, older = (s[:at] + chr(ord(s[at]) ^ 1 << rng.randrange(7)) + s[at + 1 :] for s in (signature, older))
    elif wrong == 5:
        signature = rng.choice(["", signature[:-1], f"{signature}=", signature.lower(), f"{signature};{signature}"])
    elif wrong == 6:
        signature = ",".join(rng.sample([signature, hmac_of("else"), "", "x"], 3))
    elif wrong == 7 and pairs:
        body += "&" + rng.choice(["x=", "From=1", "=x"])
    try:
        v3 = bool(validate_v3_signature(method, url, nonce, token, signature, grouped(parse_qsl(body, keep_blank_values=True))))
    except UnicodeDecodeError:  # the library decodes its query as ASCII
        raise AssertionError(url) from None
    v2 = bool(validate_signature(url, nonce, older, token))
    signed = request(method, url, signature, body.encode(), nonce)
    signed_v2 = request(method, url, older, body.encode(), nonce, name="V2")
    return signed, accepted(signed, token), v3, accepted(signed_v2, token, accept_v2=True), v2


def agree(cases: int, seed: int) -> None:
    rng = random.Random(seed)
    right = 0
    for _ in range(cases):
        signed, ours, theirs, ours_v2, theirs_v2 = case(rng)
        assert (ours, ours_v2) == (theirs, theirs_v2), signed
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
    for query in ("", "?b=2&a=%2B1&a=0&c="):
        assert accepted(request("GET", ANSWER + query, signature_v3(TOKEN, ANSWER + query, NONCE)))


def test_our_own_signing_is_the_librarys() -> None:
    """What the simulator sends: both V3 headers and a nonce, which is new each time; an upgrade as http."""
    provider = Provider(Settings(auth_token=[TOKEN, "older"]))
    unsigned = SignedRequest.read("POST", f"{ANSWER}?b=2&a=1", FORM, urlencode(CALL).encode())
    headers = provider.sign(unsigned)
    nonce = headers["x-plivo-signature-v3-nonce"]
    assert validate_v3_signature("POST", unsigned.url, nonce, TOKEN, headers["x-plivo-signature-v3"], dict(CALL))
    assert headers["x-plivo-signature-ma-v3"] == headers["x-plivo-signature-v3"]
    assert re.fullmatch("[0-9]{20}", nonce)
    assert nonce != provider.sign(unsigned)["x-plivo-signature-v3-nonce"]
    upgrade = SignedRequest("GET", f"{STREAM}?a=1", UPGRADE | {"x-plivo-signature-v3-nonce": NONCE})
    assert provider.sign(upgrade)["x-plivo-signature-v3"] == hmac_of(f"http{STREAM[5:]}?a=1.{NONCE}")
    assert provider.sign(upgrade)["x-plivo-signature-v3-nonce"] == NONCE
