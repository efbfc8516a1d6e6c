"""A gateway that is told to end: no new calls, those that there are go on for a while, nobody is cut off without a word."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.server import AFTERMATH_SECS, Server
from tests.doubles import RecordingService, TwilioMedia
from tests.test_doctor import free_port
from tests.test_end_to_end import MULAW
from tests.test_reload import sid

MULAW_8K = {"encoding": "mulaw", "sample_rate": 8000}
OVERFLOW = '<Reject reason="busy"/>'


class Gateway:
    """The real program, with an operators' listener."""

    def __init__(self, path: Path, arguments: tuple[str, ...] = (), **options: Any) -> None:
        self.port, self.admin = free_port(), free_port()
        self.path = path
        self.arguments = arguments
        self.document: dict[str, Any] = {
            "listen": f"127.0.0.1:{self.port}",
            "admin": f"127.0.0.1:{self.admin}",
            "max_calls_per_second": 100_000,
            "max_cpu_percent": 100,
            "max_host_cpu_percent": 100,
            "max_memory_percent": 100,
            "providers": {
                "twilio": {"kind": "twilio_media_streams", "auth": "none", "overflow": OVERFLOW, "after": "<Say>Bye</Say>"}
            },
            "services": {"echo": {"kind": "echo"}},
            "routes": [{"service": "echo"}],
            **options,
        }
        self.write()
        self.process: asyncio.subprocess.Process
        self.log = path.with_suffix(".log")

    def write(self, **changes: Any) -> None:
        self.document |= changes
        self.path.write_text(json.dumps(self.document))

    async def start(self) -> None:
        """Run it, and return once it is ready."""
        with self.log.open("ab") as log:
            arguments = ("-m", "gateway", "serve", "--config", str(self.path), *self.arguments)
            self.process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=log)
        async with asyncio.timeout(40):
            while not await self.ready():
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.05)

    async def ready(self) -> bool:
        try:
            return (await self.ask("/readyz"))[0] == 200
        except aiohttp.ClientError:
            return False

    async def ask(self, path: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
        """Of the operators' listener."""
        url = f"http://127.0.0.1:{self.admin}{path}"
        async with aiohttp.ClientSession() as http, http.request(method, url, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def webhook(self, path: str, call_sid: str) -> str:
        form = {"CallSid": call_sid, "From": "+15550001", "To": "+15550002"}
        url = f"http://127.0.0.1:{self.port}/twilio/{path}"
        async with aiohttp.ClientSession() as http, http.post(url, data=form) as response:
            return await response.text()

    async def stream_url(self, call_sid: str) -> str:
        return (await self.webhook("answer", call_sid)).partition('url="')[2].partition('"')[0]

    async def ended(self, within_secs: float = 20.0) -> int:
        return await asyncio.wait_for(self.process.wait(), within_secs)

    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@asynccontextmanager
async def running(path: Path, *arguments: str, **options: Any) -> AsyncIterator[Gateway]:
    gateway = Gateway(path / "gateway.json", arguments, **options)
    try:
        await gateway.start()
        yield gateway
    finally:
        for _ in range(2):  # at once
            with suppress(ProcessLookupError):
                gateway.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.05)
        await asyncio.wait_for(gateway.process.wait(), 30)


async def until(condition: Callable[[], bool], within_secs: float = 10.0) -> None:
    async with asyncio.timeout(within_secs):
        while not condition():  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.02)


