"""Calls placed, transferred and ended by carriers' APIs, whose doubles take nothing but what the carriers document."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode

import aiohttp
import pytest
from aiohttp import web

from gateway import callcontrol
from gateway.admin import redacted
from gateway.callcontrol import ApiFailed, CallControl, Placement, Transfer
from gateway.errors import UnsupportedCommand
from gateway.provider import HttpRequest, SignedRequest
from gateway.server import Server
from gateway.signing import Signing
from gateway.simulator import simulate
from tests.conftest import Launch
from tests.doubles import RecordingService
from tests.test_admin import ADMIN, Operator
from tests.test_doctor import SIGNED, document, free_port
from tests.test_metrics import scrape

TOKEN = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
TWILIO, PLIVO = "AC0123456789abcdef0123456789abcdef", "MA0123456789ABCDEFGH"
CALL, UUID = "CAfedcba9876543210fedcba9876543210", "8f2b1c34-1d2e-4f5a-9b8c-7d6e5f4a3b2c"
TO, FROM = "+14155550123", "+14155550199"
ACCOUNTS = {"twilio": TWILIO, "relay": TWILIO, "plivo": PLIVO}
CALL_IDS = {"twilio": CALL, "relay": CALL, "plivo": UUID}


class Api:
    """Both carriers' APIs. `asked` are (method, path, fields); each call it knows is live, ringing or over."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.live: set[str] = set()
        self.on_place: Callable[[], Awaitable[None]] | None = None
        self.answer_with: Callable[[], Awaitable[web.StreamResponse]] | None = None
        self.url = ""

    async def take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path.startswith("/2010-04-01/"):
            assert "application/x-www-form-urlencoded" == request.content_type
            fields = dict(parse_qsl(body.decode(), strict_parsing=True))
            account, answer = TWILIO, self.twilio
        else:
            assert not body or "application/json" == request.content_type
            fields = json.loads(body) if body else {}
            account, answer = PLIVO, self.plivo
        credentials = base64.b64encode(f"{account}:{TOKEN}".encode()).decode()
        self.asked.append((request.method, request.path, fields))
        if request.headers["Authorization"] != f"Basic {credentials}":
            return web.json_response({"code": 20003, "message": f"Authenticate {TO}"}, status=401)
        if self.answer_with is not None:
            return await self.answer_with()
        return await answer(request.method, request.path, fields)

    async def twilio(self, method: str, path: str, fields: dict[str, str]) -> web.Response:
        base = f"/2010-04-01/Accounts/{TWILIO}/Calls"
        assert "POST" == method
        if path == f"{base}.json":
            assert fields.keys() == {"To", "From", "Url", "Method", "StatusCallback", "StatusCallbackMethod"}
            self.live.add(CALL)
            return web.json_response({"sid": CALL, "account_sid": TWILIO, "status": "queued"}, status=201)
        assert path.startswith(f"{base}/CA")
        assert fields.keys() in ({"Status"}, {"Twiml"}, {"Url", "Method"})
        if path.removeprefix(f"{base}/") not in {f"{call}.json" for call in self.live}:
            return web.json_response({"code": 21220, "message": "Call is not in-progress. Cannot redirect."}, status=400)
        return web.json_response({"sid": CALL})

    async def plivo(self, method: str, path: str, fields: dict[str, str]) -> web.Response:
        base = f"/v1/Account/{PLIVO}/Call/"
        if (method, path) == ("POST", base):
            assert fields.keys() == {"from", "to", "answer_url", "answer_method", "hangup_url", "hangup_method"}
            self.live.add(UUID)
            return web.json_response({"message": "call fired", "request_uuid": UUID, "api_id": "x"}, status=201)
        assert path.startswith(base)
        assert path.endswith("/")
        if path.removeprefix(base).removesuffix("/") not in self.live:
            return web.json_response({"api_id": "x", "error": "call not found"}, status=404)
        if method == "DELETE":
            assert fields == {}
            return web.Response(status=204)
        assert fields.keys() == {"legs", "aleg_url", "aleg_method"}
        return web.json_response({"message": "transfer executed", "api_id": "x"}, status=202)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    subject = Api()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", subject.take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    subject.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield subject
    await runner.cleanup()


