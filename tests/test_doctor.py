"""The doctor finds a healthy gateway healthy, names each fault with the sentence that mends it, never hangs, never disturbs."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway import config, doctor
from gateway.cli import make_server
from gateway.doctor import Finding
from gateway.settings import Settings
from tests.conftest import Launch
from tests.doubles import RecordingService
from tests.test_tls import Files

SECRET = "3d1e8b60c4f7a92e5b08d6c17f4a3e92"
TOKEN = "0123456789abcdef0123456789abcdef"
SIGNED: dict[str, Any] = {
    "twilio": {"kind": "twilio_media_streams", "auth_token": TOKEN},
    "relay": {"kind": "twilio_conversation_relay", "auth_token": TOKEN},
    "plivo": {"kind": "plivo_audio_streaming", "auth_token": TOKEN},
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def document(port: int, **changes: Any) -> dict[str, Any]:
    return {
        "listen": f"127.0.0.1:{port}",
        "public_url": f"http://127.0.0.1:{port}",
        "secret": SECRET,
        "providers": SIGNED,
        "services": {"echo": {"kind": "echo"}},
        "routes": [{"service": "echo"}],
        "max_calls": 50,
        **changes,
    }


def settings(port: int, **changes: Any) -> Settings:
    return config.parse(json.dumps(document(port, **changes)))


async def examine(what: Settings) -> dict[str, Finding]:
    providers = make_server(what).providers
    return {finding.check: finding async for finding in doctor.examine(what, providers)}


def bad(findings: dict[str, Finding]) -> list[str]:
    assert all(finding.fix.endswith(".") == (finding.level != "ok") for finding in findings.values())
    return [check for check, finding in findings.items() if finding.level != "ok"]


async def test_a_healthy_gateway_is_healthy_and_not_disturbed(launch: Launch) -> None:
    port = free_port()
    async with RecordingService() as service:
        services = {"agent": {"kind": "websocket", "url": service.url}}
        server = await launch(**document(port, services=services, routes=[{"service": "agent"}]))
        findings = await examine(server.settings)
        await asyncio.sleep(0.05)
        assert not service.links
    assert [] == bad(findings)
    for name in SIGNED:
        checks = {check.partition(": ")[2] for check in findings if check.startswith(f"{name}: ")}
        assert {"auth", "wrong signature", "webhook", "instance", "wrong upgrade", "upgrade"} == checks
    admission = server.house.door.admission
    assert (0, 0, len(SIGNED)) == (admission.pending, admission.active, admission.calls)
    assert not server.streams


async def test_the_certificate_is_looked_at(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, port = Files(tmp_path), free_port()
    changes = {"public_url": f"https://localhost:{port}", "tls": files.options}
    server = await launch(**document(port, **changes))
    strange = await examine(server.settings)
    assert ["tls"] == bad(strange)
    assert "whole chain" in strange["tls"].fix
    monkeypatch.setenv("SSL_CERT_FILE", str(files.trusted))
    findings = await examine(server.settings)
    assert [] == bad(findings)
    assert "days left" in findings["tls"].text
    elsewhere = {"public_url": f"https://localhost:{port}/prefix", "tls": files.options}
    assert "not found" in (await examine(settings(port, **elsewhere)))["twilio: webhook"].text


@pytest.mark.parametrize(
    ("theirs", "ours", "check", "sentence"),
    [
        ({}, {"secret": SECRET[::-1]}, "twilio: instance", "forged to our secret"),
        ({}, {"providers": {"twilio": SIGNED["twilio"] | {"auth_token": "another"}}}, "twilio: webhook", "another token"),
        ({"providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}}}, {}, "twilio: wrong signature", "let in"),
        ({"public_url": "https://voice.example.com"}, {}, "twilio: webhook", "not what was signed"),
        ({"max_pending_per_address": 1}, {}, "", ""),
    ],
)
async def test_two_gateways_that_are_not_of_one_mind(
    launch: Launch, theirs: dict[str, Any], ours: dict[str, Any], check: str, sentence: str
) -> None:
    port = free_port()
    only = {"providers": {"twilio": SIGNED["twilio"]}}
    await launch(**document(port, **only | theirs))
    findings = await examine(settings(port, **only | ours))
    assert ([check] if check else []) == bad(findings)[:1]
    assert not check or sentence in findings[check].text


async def test_a_full_gateway_is_a_warning(launch: Launch) -> None:
    port = free_port()
    server = await launch(**document(port, max_calls=1))
    findings = await examine(server.settings)
    assert {"relay: stream", "plivo: stream"} == set(bad(findings))
    assert {"warning"} == {findings[check].level for check in bad(findings)}


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def answering(handler: Handler, port: int) -> web.AppRunner:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner


@pytest.mark.parametrize("status", [200, 302, 404, 502])
async def test_something_else_answers(status: int) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=status, text="<html>welcome</html>", headers={"Location": "/elsewhere"})

    port = free_port()
    runner = await answering(handler, port)
    try:
        findings = await examine(settings(port))
    finally:
        await runner.cleanup()
    assert {"twilio", "relay", "plivo"} <= {check.partition(":")[0] for check in bad(findings)}


async def test_a_proxy_that_knows_no_websockets(launch: Launch) -> None:
    inner, outer = free_port(), free_port()
    server = await launch(**document(inner, public_url=f"http://127.0.0.1:{outer}"))

    async def forward(request: web.Request) -> web.Response:
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in ("upgrade", "connection", "host")
        }
        url = f"http://127.0.0.1:{inner}{request.raw_path}"
        async with (
            aiohttp.ClientSession() as http,
            http.request(request.method, url, headers=headers, data=await request.read()) as response,
        ):
            return web.Response(status=response.status, body=await response.read(), content_type=response.content_type)

    runner = await answering(forward, outer)
    try:
        findings = await examine(server.settings)
    finally:
        await runner.cleanup()
    for name in SIGNED:
        assert "does not pass WebSockets" in findings[f"{name}: upgrade"].text
        assert "ok" == findings[f"{name}: webhook"].level


async def test_who_never_answers_does_not_hold_the_doctor_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    monkeypatch.setattr(doctor, "ANSWER_SECS", 0.2)
    monkeypatch.setattr(doctor, "WHOLE_SECS", 1.0)
    port = free_port()
    runner = await answering(handler, port)
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        findings = await examine(settings(port))
    finally:
        await runner.cleanup()
    assert loop.time() - began < 3
    assert "no answer within 0.2 s" in findings["twilio: wrong signature"].text


async def test_nobody_listens_there() -> None:
    findings = await examine(settings(free_port()))
    assert ["tcp"] == bad(findings)
    assert "Start the proxy or the gateway" in findings["tcp"].fix


async def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", nothing)
    findings = await examine(settings(8080, public_url="https://voice.example.com", trusted_proxies=["127.0.0.1"]))
    assert ["dns"] == bad(findings)


@pytest.mark.parametrize(
    ("changes", "check", "level"),
    [
        ({"secret": "a" * 40}, "secret", "warning"),
        ({"secret": "0123456789abcdef"}, "secret", "warning"),
        ({"secret": SECRET}, "secret", "ok"),
        ({"admin": "0.0.0.0:9090", "admin_token": "a" * 32}, "admin", "warning"),
        ({"admin": "0.0.0.0:9090", "admin_token": SECRET}, "admin", "ok"),
        ({"admin": "127.0.0.1:9090"}, "admin", "ok"),
        ({"public_url": "https://voice.example.com"}, "trusted_proxies", "warning"),
        ({"public_url": "https://voice.example.com", "trusted_proxies": ["10.0.0.0/8"]}, "trusted_proxies", "ok"),
        ({"max_calls": 100_000}, "file descriptors", "error"),
        ({"providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}}}, "twilio: auth", "warning"),
        (
            {
                "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
                "public_url": "https://voice.example.com",
            },
            "twilio: auth",
            "error",
        ),
    ],
)
async def test_what_the_configuration_tells(
    changes: dict[str, Any], check: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    monkeypatch.setattr(doctor, "WHOLE_SECS", 0.0)  # what is outside is not looked at here
    findings = await examine(settings(8080, **changes))
    assert level == findings[check].level


@pytest.mark.parametrize(
    ("seconds", "level"), [(0.0, "ok"), (3.0, "warning"), (-3.5, "warning"), (20.0, "error"), (-90.0, "error")]
)
def test_clocks_that_differ(seconds: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.time, "time", lambda: 1_795_000_000.5 + seconds)
    finding = doctor._skew({"Date": formatdate(1_795_000_000, usegmt=True)})
    assert finding is not None
    monkeypatch.undo()
    assert level == finding.level, finding
    assert doctor._skew({"Date": "yesterday"}) is None


async def test_the_command_says_it_in_json_and_by_its_exit_code(launch: Launch, tmp_path: Path) -> None:
    port = free_port()
    server = await launch(**document(port))
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps(document(port)))
    code, findings = await run_doctor(path)
    assert (0, {"ok"}) == (code, {finding["level"] for finding in findings})
    await server.stop()
    code, findings = await run_doctor(path)
    assert 1 == code
    assert "tcp" == findings[-1]["check"]
    assert SECRET not in str(findings)
    assert TOKEN not in str(findings)


async def run_doctor(path: Path, **environ: str) -> tuple[int | None, list[dict[str, str]]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "doctor", "--config", str(path),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=os.environ | environ,
    )  # fmt: skip
    out, err = await process.communicate()
    assert b"" == err
    return process.returncode, [json.loads(line) for line in out.splitlines()]
