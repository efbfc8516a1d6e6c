"""Traces: one span per stream, what it tells and what it never does, and that nothing of it runs where it is off."""

from __future__ import annotations

import asyncio
import builtins
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from gateway import config, server, tracing
from gateway.errors import ConfigError
from gateway.settings import Tracing
from gateway.stream import Stream
from gateway.tracing import CURRENT, Tracer, open_tracer
from tests.conftest import Launch
from tests.doubles import ConversationRelay, Plivo, RecordingService, TwilioMedia
from tests.test_end_to_end import MULAW, stream_url

CALLER, CALLED = "+14155550123", "+14155550199"
TRACING = {"endpoint": "http://127.0.0.1:9/v1/traces"}


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = Tracer(self.exporter)

    def finished(self) -> list[ReadableSpan]:
        self.tracer._provider.force_flush()
        return list(self.exporter.get_finished_spans())

    async def all(self, count: int) -> list[ReadableSpan]:
        for _ in range(150):
            if len(self.finished()) >= count:
                break
            await asyncio.sleep(0.02)
        found = self.finished()
        assert count == len(found)
        return found

    async def one(self) -> ReadableSpan:
        return (await self.all(1))[0]


@pytest.fixture
async def spans(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Spans]:
    """What a gateway with `tracing` exports."""
    subject = Spans()
    monkeypatch.setattr(server, "open_tracer", lambda settings: subject.tracer if settings else None)
    yield subject
    await subject.tracer.close()


