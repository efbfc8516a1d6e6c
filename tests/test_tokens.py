"""Stream tokens: who holds one gets in, for one call, for a minute; whoever changes a bit of it does not."""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import tokens
from gateway.errors import MalformedFrame, RemoteError
from gateway.tokens import (
    LEEWAY_SECS,
    LIFETIME_SECS,
    MAX_CALL_ID_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_ROUTE_BYTES,
    NONCE_BYTES,
    Document,
    Ticket,
    TokenError,
    Tokens,
)

TOKENS = Tokens("correct horse battery staple")
NOW = 1_800_000_000.75
NONCE = bytes(range(NONCE_BYTES))


def mint(provider: str = "twilio", call_id: str = "CA" + "0" * 32, route: str = "support", now: float = NOW) -> str:
    return TOKENS.mint(provider, call_id, route, now=now, nonce=NONCE)


def refusal(token: str, provider: str = "twilio", now: float = NOW, tokens: Tokens = TOKENS) -> str:
    with pytest.raises(TokenError) as caught:
        tokens.read(token, provider, now=now)
    assert str(caught.value) == caught.value.reason  # nothing of the token in it
    return caught.value.reason


def test_any_instance_with_the_secret_reads_what_another_minted() -> None:
    ticket = Tokens("correct horse battery staple").read(mint(), "twilio", now=NOW)

    assert ticket == Ticket("twilio", "CA" + "0" * 32, "support", int(NOW) + LIFETIME_SECS, NONCE)


def test_another_secret_reads_nothing() -> None:
    assert refusal(mint(), tokens=Tokens("correct horse battery stable")) == "forged"


def test_a_token_fits_into_a_path_and_into_what_carriers_allow() -> None:
    token = mint(call_id="c" * 64, route="r" * 32)

    assert re.fullmatch(r"[A-Za-z0-9_-]+", token)
    assert len(token) < 200


@given(st.text(min_size=1, max_size=32), st.text(max_size=8), st.text(max_size=64), st.binary(min_size=16, max_size=16))
def test_whatever_is_minted_is_read(call_id: str, route: str, provider: str, nonce: bytes) -> None:
    token = TOKENS.mint(provider, call_id, route, now=NOW, nonce=nonce)

    assert TOKENS.read(token, provider, now=NOW) == Ticket(provider, call_id, route, int(NOW) + LIFETIME_SECS, nonce)


def test_whatever_it_ends_in_it_is_read_to_its_end() -> None:
    for label in (f"{route}{last}" for route in ("", "r", "rr") for last in map(chr, range(32, 127))):
        assert label == TOKENS.read(mint(route=label), "twilio", now=NOW).route


def test_a_secret_and_a_name_may_be_no_unicode() -> None:
    """The environment has bytes: what is no UTF-8 comes as surrogates."""
    tokens, name = Tokens("caf\udce9"), "\udce9"
    token = tokens.mint(name, "CA1", "r", now=NOW, nonce=NONCE)
    assert name == tokens.read(token, name, now=NOW).provider
    assert "forged" == refusal(token, name, tokens=Tokens("caf\udce8"))
    assert "other_provider" == refusal(token, "\udce8", tokens=tokens)


def test_it_lives_for_a_minute_and_some_leeway() -> None:
    last = int(NOW) + LIFETIME_SECS + LEEWAY_SECS

    assert TOKENS.read(mint(), "twilio", now=last)
    assert refusal(mint(), now=last + 0.001) == "expired"
    assert TOKENS.read(mint(), "twilio", now=NOW - LEEWAY_SECS)  # minted by an instance whose clock is ahead


def test_its_limits_are_those_that_are_written_down() -> None:
    assert (60, 5, 128, 32, 16) == (LIFETIME_SECS, LEEWAY_SECS, MAX_CALL_ID_BYTES, MAX_ROUTE_BYTES, NONCE_BYTES)