@pytest.fixture
async def operator() -> AsyncIterator[Operator]:
    async with aiohttp.ClientSession() as http:
        yield Operator(http)


Gateway = Callable[..., Awaitable[Server]]


@pytest.fixture
async def gateway(launch: Launch, api: Api) -> Gateway:
    """A gateway that checks signatures and knows the API's credentials."""

    async def start(**options: Any) -> Server:
        entries = {
            name: entry | {"auth_token": TOKEN, "account_id": ACCOUNTS[name], "api_url": api.url}
            for name, entry in SIGNED.items()
        }
        return await launch(**document(free_port(), admin=ADMIN, **{"providers": entries} | options))

    return start


def order(name: str, **more: str) -> dict[str, str]:
    return {"provider": name, "to": TO, "from": FROM, **more}


async def answered(server: Server, name: str, url: str, **options: Any) -> Any:
    """The carrier has reached the called and asks the answer URL it was given, signed; then the call is carried."""
    provider = server.providers[name]
    options = {"hold_secs": 0.3, "say": ["hello"], "reply_timeout_secs": 0.2} | options
    sign = Signing(provider, server.settings.base_url())
    return await simulate(type(provider), url=url, call_id=CALL_IDS[name], caller=FROM, called=TO, sign=sign, **options)


def answer_url(api: Api) -> str:
    fields = api.asked[-1][2]
    return fields.get("Url") or fields["answer_url"]


@pytest.mark.parametrize("name", [*SIGNED])
async def test_an_outbound_call_is_carried_from_end_to_end(
    gateway: Gateway, api: Api, operator: Operator, log: list[Any], name: str
) -> None:
    async with RecordingService() as first, RecordingService() as second:
        services = {"one": {"kind": "websocket", "url": first.url}, "two": {"kind": "websocket", "url": second.url}}
        server = await gateway(services=services, routes=[{"service": "one"}, {"name": "sales", "service": "two"}])
        base = f"{server.settings.base_url()}/{name}"
        placed = await operator.post(server, "/calls", json=order(name, route="sales"))
        assert (202, {"provider": name, "call_id": CALL_IDS[name]}) == placed
        status = f"{base}/status"
        if name == "plivo":
            path = f"/v1/Account/{PLIVO}/Call/"
            fields = {"from": FROM, "to": TO, "answer_url": f"{base}/answer?route=sales", "answer_method": "POST"}
            fields |= {"hangup_url": status, "hangup_method": "POST"}
        else:
            path = f"/2010-04-01/Accounts/{TWILIO}/Calls.json"
            fields = {"To": TO, "From": FROM, "Url": f"{base}/answer?route=sales", "Method": "POST"}
            fields |= {"StatusCallback": status, "StatusCallbackMethod": "POST"}
        assert [("POST", path, fields)] == api.asked
        report = await answered(server, name, answer_url(api))
        assert report.ok, report.errors
        start = await (await second.connected()).wait_for("start")
    assert CALL_IDS[name] == start["call_id"]
    events = [entry["event"] for entry in log]
    assert events.index("call_placed") < events.index("call_answered") < events.index("stream_ended")
    assert "sales" == next(entry for entry in log if entry["event"] == "stream_ended")["route"]


@pytest.mark.parametrize("name", [*SIGNED])
async def test_without_a_route_the_first_that_fits_takes_it_and_an_unknown_one_counts_for_nothing(
    gateway: Gateway, api: Api, operator: Operator, log: list[Any], name: str
) -> None:
    routes = [{"service": "echo", "called": "*9999", "name": "no"}, {"service": "echo", "name": "yes"}]
    server = await gateway(routes=[*routes, {"service": "echo", "provider": "relay", "name": "others"}])
    assert 202 == (await operator.post(server, "/calls", json=order(name)))[0]
    url = answer_url(api)
    assert url.endswith(f"/{name}/answer")
    unfit = () if name == "relay" else (url, f"{url}?route=others")  # each call of text takes seconds to end
    for wanted in (f"{url}?route=nobody", *unfit):
        log.clear()
        assert (await answered(server, name, wanted, hold_secs=0.1, say=[])).connected
        assert ["yes"] == [entry["route"] for entry in log if entry["event"] == "call_answered"]