def names(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return {key.removeprefix("telephony."): value for key, value in (span.attributes or {}).items()}


async def test_a_stream_is_a_span(launch: Launch, spans: Spans) -> None:
    async with RecordingService() as service:
        gateway = await launch(services={"agent": {"kind": "websocket", "url": service.url}}, tracing=TRACING)
        async with TwilioMedia(stream_url(gateway, "twilio")) as call:
            link = await service.connected()
            await call.speak(MULAW[:800])
            await link.send_audio(b"\x10\x20" * 16000)
            await link.send_audio(b"\x10\x20" * 16000)
            await asyncio.sleep(0.1)
            await link.send(type="clear")
            await link.wait_for("clear")
            await call.speak(MULAW[:800])
            await call.hangup()
        span = await spans.one()
    assert ["start", "service_connected", "first_audio_up", "first_audio_down", "barge_in", "stop"] == sorted(
        names(span), key=["start", "service_connected", "first_audio_up", "first_audio_down", "barge_in", "stop"].index
    )
    assert ("start", "stop") == (names(span)[0], names(span)[-1])
    told = attributes(span)
    assert re.fullmatch("[0-9a-f]{32}", told.pop("session"))
    assert {
        "provider": "twilio",
        "kind": "twilio_media_streams",
        "route": "route-0",
        "service": "agent",
        "result": "caller_hangup",
    } == told
    assert ("stream", SpanKind.SERVER, StatusCode.UNSET) == (span.name, span.kind, span.status.status_code)
    (cut,) = [event for event in span.events if event.name == "barge_in"]
    assert cut.attributes is not None
    assert cut.attributes["cleared_ms"] > 1000  # type: ignore[operator]


@pytest.mark.allow_errors("service_lost")
async def test_services_and_listeners_are_told_whose_work_it_is(launch: Launch, spans: Spans) -> None:
    seen: list[str | None] = []

    async def refuse(request: web.Request) -> web.Response:
        seen.append(request.headers.get("traceparent"))
        return web.Response(status=403)

    app = web.Application()
    app.router.add_get("/", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"ws://127.0.0.1:{runner.addresses[0][1]}/"
    services = {"agent": {"kind": "websocket", "url": url}, "ear": {"kind": "websocket", "url": url}}
    try:
        gateway = await launch(services=services, routes=[{"service": "agent", "listeners": ["ear"]}], tracing=TRACING)
        async with Plivo(stream_url(gateway, "plivo")) as call:
            await call.wait_closed()
        span = await spans.one()
    finally:
        await runner.cleanup()
    assert span.context is not None
    expected = f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"
    assert {expected} == {*seen}
    assert ("service_lost", StatusCode.ERROR) == (attributes(span)["result"], span.status.status_code)
    assert "service_connected" not in names(span)


async def test_a_service_that_comes_back_is_told(launch: Launch, spans: Spans) -> None:
    async with RecordingService() as service:
        gateway = await launch(services={"agent": {"kind": "websocket", "url": service.url}}, tracing=TRACING)
        async with TwilioMedia(stream_url(gateway, "twilio")) as call:
            await service.connected()
            await call.speak(MULAW[:800])
            await service.down()
            await asyncio.sleep(0.1)
            await service.up()
            await service.connected()
            await call.hangup()
        span = await spans.one()
    assert 1 == names(span).count("service_connected")
    assert 1 <= names(span).count("service_reconnected")


async def test_spans_tell_no_numbers_and_streams_do_not_mix(launch: Launch, spans: Spans) -> None:
    gateway = await launch(tracing=TRACING, services={"echo": {"kind": "echo"}})
    async with (
        ConversationRelay(stream_url(gateway, "relay"), caller=CALLER, called=CALLED),
        TwilioMedia(stream_url(gateway, "twilio"), parameters={"gw_caller": CALLER, "name": "secret"}) as other,
    ):
        await other.speak(MULAW[:1600])
        await asyncio.sleep(0.1)
        await other.hangup()
    finished = await spans.all(2)
    text = " ".join(span.to_json() for span in finished)
    for private in (CALLER[1:], CALLED[1:], "secret"):
        assert private not in text
    by = {attributes(span)["provider"]: names(span) for span in finished}
    assert {"relay", "twilio"} == by.keys()
    assert 2 == len({span.context.trace_id for span in finished if span.context})
    assert "first_audio_up" in by["twilio"]
    assert "first_audio_up" not in by["relay"]
    assert CURRENT.get() is None


async def test_off_nothing_of_it_runs(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain stream, no header, no module loaded."""
    monkeypatch.setattr(server, "TracedStream", None)
    async with RecordingService() as service:
        gateway = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        assert gateway.house.tracer is None
        async with TwilioMedia(stream_url(gateway, "twilio")) as call:
            await service.connected()
            assert {Stream} == {type(stream) for stream in gateway.streams.values()}
            await call.hangup()
    loaded = "import sys, gateway.server, gateway.cli; print([name for name in sys.modules if 'opentelemetry' in name])"
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert "[]" == done.stdout.strip()


async def test_without_the_extra_the_error_says_what_to_install(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="opentelemetry")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError) as caught:
        await launch(tracing=TRACING)
    assert 'tracing: needs an extra that is not installed (opentelemetry); pip install "telephony-audio-gateway[tracing]"' == str(
        caught.value
    )


async def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """By OTLP over HTTP, with the service's name, before the process ends."""
    bodies: list[tuple[str | None, bytes]] = []

    async def collect(request: web.Request) -> web.Response:
        bodies.append((request.content_type, await request.read()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "voice-gateway-1")
    try:
        tracer = open_tracer(Tracing(f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"))
        assert tracer is not None
        tracer.stream(provider="twilio", kind="k", session="s").end(route="sales")
        await tracer.close()
    finally:
        await runner.cleanup()
    ((content_type, body),) = bodies
    assert "application/x-protobuf" == content_type
    for text in (b"voice-gateway-1", b"telephony.route", b"sales"):
        assert text in body


async def test_a_collector_that_is_not_there_delays_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "EXPORT_SECS", 0.3)
    tracer = open_tracer(Tracing("http://127.0.0.1:9/v1/traces"))
    assert tracer is not None
    tracer.stream(provider="twilio", kind="k", session="s").end()
    async with asyncio.timeout(3):
        await tracer.close()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://x/v1/traces", "https://me:secret@collector.example/v1/traces", ""])
def test_endpoints_that_will_not_do(endpoint: str) -> None:
    document = {
        "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
        "services": {"echo": {"kind": "echo"}},
        "routes": [{"service": "echo"}],
    }
    with pytest.raises(ConfigError, match=r"tracing\.endpoint: "):
        config.parse(json.dumps({**document, "tracing": {"endpoint": endpoint}}))
    assert config.parse(json.dumps(document)).tracing is None