def test_it_opens_no_other_provider() -> None:
    assert refusal(mint(), "twilio2") == "other_provider"
    assert refusal(mint(now=0), "plivo") == "other_provider"


def test_two_calls_and_two_nonces_give_two_tokens() -> None:
    other = TOKENS.mint("twilio", "CA1", "support", now=NOW, nonce=bytes(16))

    assert len({mint(), other, mint(call_id="CA1"), mint(now=NOW + 1), mint(route="sales"), mint("plivo")}) == 6


def test_every_flipped_bit_is_refused() -> None:
    token = mint().encode()
    for at in range(len(token)):
        for bit in range(8):
            flipped = bytes(byte ^ (1 << bit) if index == at else byte for index, byte in enumerate(token))
            assert refusal(flipped.decode("latin-1")) in ("forged", "malformed")


def test_every_wrong_mac_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many HMACs over as many bytes and one comparison of as many characters, wherever it is wrong: nothing stops early."""
    work: list[tuple[str, int, int]] = []

    class Recorder:
        """In the place of the module hmac."""

        @staticmethod
        def digest(key: bytes, message: bytes, name: Any) -> bytes:
            work.append(("digest", len(key), len(message)))
            return hmac.digest(key, message, name)

        @staticmethod
        def compare_digest(one: Any, other: Any) -> bool:
            work.append(("compare", len(one), len(other)))
            return hmac.compare_digest(one, other)

    token, seen = mint(), set()
    monkeypatch.setattr(tokens, "hmac", Recorder)
    for at in range(len(token)):
        work.clear()
        assert "forged" == refusal(f"{token[:at]}{'A' if token[at] != 'A' else 'B'}{token[at + 1 :]}")
        seen.add(tuple(work))
    ((digest, compare),) = seen
    assert ("digest", "compare", 22, 22) == (digest[0], *compare)


def test_every_other_spelling_is_refused() -> None:
    token = mint()
    for cut in range(len(token)):
        assert refusal(token[:cut]) in ("forged", "malformed")
    for more in ("A", "=", "==", "\n", " ", "/", "%3D", "A" * 400):
        assert refusal(token + more) in ("forged", "malformed")
    assert refusal(token[22:] + token[:22]) == "forged"
    assert refusal(token.swapcase()) == "forged"


@given(st.text() | st.binary(max_size=300).map(lambda raw: urlsafe_b64encode(raw).decode()) | st.text("Aa0_-", min_size=60))
def test_any_text_raises_token_error_and_nothing_else(text: str) -> None:
    assert refusal(text) in ("forged", "malformed")


@given(st.data())
def test_any_edit_raises_token_error_and_nothing_else(data: st.DataObject) -> None:
    token = mint()
    start = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(start, len(token)))
    edited = token[:start] + data.draw(st.text("AZaz09_-=+/ é") | st.sampled_from(mint("plivo", "x"))) + token[end:]

    if edited != token:
        assert refusal(edited) in ("forged", "malformed")


@given(st.binary(min_size=0, max_size=200))
def test_a_right_mac_over_less_than_a_token_can_not_happen_by_accident(raw: bytes) -> None:
    """Bodies that nobody minted are never parsed: their MAC would have to be right."""
    body = urlsafe_b64encode(raw).rstrip(b"=").decode()

    assert refusal(mint()[:22] + body) in ("forged", "malformed")


@pytest.mark.parametrize("call_id", ["", "x" * (MAX_CALL_ID_BYTES + 1), "é" * 65, "\ud800"])
def test_a_call_id_that_no_carrier_sends_gets_no_token(call_id: str) -> None:
    with pytest.raises(MalformedFrame) as caught:
        mint(call_id=call_id)

    assert caught.value.reason == "bad_call_id"


def test_what_is_as_long_as_it_may_be_gets_one() -> None:
    call_id, route = "x" * MAX_CALL_ID_BYTES, "r" * MAX_ROUTE_BYTES
    ticket = TOKENS.read(mint(call_id=call_id, route=route), "twilio", now=NOW)
    assert (call_id, route) == (ticket.call_id, ticket.route)


def test_tokens_of_version_1_stay_as_they_are() -> None:
    """Instances are renewed one after the other: the new one reads what the old one has written, and the reverse."""
    token = "tZZ3NyB8ae5q1r3Kh61MXQa0nSPDsFBilb2NRRAAECAwQFBgcICQoLDA0ODyJDQTAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwc3VwcG9ydA"
    assert token == mint()
    sealed = "JW8-gxkDJK3P6cvSd-Nj_2tJ0jw7BQYpW9jUUQABAgMEBQYHCAkKCwwNDg_TogXA"
    assert sealed == TOKENS.seal("<a/>", "twilio", now=NOW, nonce=NONCE)


def test_a_label_or_a_nonce_of_the_wrong_length_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="nonce"):
        TOKENS.mint("twilio", "CA1", "r", now=NOW, nonce=b"short")
    with pytest.raises(ValueError, match="label"):
        mint(route="r" * 33)


def test_the_providers_name_and_the_secret_are_not_in_it() -> None:
    raw = urlsafe_b64decode(f"{mint()[22:]}==")

    assert b"CA0000" in raw
    assert b"twilio" not in raw
    assert "correct" not in repr(vars(TOKENS))


def test_a_bad_token_is_the_other_sides_fault() -> None:
    assert issubclass(TokenError, RemoteError)


# --- sealed documents ---


def unsealed(sealed: str, provider: str = "plivo", now: float = NOW, tokens: Tokens = TOKENS) -> str:
    """The text, or the reason why there is none."""
    try:
        return tokens.unseal(sealed, provider, now=now).text
    except TokenError as error:
        return error.reason


@given(st.text(max_size=300), st.text(max_size=64), st.binary(min_size=16, max_size=16))
def test_any_instance_with_the_secret_unseals_what_another_sealed(text: str, provider: str, nonce: bytes) -> None:
    sealed = TOKENS.seal(text, provider, now=NOW, nonce=nonce)

    assert re.fullmatch(r"[A-Za-z0-9_-]{56,1400}", sealed)
    expected = Document(text, int(NOW) + LIFETIME_SECS, nonce)
    assert expected == Tokens("correct horse battery staple").unseal(sealed, provider, now=NOW)
    assert text.encode() not in urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4)) or len(text.encode()) < 3


def test_a_document_is_for_one_provider_for_a_minute_and_of_one_secret() -> None:
    sealed = TOKENS.seal("<Hangup/>", "plivo", now=NOW, nonce=NONCE)
    last = int(NOW) + LIFETIME_SECS + LEEWAY_SECS

    assert "<Hangup/>" == unsealed(sealed, now=last)
    assert "expired" == unsealed(sealed, now=last + 0.001)
    assert "other_provider" == unsealed(sealed, "plivo-2")
    assert "forged" == unsealed(sealed, tokens=Tokens("correct horse battery stable"))
    assert "forged" == unsealed(mint())
    with pytest.raises(TokenError):
        TOKENS.read(sealed, "plivo", now=NOW)


@given(st.data())
def test_no_character_of_a_sealed_document_can_be_another(data: st.DataObject) -> None:
    sealed = TOKENS.seal("<Dial>1</Dial>", "plivo", now=NOW, nonce=NONCE)
    at = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))

    forged = sealed[:at] + other + sealed[at + 1 :]
    assert forged == sealed or unsealed(forged) in ("forged", "malformed")
    assert unsealed(sealed[:at]) in ("forged", "malformed")


def test_a_document_is_as_long_as_a_url_may_be() -> None:
    assert len(TOKENS.seal("x" * MAX_DOCUMENT_BYTES, "plivo", now=NOW, nonce=NONCE)) < 1400
    with pytest.raises(ValueError, match="1001 bytes; a document has at most 1000"):
        TOKENS.seal("x" * (MAX_DOCUMENT_BYTES + 1), "plivo", now=NOW, nonce=NONCE)