async def live(server: Server, operator: Operator) -> str:
    """The session of the one call, once its service has it."""
    async with asyncio.timeout(3):
        while True:
            calls = (await operator.get(server, "/calls"))[1]["calls"]
            if calls and calls[0]["state"] == "live":
                return str(calls[0]["session"])
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", [*SIGNED])
async def test_a_hang_up_ends_the_call_and_a_transfer_sends_it_elsewhere(
    gateway: Gateway, api: Api, operator: Operator, name: str
) -> None:
    server = await gateway()
    url = f"{server.settings.base_url()}/{name}/answer"
    api.live.add(CALL_IDS[name])
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(answered(server, name, url, hold_secs=30))
        session = await live(server, operator)
        target = {"url": "https://example.com/next"}
        assert (202, {"session": session, "done": "transfer"}) == await operator.post(
            server, f"/calls/{session}/transfer", json=target
        )
        status, answer = await operator.post(server, f"/calls/{session}/transfer", json={"xml": "<Dial>+14155550100</Dial>"})
        assert 202 == status
        status, answer = await operator.post(server, f"/calls/{session}/hangup")
        assert (200, "call") == (status, answer["ended"])
    assert call.result().connected
    if name == "plivo":
        path = f"/v1/Account/{PLIVO}/Call/{UUID}/"
        moved = {"legs": "aleg", "aleg_url": "https://example.com/next", "aleg_method": "POST"}
        fetched = moved | {"aleg_url": api.asked[1][2]["aleg_url"]}
        assert [("POST", path, moved), ("POST", path, fetched), ("DELETE", path, {})] == api.asked
        assert fetched["aleg_url"].startswith(f"{server.settings.base_url()}/plivo/document/")
    else:
        path = f"/2010-04-01/Accounts/{TWILIO}/Calls/{CALL}.json"
        twiml = '<?xml version="1.0" encoding="UTF-8"?><Response><Dial>+14155550100</Dial></Response>'
        forms = ({"Url": "https://example.com/next", "Method": "POST"}, {"Twiml": twiml}, {"Status": "completed"})
        assert [("POST", path, form) for form in forms] == api.asked


NEXT = "<Dial><Number>14155550100</Number></Dial><Speak>Grüß Gott</Speak>"
DOCUMENT = f'<?xml version="1.0" encoding="UTF-8"?><Response>{NEXT}</Response>'


async def fetch(server: Server, url: str, *, signed: bool = True, name: str = "plivo") -> tuple[int, str]:
    """As Plivo asks `url`: (status, body)."""
    form = {"CallUUID": UUID, "CallSid": CALL, "From": FROM[1:], "To": TO[1:], "Event": "Redirect", "CallStatus": "in-progress"}
    body = urlencode(form).encode()
    headers = {"content-type": "application/x-www-form-urlencoded"}
    if signed:
        headers |= server.providers[name].sign(SignedRequest.read("POST", url, headers, body))
    async with aiohttp.ClientSession() as http, http.post(url, data=body, headers=headers) as response:
        assert response.status != 200 or response.content_type == "application/xml"
        return response.status, await response.text()


