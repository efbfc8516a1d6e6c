"""The operators' listener over real sockets: who is let in, what it tells, what it can do to a call."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gateway import config
from gateway.admin import OPEN, redacted
from gateway.errors import ConfigError
from gateway.server import Server
from tests.conftest import Launch
from tests.doubles import ConversationRelay, Plivo, RecordingService, TwilioMedia
from tests.test_end_to_end import MULAW, played, stream_url

TOKEN = "correct horse battery staple".replace(" ", "-")
CALLER, CALLED = "+14155550123", "+14155550199"
ADMIN = "127.0.0.1:0"


class Operator:
    """An HTTP client of one gateway's admin listener."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def ask(self, server: Server, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """(status, what the JSON says, or the text)."""
        assert server.admin is not None
        async with self._http.request(method, f"http://127.0.0.1:{server.admin.port}{path}", **options) as response:
            assert "no-store" == response.headers["Cache-Control"]
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def get(self, server: Server, path: str, **options: Any) -> tuple[int, Any]:
        return await self.ask(server, "GET", path, **options)

    async def post(self, server: Server, path: str, **options: Any) -> tuple[int, Any]:
        return await self.ask(server, "POST", path, **options)


@pytest.fixture
async def operator() -> AsyncIterator[Operator]:
    async with aiohttp.ClientSession() as http:
        yield Operator(http)


async def ready(call: Any) -> None:
    """The call's first audio has gone around."""
    await call.speak(MULAW[:800])
    await asyncio.sleep(0.1)


async def test_it_is_off_unless_it_is_configured(launch: Launch) -> None:
    server = await launch()
    assert server.admin is None
    assert not server.watchdog.running


async def test_health_and_version(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)
    assert (200, {"alive": True}) == await operator.get(server, "/livez")
    assert (200, {"ready": True, "reasons": []}) == await operator.get(server, "/readyz")
    status, version = await operator.get(server, "/version")
    assert 200 == status
    assert {"version", "python", "uptime_secs"} == version.keys()
    status, index = await operator.get(server, "/")
    assert {"GET /readyz", "GET /metrics", "POST /calls/{session}/{action}"} <= {*index["endpoints"]}