def agent(service: RecordingService) -> dict[str, Any]:
    options = {"kind": "websocket", "url": service.url, "media_format": MULAW_8K}
    return {"services": {"agent": options}, "routes": [{"service": "agent"}]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_o2_a_call_goes_on_and_the_process_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """Not ready at once, new calls hear `overflow`, the live one is whole, and its carrier is told what comes next."""
    async with RecordingService() as service, running(tmp_path, **agent(service)) as gateway:
        call = TwilioMedia(await gateway.stream_url(sid(1)), call_sid=sid(1))
        async with call:
            link = await service.connected()
            await call.speak(MULAW[:1600])
            gateway.process.send_signal(number)
            await until(lambda: any(entry["event"] == "draining" for entry in gateway.events()))
            status, readiness = await gateway.ask("/readyz")
            assert (503, ["draining"]) == (status, [each["reason"] for each in readiness["reasons"]])
            assert OVERFLOW in await gateway.webhook("answer", sid(2))
            await call.speak(MULAW[1600:8000])
            await link.wait_for("start")
            await until(lambda: MULAW[1600:7800] in link.audio)  # the rest is no whole frame
            assert gateway.process.returncode is None
            await call.hangup()
            assert "caller_hangup" == (await link.wait_for("stop"))["reason"]
        assert "<Say>Bye</Say>" in await gateway.webhook("action", sid(1))
        assert 0 == await gateway.ended()
        assert [] == call.violations
    assert ["caller_hangup"] == [entry["reason"] for entry in gateway.events() if entry["event"] == "stream_ended"]


async def test_o2_at_the_deadline_calls_are_ended_and_told_why(tmp_path: Path) -> None:
    async with RecordingService() as service, running(tmp_path, drain_secs=0.5, **agent(service)) as gateway:
        call = TwilioMedia(await gateway.stream_url(sid(1)), call_sid=sid(1))
        async with call:
            link = await service.connected()
            await call.speak(MULAW[:1600])
            gateway.process.send_signal(signal.SIGTERM)
            assert "drain" == (await link.wait_for("stop", timeout=10))["reason"]
            await until(lambda: call.close_code is not None)
            assert 1001 == call.close_code
        assert "<Say>Bye</Say>" in await gateway.webhook("action", sid(1))
        assert 0 == await gateway.ended()
    assert [] == call.violations


async def test_o2_a_second_signal_is_at_once(tmp_path: Path) -> None:
    async with RecordingService() as service, running(tmp_path, drain_secs=3600, **agent(service)) as gateway:
        call = TwilioMedia(await gateway.stream_url(sid(1)), call_sid=sid(1))
        async with call:
            link = await service.connected()
            gateway.process.send_signal(signal.SIGTERM)
            await until(lambda: any(entry["event"] == "draining" for entry in gateway.events()))
            await asyncio.sleep(0.3)
            assert gateway.process.returncode is None
            gateway.process.send_signal(signal.SIGTERM)
            assert "drain" == (await link.wait_for("stop"))["reason"]
            await until(lambda: call.close_code is not None)
            assert 1001 == call.close_code
        assert 0 == await gateway.ended()


async def test_o2_without_a_call_the_end_is_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, drain_secs=3600) as gateway:
        gateway.process.send_signal(signal.SIGTERM)
        assert 0 == await gateway.ended(10)


async def test_o2_an_announced_call_is_waited_for(tmp_path: Path) -> None:
    """Its webhook was answered: its stream is on its way."""
    async with running(tmp_path, drain_secs=3600) as gateway:
        url = await gateway.stream_url(sid(1))
        gateway.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        async with TwilioMedia(url, call_sid=sid(1)) as call:
            await call.speak(MULAW[:1600])
            await call.hangup()
        assert 0 == await gateway.ended()


async def test_o2_an_operators_drain_ends_no_process(tmp_path: Path) -> None:
    """Whoever asked for it has more to do before it goes, or thinks better of it and restarts it."""
    async with running(tmp_path) as gateway:
        assert 202 == (await gateway.ask("/drain", "POST"))[0]
        assert 503 == (await gateway.ask("/readyz"))[0]
        assert OVERFLOW in await gateway.webhook("answer", sid(1))
        await asyncio.sleep(AFTERMATH_SECS + 0.5)
        assert gateway.process.returncode is None
        gateway.process.send_signal(signal.SIGTERM)
        assert 0 == await gateway.ended(10)


@pytest.mark.parametrize("whose", ["aiohttp's", pytest.param("ours", marks=pytest.mark.allow_errors("request_failed"))])
async def test_a_request_that_ends_as_it_is_no_longer_waited_for_is_no_error(
    launch: Any, log: list[Any], monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    async def ends(server: Server, request: web.Request) -> web.Response:
        waiter = asyncio.get_running_loop().create_future()
        waiter.cancel()
        if whose == "ours":
            waiter.set_result(None)
        request.protocol._handler_waiter = waiter  # what a shutdown leaves there when its time is up
        return web.Response()

    monkeypatch.setattr(Server, "_status", ends)
    server = await launch()
    async with aiohttp.ClientSession() as http:
        with suppress(aiohttp.ClientError):
            await http.post(f"http://127.0.0.1:{server.port}/twilio/status", data={"CallSid": sid(1)})
    await asyncio.sleep(0.05)
    assert (whose == "ours") is any(entry["event"] == "request_failed" for entry in log)


async def test_a_stream_that_nobody_ends_does_not_keep_a_draining_server(launch: Any) -> None:
    """`finish` returns though the carrier answers nothing."""
    server: Server = await launch()
    async with aiohttp.ClientSession() as http, http.ws_connect(f"ws://127.0.0.1:{server.port}/twilio/stream"):
        await until(lambda: bool(server.streams))
        server.drain()
        await asyncio.wait_for(server.finish(0.1), 10)