async def test_plivo_fetches_what_a_call_is_transferred_to_once_and_from_any_process(
    gateway: Gateway, api: Api, operator: Operator, log: list[Any]
) -> None:
    server, other = await gateway(), await gateway()
    api.live.add(UUID)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answered(server, "plivo", f"{server.settings.base_url()}/plivo/answer", hold_secs=30))
        path = f"/calls/{await live(server, operator)}"
        urls = []
        for _ in range(2):
            assert 202 == (await operator.post(server, f"{path}/transfer", json={"xml": NEXT}))[0]
            urls.append(api.asked[-1][2]["aleg_url"])
        # The load balancer may ask either process: there it is another port.
        elsewhere = urls[0].replace(server.settings.base_url(), other.settings.base_url())
        assert (403, "") == await fetch(other, elsewhere, signed=False)
        assert (200, DOCUMENT) == await fetch(other, elsewhere)
        assert (403, "") == await fetch(server, urls[0]), "used, whoever has answered"
        assert (403, "") == await fetch(other, elsewhere)
        assert (403, "") == await fetch(server, urls[1][:-1] + ("A" if urls[1][-1] != "A" else "B"))
        assert (403, "") == await fetch(server, urls[1].replace("/plivo/", "/twilio/"), name="twilio")
        assert (200, DOCUMENT) == await fetch(server, urls[1])
        for xml, complaint in ((f"<Speak>{'x' * 1000}</Speak>", "at most 1000; give a url"), ("<Dial>", "not well-formed")):
            status, answer = await operator.post(server, f"{path}/transfer", json={"xml": xml})
            assert 409 == status
            assert complaint in answer["error"]
        await operator.post(server, f"{path}/hangup")
    assert 1 == len({len(url) for url in urls}) == len([entry for entry in log if entry["event"] == "call_transferred"]) - 1
    for url in urls:
        sealed = url.rpartition("/")[2]
        assert b"14155550100" not in base64.urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4)), "logs of proxies have URLs"
        assert sealed not in json.dumps(log, default=str)


async def test_a_call_that_has_ended_can_be_hung_up_but_not_transferred(gateway: Gateway, api: Api, operator: Operator) -> None:
    server = await gateway()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answered(server, "twilio", f"{server.settings.base_url()}/twilio/answer", hold_secs=30))
        session = await live(server, operator)
        status, answer = await operator.post(server, f"/calls/{session}/transfer", json={"xml": "<Hangup/>"})
        assert 502 == status
        assert "the carrier knows no such live call: HTTP 400, error 21220: Call is not in-progress" in answer["error"]
        assert "call" == (await operator.post(server, f"/calls/{session}/hangup"))[1]["ended"]
    assert 404 == (await operator.post(server, f"/calls/{session}/transfer", json={"xml": "<Hangup/>"}))[0]


async def test_where_the_api_fails_a_hang_up_ends_the_stream_and_says_so(gateway: Gateway, api: Api, operator: Operator) -> None:
    server = await gateway()

    async def broken() -> web.StreamResponse:
        return web.Response(status=503)

    api.answer_with = broken
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answered(server, "twilio", f"{server.settings.base_url()}/twilio/answer", hold_secs=30))
        session = await live(server, operator)
        status, answer = await operator.post(server, f"/calls/{session}/hangup")
    assert (502, "its stream is ended, but the call may go on: the carrier refused: HTTP 503") == (status, answer["error"])


async def test_requests_are_counted_by_provider_and_result(gateway: Gateway, api: Api, operator: Operator) -> None:
    server = await gateway()
    assert 202 == (await operator.post(server, "/calls", json=order("plivo")))[0]
    api.live.clear()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answered(server, "twilio", f"{server.settings.base_url()}/twilio/answer", hold_secs=30))
        session = await live(server, operator)
        assert 502 == (await operator.post(server, f"/calls/{session}/transfer", json={"xml": "<Hangup/>"}))[0]
        assert 200 == (await operator.post(server, f"/calls/{session}/hangup"))[0]

    async def breaks_off() -> web.StreamResponse:
        raise web.HTTPInternalServerError from None

    async def says_nothing() -> web.StreamResponse:
        return web.json_response({}, status=201)

    api.answer_with = says_nothing
    assert 504 == (await operator.post(server, "/calls", json=order("twilio")))[0]
    api.answer_with = breaks_off
    assert 502 == (await operator.post(server, "/calls", json=order("twilio")))[0]
    now = await scrape(server)
    counted = {tuple(sample.labels.values()): sample.value for sample in now.of("telephony_api_requests_total")}
    assert counted == {
        ("plivo", "place", "done"): 1,
        ("twilio", "transfer", "over"): 1,
        ("twilio", "hangup", "over"): 1,
        ("twilio", "place", "unknown"): 1,
        ("twilio", "place", "refused"): 1,
    }


