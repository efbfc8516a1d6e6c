"""Requests to carriers' APIs, against what the vendors' own libraries send, and what their answers mean."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
import plivo
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twilio.base.version import Version
from twilio.http.http_client import HttpClient
from twilio.http.response import Response
from twilio.rest import Client

import providers
from gateway.errors import UnsupportedCommand
from gateway.provider import ApiReply, HttpRequest, Provider

TOKEN = "fedcba9876543210fedcba9876543210"
TWILIO, PLIVO = "AC0123456789abcdef0123456789abcdef", "MA0123456789ABCDEFGH"
CALL, UUID = "CA0123456789abcdef0123456789abcdef", "8f2b1c34-1d2e-4f5a-9b8c-7d6e5f4a3b2c"
ACCOUNTS = {kind: PLIVO if kind.startswith("plivo") else TWILIO for kind in providers.names()}
TWILIOS = [kind for kind, account in ACCOUNTS.items() if account is TWILIO]
PLIVOS = [kind for kind, account in ACCOUNTS.items() if account is PLIVO]
ANSWER, STATUS = "https://voice.example.com/x/answer?route=a+b", "https://voice.example.com/x/status"


def account(kind: str, **options: Any) -> Provider:
    provider = providers.load(kind)
    return provider(provider.Config(**{"auth_token": [TOKEN, "old"], "account_id": ACCOUNTS[kind]} | options))


class Wire(HttpClient):  # type: ignore[misc]
    """What Twilio's library would have sent."""

    def __init__(self) -> None:
        super().__init__(None, False, None)
        self.sent: list[tuple[Any, ...]] = []

    def request(self, method: str, url: str, **options: Any) -> Response:
        self.sent.append((method, url, options["auth"], options["data"]))
        return Response(201 if url.endswith("Calls.json") else 200, json.dumps({"sid": CALL, "account_sid": TWILIO}))


def seen(request: HttpRequest) -> tuple[Any, ...]:
    """A request as the vendors' libraries have it before they write it: method, URL, credentials, fields."""
    from base64 import b64decode

    kind, _, encoded = request.headers["authorization"].partition(" ")
    assert "Basic" == kind
    user, _, password = b64decode(encoded).decode().partition(":")
    return request.method, request.url, (user, password), dict(request.form) or (json.loads(request.body) if request.body else {})


@pytest.mark.parametrize("kind", TWILIOS)
def test_twilio_is_asked_as_its_own_library_asks(kind: str) -> None:
    wire = Wire()
    client = Client(TWILIO, TOKEN, http_client=wire)
    assert issubclass(type(client.api.v2010), Version)
    subject = account(kind)
    options = {"to": "+14155550100", "from_": "+14155550199", "url": ANSWER, "method": "POST"}
    client.calls.create(**options, status_callback=STATUS, status_callback_method="POST")
    client.calls.create(**options)
    client.calls(CALL).update(status="completed")
    client.calls(CALL).update(url="https://example.com/next", method="POST")
    client.calls(CALL).update(twiml='<?xml version="1.0" encoding="UTF-8"?><Response><Dial>+14155550123</Dial></Response>')
    assert wire.sent == [
        seen(subject.place_call("+14155550100", "+14155550199", ANSWER, status_url=STATUS)),
        seen(subject.place_call("+14155550100", "+14155550199", ANSWER)),
        seen(subject.hang_up_call(CALL)),
        seen(subject.transfer_call(CALL, url="https://example.com/next")),
        seen(subject.transfer_call(CALL, xml=" <Dial>+14155550123</Dial> ")),
    ]


@pytest.mark.parametrize("kind", PLIVOS)
def test_plivo_is_asked_as_its_own_library_asks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def send(_: Any, request: requests.PreparedRequest, **__: Any) -> requests.Response:
        assert request.url is not None
        auth = request.headers["Authorization"]
        body = request.body.encode() if isinstance(request.body, str) else request.body or b""
        sent.append(seen(HttpRequest(request.method or "", request.url, {"authorization": auth}, body=body)))
        response = requests.Response()
        response.status_code, response._content, response.request = 204, b"{}", request
        return response

    monkeypatch.setattr(requests.Session, "send", send)
    subject = account(kind)
    client = plivo.RestClient(PLIVO, TOKEN)
    client.calls.delete(UUID)
    client.calls.update(UUID, legs="aleg", aleg_url="https://example.com/next", aleg_method="POST")
    client.calls.create(from_="14155550199", to_="14155550100", answer_url=ANSWER, hangup_url=STATUS)
    ours = [
        seen(subject.hang_up_call(UUID)),
        seen(subject.transfer_call(UUID, url="https://example.com/next")),
        seen(subject.place_call("14155550100", "14155550199", ANSWER, status_url=STATUS)),
    ]
    for theirs, own in zip(sent, ours, strict=True):
        assert theirs[:3] == own[:3]
        assert own[3].items() <= theirs[3].items(), "it writes defaults along"
    assert {"call_uuid": UUID} | ours[1][3] == sent[1][3]
    assert {"ring_method", "fallback_method", "machine_detection_time", "machine_detection_method", "ring_timeout",
            "error_if_parent_not_found"} >= sent[2][3].keys() - ours[2][3].keys()  # fmt: skip