async def test_readiness_tells_why_not(launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await launch(admin=ADMIN, max_calls=1)
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await ready(call)
        server.hooks.draining = True
        monkeypatch.setattr(server.watchdog, "overloaded", lambda: True)
        status, answer = await operator.get(server, "/readyz")
        assert 503 == status
        assert ["draining", "full", "loop_lag"] == [reason["reason"] for reason in answer["reasons"]]
        assert "1 of 1 calls (max_calls)" == answer["reasons"][1]["detail"]
        server._listeners[0].close()
        _, answer = await operator.get(server, "/readyz")
        assert "not_listening" == answer["reasons"][0]["reason"]


@pytest.mark.parametrize("address", ["0.0.0.0:9090", "[::]:9090", "admin.internal:9090"])
def test_elsewhere_than_on_loopback_it_needs_a_token(address: str) -> None:
    text = f"""
providers: {{twilio: {{kind: twilio_media_streams, auth: none}}}}
services: {{echo: {{kind: echo}}}}
routes: [{{service: echo}}]
admin: "{address}"
"""
    with pytest.raises(ConfigError, match=r"admin: anybody could reach .*; write 127.0.0.1:9090, or an admin_token"):
        config.parse(text)
    assert address == config.parse(f"{text}admin_token: {TOKEN}\n").admin


async def test_s11_the_token_is_asked_for_everywhere_but_for_health(launch: Launch, operator: Operator, log: list[Any]) -> None:
    server = await launch(admin=ADMIN, admin_token=TOKEN)
    assert server.admin is not None
    for path in ("/", "/metrics", "/version", "/config", "/calls", "/calls/x", "/nothing", *OPEN):
        for header in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            status, answer = await operator.get(server, path, headers=header)
            assert (200 if path in OPEN else 401) == status, path
            assert TOKEN not in str(answer)
    for path in ("/drain", "/reload", "/calls/x/hangup"):
        assert 401 == (await operator.post(server, path))[0]
    good = {"Authorization": f"Bearer {TOKEN}", "Host": "voice.internal:9090"}
    assert 200 == (await operator.get(server, "/metrics", headers=good))[0]
    assert 404 == (await operator.get(server, "/calls/x", headers=good))[0]
    assert TOKEN not in json.dumps(log, default=str)
    assert 1 == len([entry for entry in log if entry["event"] == "admin_refused"])


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1", "http://localhost:1", "file://"])
async def test_s11_pages_of_other_sites_are_refused(launch: Launch, operator: Operator, origin: str) -> None:
    server = await launch(admin=ADMIN)
    for method, path in (("GET", "/calls"), ("POST", "/drain"), ("POST", "/calls/x/hangup"), ("GET", "/livez")):
        status, answer = await operator.ask(server, method, path, headers={"Origin": origin})
        assert (403, "pages of other sites may not ask here (Origin)") == (status, answer["error"])


async def test_a_page_of_its_own_is_let_in(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)
    assert server.admin is not None
    own = {"Origin": f"http://127.0.0.1:{server.admin.port}"}
    assert 200 == (await operator.get(server, "/calls", headers=own))[0]


async def test_s11_a_name_that_was_made_to_point_here_is_refused(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)
    for host in ("evil.example", "evil.example:9090", "127.0.0.1.evil.example", "", "[", "10.0.0.1:9090"):
        status, answer = await operator.get(server, "/calls", headers={"Host": host, "Origin": f"http://{host}"})
        assert 403 == status, host
        assert "Host" in answer["error"]
    for host in ("localhost", "localhost:9090", "127.0.0.1", "[::1]:9090", "[::1]"):
        assert 200 == (await operator.get(server, "/calls", headers={"Host": host}))[0], host


async def test_a_port_in_use_is_told_by_its_address(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match="in use") as caught:
            await launch(admin=address)
    assert address == caught.value.filename


@pytest.mark.allow_errors("admin_request_failed")
async def test_every_error_is_a_sentence_in_json(
    launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    server = await launch(admin=ADMIN)
    server.hooks.drain = None
    for method, path, expected in (
        ("GET", "/etc/passwd", 404),
        ("DELETE", "/calls", 405),
        ("GET", "/drain", 405),
        ("GET", "/calls/0123", 404),
        ("POST", "/calls/0123/hangup", 404),
        ("POST", "/calls/0123/sing", 404),
        ("POST", "/drain", 501),
        ("POST", "/reload", 501),
    ):
        status, answer = await operator.ask(server, method, path)
        assert (expected, {"error"}) == (status, answer.keys()), path
        assert " " in answer["error"]
    assert server.admin is not None
    monkeypatch.setattr(server.admin._metrics, "text", lambda _: 1 / 0)
    status, answer = await operator.get(server, "/metrics")
    assert (500, "the gateway failed to answer this; its log says why") == (status, answer["error"])
    assert ["admin_request_failed"] == [entry["event"] for entry in log if entry["log_level"] == "error"]


async def test_calls_are_listed_with_their_counters_and_without_their_numbers(launch: Launch, operator: Operator) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}}, admin=ADMIN)
        assert (200, {"count": 0, "calls": []}) == await operator.get(server, "/calls")
        async with Plivo(stream_url(server, "plivo"), pace="fast") as call:
            link = await service.connected()
            await call.speak(MULAW[:1600])
            await asyncio.sleep(0.05)
            await call.speak(MULAW[1600:3200])
            await link.send_audio(b"\x10\x20" * 16000)
            await link.send(type="checkpoint", name="end")
            await asyncio.sleep(0.2)
            status, listed = await operator.get(server, "/calls")
            (brief,) = listed["calls"]
            status, detail = await operator.get(server, f"/calls/{brief['session']}")
            await call.hangup()
        await asyncio.sleep(0.1)
        assert 0 == (await operator.get(server, "/calls"))[1]["count"]
        assert 404 == (await operator.get(server, f"/calls/{brief['session']}"))[0]
    assert 200 == status
    assert ("plivo", "live", "route-0", "agent", "serving") == tuple(
        brief[key] for key in ("provider", "state", "route", "service", "link")
    )
    moving = ("duration_secs", "queued_ms", "ahead_ms", "frames_out")
    assert {key: brief[key] for key in brief if key not in moving}.items() <= detail.items()
    assert 3200 == detail["received_samples"] == detail["forwarded_samples"]
    assert 0 == detail["held_samples"]
    assert 8032 == detail["queued_samples"], "a second, and the filter's tail"
    assert 1 == detail["pending_checkpoints"]
    assert 400 < detail["queued_ms"] + detail["ahead_ms"] < 1000
    assert detail["latency_to_service_ms"]["p99"] < 1000


async def test_s8_numbers_are_masked(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)
    async with ConversationRelay(stream_url(server, "relay"), caller=CALLER, called=CALLED):
        await asyncio.sleep(0.1)
        _, listed = await operator.get(server, "/calls")
        _, detail = await operator.get(server, f"/calls/{listed['calls'][0]['session']}")
        _, metrics = await operator.get(server, "/metrics")
    assert ("+1415•••0123", "+1415•••0199") == (detail["caller"], detail["called"])
    for secret in (CALLER[1:], CALLED[1:]):
        assert secret not in json.dumps([listed, detail, metrics])
    for private in (detail["session"], detail["call_id"]):
        assert private not in metrics, "S12: no call's id is a label"