async def test_without_credentials_only_the_stream_is_ended(gateway: Gateway, api: Api, operator: Operator) -> None:
    server = await gateway(providers={name: entry | {"auth_token": TOKEN} for name, entry in SIGNED.items()})
    status, answer = await operator.post(server, "/calls", json=order("plivo"))
    assert (409, "the provider's configuration has no account_id, so its API can't be asked") == (status, answer["error"])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answered(server, "plivo", f"{server.settings.base_url()}/plivo/answer", hold_secs=30))
        session = await live(server, operator)
        assert 409 == (await operator.post(server, f"/calls/{session}/transfer", json={"url": "https://example.com"}))[0]
        assert "stream" == (await operator.post(server, f"/calls/{session}/hangup"))[1]["ended"]
    assert [] == api.asked


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `provider`"),
        (order("nobody"), "there are: twilio, relay, plivo"),
        (order("twilio") | {"to": ["+14155550100"]}, "Expected `str`"),
        (order("twilio") | {"to": "+1415555<script>"}, "to: neither a number"),
        (order("plivo") | {"to": "14155550100<14155550101"}, "to: neither a number"),
        (order("twilio") | {"from": ""}, "from: neither a number"),
        (order("twilio", route="nobody"), "route: there is none of this name"),
        (order("twilio", route="others"), "route: there is none of this name"),
        (order("twilio", rout="x"), "unknown field `rout`"),
    ],
)
async def test_orders_that_make_no_sense(gateway: Gateway, api: Api, operator: Operator, body: Any, complaint: str) -> None:
    server = await gateway(routes=[{"service": "echo", "provider": "relay", "name": "others"}, {"service": "echo"}])
    status, answer = await operator.post(server, "/calls", data=body if isinstance(body, bytes) else json.dumps(body))
    assert 400 == status
    assert complaint in answer["error"]
    assert [] == api.asked


async def test_transfers_that_make_no_sense(api: Api, gateway: Gateway) -> None:
    server = await gateway()
    control, provider = server.house.control, server.providers["twilio"]
    for to in (
        Transfer(),
        Transfer("<Hangup/>", "https://example.com"),
        Transfer(url="javascript:x"),
        Transfer(url="http://a b"),
    ):
        with pytest.raises(ValueError, match=r"url"):
            await control.transfer("twilio", provider, CALL, to)
    with pytest.raises(UnsupportedCommand, match="not well-formed"):
        await control.transfer("twilio", provider, CALL, Transfer(xml="<Hangup>"))
    assert [] == api.asked


async def test_a_process_that_takes_no_calls_places_none(gateway: Gateway, api: Api, operator: Operator) -> None:
    server = await gateway()
    assert 202 == (await operator.post(server, "/drain"))[0]
    status, answer = await operator.post(server, "/calls", json=order("twilio"))
    assert (503, True) == (status, answer["error"].startswith("no new calls at the moment: the process is ending"))
    assert [] == api.asked


async def test_credentials_and_numbers_are_told_nowhere(gateway: Gateway, api: Api, operator: Operator, log: list[Any]) -> None:
    server = await gateway()
    told = [await operator.post(server, "/calls", json=order("twilio"))]
    object.__setattr__(server.providers["twilio"]._api, "_auth_token", "another-secret")  # type: ignore[attr-defined]
    told += [await operator.post(server, "/calls", json=order("twilio")), await operator.get(server, "/config")]
    from gateway import logs

    text = json.dumps([told, redacted(server.settings), [logs.redact(None, "", dict(entry)) for entry in log]], default=str)
    assert (502, "the carrier refused: HTTP 401, error 20003: Authenticate +1415•••0123") == (told[1][0], told[1][1]["error"])
    for secret in (TOKEN, "another-secret", base64.b64encode(f"{TWILIO}:".encode()).decode()[:20], TO[1:], FROM[1:]):
        assert secret not in text
    assert {"call_placed", "carrier_api_failed"} <= {entry["event"] for entry in log}
    shown = told[2][1]["providers"]["twilio"]["config"]
    assert ("***", TWILIO, api.url) == (shown["auth_token"], shown["account_id"], shown["api_url"])