@pytest.mark.parametrize("kind", providers.names())
def test_ids_can_not_leave_their_place_in_the_path(kind: str) -> None:
    subject = account(kind, api_url="http://127.0.0.1:9/eu")
    for request in (subject.hang_up_call("../Keys?a#b"), subject.transfer_call("../Keys?a#b", url="https://x.example")):
        assert "..%2FKeys%3Fa%23b" in request.url
        assert request.url.startswith(("http://127.0.0.1:9/eu/2010-04-01/Accounts/", "http://127.0.0.1:9/eu/v1/Account/"))
        assert (urlsplit(request.url).query, urlsplit(request.url).fragment) == ("", "")


@pytest.mark.parametrize("kind", providers.names())
def test_credentials_are_in_no_repr(kind: str) -> None:
    subject = account(kind)
    request = subject.place_call("+14155550100", "+14155550199", ANSWER)
    for secret in (TOKEN, request.headers["authorization"].split()[1], "4155550100"):
        assert secret not in repr(request)
    assert TOKEN not in repr(subject._config)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", providers.names())
def test_without_credentials_nothing_can_be_asked(kind: str) -> None:
    subject = account(kind, account_id=None)
    for ask in (
        lambda: subject.place_call("+14155550100", "+14155550199", ANSWER),
        lambda: subject.hang_up_call(CALL),
        lambda: subject.transfer_call(CALL, url="https://example.com"),
    ):
        with pytest.raises(UnsupportedCommand, match="no account_id"):
            ask()


@pytest.mark.parametrize("kind", providers.names())
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"auth_token": None, "auth": "none"}, "account_id: needs `auth_token`"),
        ({"account_id": "12345"}, "account_id: is no A"),
        ({"account_id": ""}, "account_id: is no A"),
        ({"api_url": "http://api.example.com"}, "api_url: is no https:// URL"),
        ({"api_url": "ftp://127.0.0.1"}, "api_url: is no https:// URL"),
        ({"api_url": "https://["}, "api_url: is no https:// URL"),
        ({"api_url": ""}, "api_url: is no https:// URL"),
        ({"api_url": "https://api.example.com/ x"}, "api_url: is no https:// URL"),
        ({"api_url": "https://api.example.com/"}, "api_url: has more than"),
        ({"api_url": "https://me:secret@api.example.com"}, "api_url: has more than"),
        ({"api_url": "https://api.example.com?x"}, "api_url: has more than"),
    ],
)
def test_options_that_will_not_do(kind: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        account(kind, **options)


def test_what_can_not_be_asked() -> None:
    for kind in TWILIOS:
        for xml, why in (("<Dial>", "not well-formed"), ("text", "outside"), (f"<Say>{'x' * 4000}</Say>", "4000")):
            with pytest.raises(UnsupportedCommand, match=why):
                account(kind).transfer_call(CALL, xml=xml)
    for kind in PLIVOS:
        with pytest.raises(UnsupportedCommand, match="Plivo takes the url"):
            account(kind).transfer_call(UUID, xml="<Hangup/>")
        with pytest.raises(UnsupportedCommand, match="one number"):
            account(kind).place_call("14155550100<14155550101", "14155550199", ANSWER)


@pytest.mark.parametrize("kind", TWILIOS)
@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (201, {"sid": CALL, "status": "queued"}, ApiReply("done", CALL)),
        (200, {"sid": CALL}, ApiReply("done", CALL)),
        (204, None, ApiReply("done")),
        (404, {"code": 20404, "message": "not found", "status": 404}, ApiReply("over", "", "HTTP 404, error 20404: not found")),
        (400, {"code": 21220, "message": "Call is not in-progress."},
         ApiReply("over", "", "HTTP 400, error 21220: Call is not in-progress.")),
        (401, {"code": 20003, "message": "Authenticate"}, ApiReply("refused", "", "HTTP 401, error 20003: Authenticate")),
        (503, None, ApiReply("refused", "", "HTTP 503")),
        (400, {"code": [], "message": {}}, ApiReply("refused", "", "HTTP 400")),
    ],
)  # fmt: skip
def test_what_twilio_answers(kind: str, status: int, body: Any, expected: ApiReply) -> None:
    assert expected == account(kind).reply(status, b"" if body is None else json.dumps(body).encode())


@pytest.mark.parametrize("kind", PLIVOS)
@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (201, {"message": "call fired", "request_uuid": UUID, "api_id": "x"}, ApiReply("done", UUID)),
        (202, {"message": "transferred"}, ApiReply("done")),
        (204, None, ApiReply("done")),
        (404, {"error": "call not found"}, ApiReply("over", "", "HTTP 404: call not found")),
        (403, {"error": "concurrency"}, ApiReply("refused", "", "HTTP 403: concurrency")),
        (500, None, ApiReply("refused", "", "HTTP 500")),
    ],
)
def test_what_plivo_answers(kind: str, status: int, body: Any, expected: ApiReply) -> None:
    assert expected == account(kind).reply(status, b"" if body is None else json.dumps(body).encode())


ODD = st.dictionaries(
    st.sampled_from(["sid", "code", "message", "error", "request_uuid"]),
    st.none() | st.booleans() | st.text() | st.lists(st.none()),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other tests run beside it
@given(status=st.integers(100, 599), body=st.binary() | st.builds(msgspec.json.encode, ODD))
def test_no_answer_is_too_odd(status: int, body: bytes) -> None:
    for kind in providers.names():
        assert isinstance(account(kind).reply(status, body), ApiReply)


def test_the_form_is_what_the_query_would_be() -> None:
    """The answer URL is one field, its own query included."""
    for kind in TWILIOS:
        form = account(kind).place_call("+1", "+2", ANSWER).form
        assert ("route", "a b") in parse_qsl(urlsplit(form["Url"]).query)