async def test_an_operator_clears_a_line_and_hangs_up(launch: Launch, operator: Operator, log: list[Any]) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}}, admin=ADMIN)
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await link.send_audio(b"\x10\x20" * 16000 * 5)
            await asyncio.sleep(0.3)
            session = (await operator.get(server, "/calls"))[1]["calls"][0]["session"]
            assert (200, "clear") == unpack(await operator.post(server, f"/calls/{session}/clear"))
            cut = await link.wait_for("clear")
            status, answer = await operator.post(server, f"/calls/{session}/dtmf", json={"digits": "1"})
            assert 409 == status
            assert "this stream can't carry out 'dtmf'; it accepts: audio, checkpoint, clear, stop" == answer["error"]
            assert (200, "hangup") == unpack(await operator.post(server, f"/calls/{session}/hangup"))
            stop = await link.wait_for("stop")
            await call.wait_closed()
    assert cut["cleared_ms"] > 4000
    assert "service_stop" == stop["reason"]
    assert 1 == len(call.ear.clears)
    assert 1000 == call.close_code
    assert [] == call.violations
    assert ["clear", "hangup"] == [entry["action"] for entry in log if entry["event"] == "operator_command"]
    (ended,) = [entry for entry in log if entry["event"] == "stream_ended"]
    assert ended["time_to_silence_ms"]["p99"] < 1000


async def test_an_operator_presses_keys(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)
    async with Plivo(stream_url(server, "plivo")) as call:
        await ready(call)
        session = (await operator.get(server, "/calls"))[1]["calls"][0]["session"]
        for body in (
            b"",
            b"[]",
            b"{",
            b'{"digits": 12}',
            b'{"digits": "12 "}',
            b'{"digits": ""}',
            b"\xff",
            b'{"digits": "1", "x": "2"}',
        ):
            status, answer = await operator.post(server, f"/calls/{session}/dtmf", data=body)
            assert 400 == status
            assert '{"digits": "12#"}' in answer["error"]
        assert 413 == (await operator.post(server, f"/calls/{session}/dtmf", data=b"1" * 5000))[0]
        assert (200, "dtmf") == unpack(await operator.post(server, f"/calls/{session}/dtmf", json={"digits": "12#"}))
        await asyncio.sleep(0.2)
        assert "12#" == "".join(call.dtmf)
        await call.hangup()
    assert [] == call.violations


async def test_a_process_that_drains_takes_no_new_calls_and_keeps_those_it_has(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)

    async def asks(call_id: str) -> bool:
        """Whether a call's webhook is answered with a stream."""
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"http://127.0.0.1:{server.port}/twilio/answer", data={"CallSid": call_id})
            return "<Stream" in await answer.text()

    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await ready(call)
        assert await asks("CA" + "1" * 32)
        for _ in range(2):
            assert (202, {"asked": "drain"}) == await operator.post(server, "/drain")
        assert not await asks("CA" + "2" * 32)
        assert await asks(call.call_sid), "a call that it has may have another stream"
        status, answer = await operator.get(server, "/readyz")
        assert (503, ["draining"]) == (status, [reason["reason"] for reason in answer["reasons"]])
        await call.speak(MULAW[:1600])
        await asyncio.sleep(0.1)
        await call.hangup()
    assert [] == call.violations
    assert len(played(call)) == 2400
    _, metrics = await operator.get(server, "/metrics")
    assert 'telephony_refusals_total{provider="twilio",reason="draining"} 1.0' in metrics
    assert "telephony_draining 1.0" in metrics


async def test_hooks_are_called_and_their_refusals_told(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)
    asked = []

    async def drain() -> None:
        asked.append("drain")

    def refuse() -> None:
        raise ConfigError("gateway.yaml:1:1: empty")

    server.hooks.drain, server.hooks.reload = drain, refuse
    assert (202, {"asked": "drain"}) == await operator.post(server, "/drain")
    assert ["drain"] == asked
    assert (422, {"error": "gateway.yaml:1:1: empty"}) == await operator.post(server, "/reload")
    server.hooks.reload = lambda: {"changed": ["routes"]}
    assert (202, {"asked": "reload", "result": {"changed": ["routes"]}}) == await operator.post(server, "/reload")


def test_the_configuration_is_shown_without_its_secrets() -> None:
    secrets = {
        name: f"{name.lower()}-0123456789abcdef" for name in ("GATEWAY", "ADMIN", "TWILIO", "OLD", "AGENT", "CUSTOM", "QUERY")
    }
    settings = config.parse(
        """
public_url: https://voice.example.com
secret: ${GATEWAY}
admin: 127.0.0.1:0
admin_token: ${ADMIN}
providers:
  twilio: {kind: twilio_media_streams, auth_token: ["${TWILIO}", "${OLD}"], parameters: {tenant: "${CUSTOM}"}}
services: {agent: {kind: websocket, url: "wss://agent.example.com/call?token=${QUERY}", authorization: "${AGENT}"}}
routes: [{service: agent, called: "+14155550100"}]
""",
        environ=secrets,
    )
    shown = redacted(settings)
    text = json.dumps(shown)
    assert not [name for name, secret in secrets.items() if secret in text]
    assert "+14155550100" not in text
    assert ("***", "***") == (shown["secret"], shown["admin_token"])
    assert {"tenant": "***"} == shown["providers"]["twilio"]["config"]["parameters"]
    assert "wss://agent.example.com/call?token=***" == shown["services"]["agent"]["url"]
    assert 500 == shown["max_calls"]


async def test_the_configuration_in_force_is_told(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN, max_calls=7)
    status, shown = await operator.get(server, "/config")
    assert (200, 7, ADMIN) == (status, shown["max_calls"], shown["admin"])


def unpack(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1].get("done", answer[1].get("error"))