async def test_an_api_that_misbehaves(gateway: Gateway, api: Api, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await gateway()
    monkeypatch.setattr(callcontrol, "LARGEST_REPLY", 1000)
    elsewhere = web.Response(status=307, headers={"Location": f"{api.url}/2010-04-01/Accounts/{TWILIO}/Calls.json"})

    async def redirect() -> web.StreamResponse:
        return elsewhere

    async def flood() -> web.StreamResponse:
        return web.Response(status=201, body=b"{" + b" " * 5000)

    async def nothing() -> web.StreamResponse:
        return web.Response(status=201)

    async def cut() -> web.StreamResponse:
        raise asyncio.CancelledError

    host = api.url.removeprefix("http://")
    for answer_with, expected, why in (
        (redirect, 502, f"{host} answered with a redirect, which is not followed; write the final api_url"),
        (flood, 504, f"{host} answered with more than 1000 bytes"),
        (nothing, 504, "the carrier answered HTTP 201 and named no call"),
        (cut, 504, f"{host} broke off (ServerDisconnectedError), so whether it is done is not known"),
    ):
        api.asked.clear()
        api.answer_with = answer_with
        status, answer = await operator.post(server, "/calls", json=order("twilio"))
        assert (expected, why) == (status, answer["error"])
        assert 1 == len(api.asked), "asked once, whatever comes"


async def test_an_api_that_does_not_answer_or_is_not_there(api: Api, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await gateway()
    provider = server.providers["plivo"]

    async def never() -> web.StreamResponse:
        await asyncio.sleep(1)
        raise AssertionError

    api.answer_with = never
    monkeypatch.setattr(callcontrol, "API_SECS", 0.2)
    control = CallControl("test")
    try:
        with pytest.raises(ApiFailed, match=r"did not answer within 0\.2 s, so whether it is done is not known") as caught:
            await control.place("plivo", provider, Placement("plivo", TO, FROM), "http://127.0.0.1:1")
        assert caught.value.unknown
        provider._api._api_url = f"http://127.0.0.1:{free_port()}"  # type: ignore[attr-defined]
        with pytest.raises(ApiFailed, match="can't connect to") as caught:
            await control.hang_up("plivo", provider, UUID)
        assert not caught.value.unknown
    finally:
        await control.close()


async def test_how_a_placed_call_went_is_told(gateway: Gateway, log: list[Any]) -> None:
    server = await gateway()
    twilio = {"CallSid": CALL, "CallStatus": "busy", "From": FROM, "To": TO, "AccountSid": TWILIO}
    plivo = {"CallUUID": UUID, "CallStatus": "no-answer", "Event": "Hangup", "HangupCauseName": "No Answer"}
    async with aiohttp.ClientSession() as http:
        for name, form in (("twilio", twilio), ("relay", twilio), ("plivo", plivo)):
            sign = Signing(server.providers[name], server.settings.base_url())
            headers = {"content-type": "application/x-www-form-urlencoded"}
            request = sign(HttpRequest("POST", f"{server.settings.base_url()}/{name}/status", headers, form))
            async with http.post(request.url, data=dict(form), headers=request.headers) as response:
                assert 204 == response.status
    told = [(entry["call_id"], entry["status"], entry["reason"]) for entry in log if entry["event"] == "carrier_status"]
    assert [(CALL, "other", "busy"), (CALL, "other", "busy"), (UUID, "other", "No Answer")] == told
