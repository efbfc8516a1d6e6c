"""The simulated carrier, played against small gateways on loopback: what it reports is what happened, and it never hangs."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import providers
from gateway import speech
from gateway.callreport import CallReport
from gateway.ear import Fate
from gateway.events import (
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Outcome,
    Party,
    Say,
    Speech,
    Spoken,
    Start,
    Stop,
    Transcript,
    Unknown,
)
from gateway.media import MULAW_8K, Encoding, MediaFormat
from gateway.provider import Dial, HttpRequest, Provider, SignedRequest
from gateway.simulator import convert, simulate, simulate_many
from tests.conftest import Launch
from tests.doubles import RecordingService

TEXT = [kind for kind in providers.names() if providers.load(kind).carrier().habits.text]
AUDIO = [kind for kind in providers.names() if kind not in TEXT]
CLIP = speech.hello()
WORDS = CLIP.pcm[:8000]
"""Half a second of speech."""
QUICK: dict[str, Any] = {"hold_secs": 0.1, "reply_timeout_secs": 1.0, "connect_timeout_secs": 1.0, "close_timeout_secs": 0.3}

Send = Callable[..., Awaitable[None]]
Service = Callable[[Event, Send], Awaitable[None]]


class Gateway:
    """The least a gateway can be: one provider's codec on a socket, with `service` as the other end of the line."""

    def __init__(self, kind: str, service: Service, settings: dict[str, Any] | None = None) -> None:
        self.kind = kind
        cls = providers.load(kind)
        self.provider: Provider = cls(msgspec.convert({"auth": "none"} | (settings or {}), cls.Config))
        self.service = service
        self.events: list[Event] = []
        self.port = 0
        self.close_code: int | None = None

    async def answer(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post() or request.query).items()}
        signed = SignedRequest(request.method, str(request.url), dict(request.headers), await request.read(), form)
        answer = self.provider.answer(signed, f"ws://127.0.0.1:{self.port}/stream")
        return web.Response(text=answer.body, content_type=answer.content_type, status=answer.status)

    async def stream(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False, protocols=self.provider.subprotocols)
        await ws.prepare(request)
        codec = self.provider.codec()

        async def send(*commands: Command | str | bytes) -> None:
            for command in commands:
                for frame in [command] if isinstance(command, str | bytes) else codec.encode(command):
                    await (ws.send_str(frame) if isinstance(frame, str) else ws.send_bytes(frame))
                if isinstance(command, Stop):
                    await ws.close()

        async for message in ws:
            for event in codec.decode(message.data):
                self.events.append(event)
                await self.service(event, send)
        self.close_code = ws.close_code
        return ws

    def told(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def serving(gateway: Gateway) -> AsyncIterator[str]:
    async with listening({"/answer": gateway.answer, "/stream": gateway.stream}) as port:
        gateway.port = port
        yield f"http://127.0.0.1:{port}/answer"


@asynccontextmanager
async def listening(handlers: dict[str, Any]) -> AsyncIterator[int]:
    app = web.Application()
    for path, handler in handlers.items():
        app.router.add_route("*", path, handler)
    async with TestServer(app) as server:
        assert server.port is not None
        yield server.port


async def echo(event: Event, send: Send) -> None:
    if isinstance(event, Audio):
        await send(Audio(event.payload))


async def silence(event: Event, send: Send) -> None:
    pass


def tone(ms: float) -> bytes:
    return b"\x20" * int(ms * 8)


@pytest.mark.parametrize("kind", AUDIO)
async def test_an_echoed_call_reports_what_was_heard_and_how_late(kind: str) -> None:
    gateway, seen = Gateway(kind, echo), []
    async with serving(gateway) as url:
        report = await simulate(
            providers.load(kind),
            url=url,
            audio=WORDS,
            audio_format=CLIP.media_format,
            dtmf="1",
            jitter_ms=150,
            on_event=lambda at, direction, message: seen.append((direction, type(message))),
            **QUICK,
        )
    assert report.ok, report
    assert (kind, "caller", 1000) == (report.kind, report.ended_by, report.close_code)
    assert ("1", "1") == (report.dtmf_sent, "".join(event.digits for event in gateway.told(Dtmf)))
    assert report.echo is not None
    assert report.echo.correlation > 0.99
    assert report.latency_p50_ms is not None
    assert 0 < report.latency_p50_ms < 50
    assert report.audio_sent_ms >= 600
    assert abs(report.heard_ms - report.audio_sent_ms) <= 200
    assert (0, True) == (report.underruns, report.max_buffered_ms < 400)
    start, audio = gateway.told(Start)[0], gateway.told(Audio)
    assert isinstance(gateway.events[0], Start)
    assert (report.call_id, report.stream_id) == (start.call_id, start.stream_id)
    assert audio[0].timestamp_ms > 0
    assert {20} == {b.timestamp_ms - a.timestamp_ms for a, b in pairwise(audio)}
    assert {160} == {len(event.payload) for event in audio}
    assert providers.load(kind).carrier().habits.says_stop == bool(gateway.told(Stop))
    assert 1000 == gateway.close_code
    assert {("up", Start), ("up", Audio), ("up", Dtmf), ("down", Audio)} <= set(seen)
    assert report.recording is not None
    assert report.recording.said[:8000] == convert(convert(WORDS, CLIP.media_format, MULAW_8K), MULAW_8K, CLIP.media_format)
    fields = msgspec.json.decode(report.to_json())
    assert (True, True) == (fields["ok"], "recording" not in fields)


async def test_sixteen_bit_streams_at_sixteen_kilohertz() -> None:
    wide = MediaFormat(Encoding.PCM_S16LE, 16000)
    gateway = Gateway("plivo_audio_streaming", echo)
    async with serving(gateway) as url:
        report = await simulate(
            providers.load(gateway.kind),
            url=url.replace("http", "ws").replace("answer", "stream"),
            audio=WORDS,
            audio_format=CLIP.media_format,
            media_format=wide,
            parameters={"tenant": "a1"},
            **QUICK,
        )
    assert report.ok, report
    start = gateway.told(Start)[0]
    assert (wide, {"tenant": "a1"}) == (start.media_format, start.parameters)
    assert report.echo is not None
    assert 640 == len(gateway.told(Audio)[0].payload)


@pytest.mark.parametrize("kind", AUDIO)
async def test_checkpoints_and_clears_come_back_as_this_carrier_does_it(kind: str) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Audio(tone(60)), Checkpoint("a"), Audio(tone(400)), Checkpoint("b"))
        if isinstance(event, Checkpoint) and event.name == "a":
            await send(Audio(tone(20)), Clear(), Checkpoint("c"))

    gateway = Gateway(kind, service)
    async with serving(gateway) as url:
        report = await simulate(providers.load(kind), url=url, **QUICK | {"hold_secs": 0.4})
    assert report.ok, report
    habits = providers.load(kind).carrier().habits
    truth = [(mark.name, mark.outcome, mark.echoed) for mark in report.checkpoints]
    assert [("a", Outcome.PLAYED, True), ("b", Outcome.CLEARED, habits.echoes_cleared), ("c", Outcome.PLAYED, True)] == truth
    assert [60, 0] == [mark.played_ms for mark in report.checkpoints if mark.outcome is Outcome.PLAYED]
    (cut,) = report.clears
    assert 420 == cut.played_ms + cut.cleared_ms
    assert cut.played_ms < 300
    assert 0 == cut.time_to_silence_ms
    assert (["a", "b", "c"] if habits.echoes_cleared else ["a", "c"]) == [event.name for event in gateway.told(Checkpoint)]
    assert habits.confirms_clear == bool(gateway.told(Clear))
    assert abs(report.heard_ms - 60 - cut.played_ms) <= 1


async def test_time_to_silence_is_measured_from_the_callers_first_word() -> None:
    loud = tone(20)

    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Audio(tone(3000)))
        if isinstance(event, Audio) and event.payload == loud:
            await send(Clear())

    gateway = Gateway(AUDIO[-1], service)
    async with serving(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, audio=loud, barge_in_after_secs=0.2, **QUICK)
    assert report.ok, report
    (cut,) = report.clears
    assert cut.since_barge_in_ms is not None
    assert cut.since_barge_in_ms < 250
    assert 180 <= cut.played_ms <= 600


async def test_nobody_to_interrupt_is_said_and_ends_the_call() -> None:
    gateway = Gateway(AUDIO[-1], silence)
    async with serving(gateway) as url:
        report = await simulate(
            providers.load(gateway.kind), url=url, audio=tone(20), barge_in_after_secs=0.2, **QUICK | {"reply_timeout_secs": 0.3}
        )
    assert ["Nothing to interrupt: the caller heard no audio for 0.3 s."] == report.errors
    assert not report.ok
    assert None is report.latency_p50_ms


async def test_what_never_sounded_is_lost_with_its_checkpoint() -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Audio(tone(3000)), Checkpoint("end"))

    gateway = Gateway(AUDIO[-1], service)
    async with serving(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, **QUICK)
    assert [("end", Outcome.LOST, False)] == [(mark.name, mark.outcome, mark.echoed) for mark in report.checkpoints]
    assert 2800 < report.max_buffered_ms <= 3020


async def test_echoes_can_be_made_to_misbehave() -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(*(Checkpoint(name) for name in "abc"))

    fates = {"a": Fate(late_ms=60), "b": Fate(copies=2), "c": Fate(copies=0)}
    gateway = Gateway(AUDIO[-1], service)
    async with serving(gateway) as url:
        await simulate(providers.load(gateway.kind), url=url, fate=fates.__getitem__, **QUICK | {"hold_secs": 0.3})
    assert ["a", "b", "b"] == [event.name for event in gateway.told(Checkpoint)]


@pytest.mark.parametrize("kind", AUDIO)
async def test_bad_frames_are_refused_in_plain_words_once_per_kind_and_the_call_goes_on(kind: str) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send("no json", "no json", '{"event":"hangup"}', b"\0\1")
        await echo(event, send)

    gateway = Gateway(kind, service)
    async with serving(gateway) as url:
        report = await simulate(providers.load(kind), url=url, audio=WORDS, audio_format=CLIP.media_format, **QUICK)
    assert not report.ok
    assert [] == report.errors
    assert report.echo is not None
    assert 4 == sum(refusal.count for refusal in report.refusals)
    assert max(refusal.count for refusal in report.refusals) >= 2
    assert all(refusal.message.startswith("a real carrier would have refused: ") for refusal in report.refusals)
    assert len(report.refusals) <= 3


async def test_many_different_refusals_are_kept_bounded() -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(*(f'{{"event":"e{n}"}}' for n in range(300)))

    gateway = Gateway(AUDIO[-1], service)
    async with serving(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, **QUICK)
    assert 300 == sum(refusal.count for refusal in report.refusals)
    assert len(report.refusals) == 21


async def test_a_frame_on_a_stream_that_only_listens_is_refused() -> None:
    class Listening(providers.load("twilio_media_streams")):  # type: ignore[misc]
        @classmethod
        def dial(cls, answer: str) -> Dial:
            dial: Dial = super().dial(answer)
            return msgspec.structs.replace(dial, bidirectional=False)

    gateway = Gateway("twilio_media_streams", echo)
    async with serving(gateway) as url:
        report = await simulate(Listening, url=url, audio=tone(40), **QUICK)
    assert ["unidirectional"] == [refusal.reason for refusal in report.refusals]
    assert 0 == report.heard_ms


async def test_the_gateway_may_hang_up_first() -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Stop())

    gateway = Gateway(AUDIO[-1], service)
    async with serving(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, **QUICK | {"hold_secs": 30})
    assert (True, "gateway", 1000, True) == (report.ok, report.ended_by, report.close_code, report.duration_ms < 1000)


# --- what carriers do when a stream ends ----------------------------------------------------------------------------------


class Asked(Gateway):
    """Its streams have an action: `answers` to it, in order; None stands for another stream, "" for an empty document."""

    def __init__(self, kind: str, service: Service, answers: list[str | None], settings: dict[str, Any] | None = None) -> None:
        super().__init__(kind, service, settings)
        self.answers = answers
        self.action = "/action"
        self.asked: list[dict[str, str]] = []
        self.socket: web.WebSocketResponse

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        signed = SignedRequest.read(request.method, str(request.url), dict(request.headers), body)
        path = self.action if self.action.startswith("http") else f"http://127.0.0.1:{self.port}{self.action}"
        answer = self.provider.answer(signed, f"ws://127.0.0.1:{self.port}/stream", action_url=path)
        return web.Response(text=answer.body, content_type=answer.content_type)

    async def ask(self, request: web.Request) -> web.Response:
        self.asked.append({name: str(value) for name, value in (await request.post()).items()})
        answer = self.answers.pop(0) if self.answers else ""
        if answer is None:
            return await self.answer(request)
        return web.Response(text=f"<Response>{answer}</Response>", content_type="application/xml")

    async def stream(self, request: web.Request) -> web.WebSocketResponse:
        self.request = request
        return await super().stream(request)

    def die(self) -> None:
        assert self.request.transport is not None
        self.request.transport.abort()


@asynccontextmanager
async def asking(gateway: Asked) -> AsyncIterator[str]:
    async with listening({"/answer": gateway.answer, "/stream": gateway.stream, "/action": gateway.ask}) as port:
        gateway.port = port
        yield f"http://127.0.0.1:{port}/answer"


@pytest.mark.parametrize("kind", providers.names())
async def test_a_stream_that_the_gateway_ends_is_followed_by_what_the_action_says(kind: str) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Stop())

    gateway = Asked(kind, service, ["<Dial>+15550100009</Dial>"])
    async with asking(gateway) as url:
        report = await simulate(providers.load(kind), url=url, say=["x"], **QUICK | {"hold_secs": 30})
    assert (True, "gateway", 1000, 1) == (report.ok, report.ended_by, report.close_code, len(report.streams)), report
    assert "<Response><Dial>+15550100009</Dial></Response>" == report.ended_with
    (asked,) = gateway.asked
    assert report.call_id in asked.values()
    assert "in-progress" == asked["CallStatus"]
    assert [] == report.gaps_ms


@pytest.mark.parametrize("kind", providers.names())
async def test_the_gateway_itself_says_what_comes_after_the_service_has_ended_the_stream(launch: Launch, kind: str) -> None:
    async with RecordingService() as service:
        server = await launch(
            services={"agent": {"kind": "websocket", "url": service.url}},
            providers={"p": {"kind": kind, "auth": "none", "after": "<Dial>+15550100009</Dial>"}},
        )
        async with asyncio.TaskGroup() as group:
            url = f"http://127.0.0.1:{server.port}/p/answer"
            calling = group.create_task(simulate(providers.load(kind), url=url, say=["x"], **QUICK | {"hold_secs": 30}))
            link = await service.connected()
            await link.send(type="stop")
        report = calling.result()
    assert (True, "gateway", 1, 1000) == (report.ok, report.ended_by, len(report.streams), report.close_code), report
    assert report.ended_with is not None
    assert "<Response><Dial>+15550100009</Dial></Response>" in report.ended_with


@pytest.mark.parametrize("kind", providers.names())
async def test_a_stream_whose_socket_dies_is_followed_by_another_and_the_caller_talks_on(kind: str) -> None:
    seen: list[tuple[str, int | None]] = []

    async def service(event: Event, send: Send) -> None:
        heard = sum(isinstance(each, Audio | Transcript) for each in gateway.events)
        if isinstance(event, Audio | Transcript) and 10 <= heard and 1 == len(gateway.told(Start)) and not gateway.asked:
            gateway.die()

    gateway = Asked(kind, service, [None])
    say = ["one two three four five six", "and more of that"] * 3
    async with asking(gateway) as url:
        report = await simulate(
            providers.load(kind),
            url=url,
            audio=tone(800),
            say=say,
            on_stream=lambda stream: seen.append((stream.stream_id, stream.ended_ms)),
            **QUICK,
        )
    assert (True, "caller", 2) == (report.ok, report.ended_by, len(report.streams)), report
    first, second = gateway.told(Start)
    assert first.call_id == second.call_id == report.call_id
    assert [first.stream_id, second.stream_id] == [stream.stream_id for stream in report.streams]
    assert first.stream_id != second.stream_id
    assert [first.stream_id] * 2 + [second.stream_id] * 2 == [stream_id for stream_id, _ in seen]
    assert [True, False, True, False] == [ended is None for _, ended in seen]
    assert 1006 == report.streams[0].close_code
    assert "1006" in report.remarks[0]
    (gap,) = report.gaps_ms
    assert 0 <= gap < 5000
    if kind in AUDIO:
        received = sum(len(event.payload) for event in gateway.told(Audio)) / MULAW_8K.bytes_for(1)
        # What was on its way when the socket died is lost, too, and counted by nobody.
        assert 500 < received <= report.audio_sent_ms
        assert 900 == pytest.approx(report.audio_sent_ms + report.lost_in_gaps_ms, abs=20)
        begins = gateway.events.index(second) + 1
        after = [event.timestamp_ms for event in gateway.events[begins:] if isinstance(event, Audio)]
        assert after[0] is not None
        if kind.startswith("twilio"):
            assert 40 <= after[0] < 180, "a stream's clock is its own"
        assert {20} == {later - earlier for earlier, later in pairwise(after)}  # type: ignore[operator]
    else:
        assert "and more of that" == gateway.told(Transcript)[-1].text


async def test_one_stream_only_where_that_is_asked_for() -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Audio):
            gateway.die()

    gateway = Asked(AUDIO[0], service, [None])
    async with asking(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, follow=False, **QUICK | {"hold_secs": 30})
    assert "without a close frame (1006)" in failing(report)
    assert ([], 1, None) == (gateway.asked, len(report.streams), report.ended_with)


@pytest.mark.parametrize("kind", providers.names())
async def test_a_caller_who_hangs_up_is_no_reason_to_ask_but_relay_tells_it(kind: str) -> None:
    gateway = Asked(kind, silence, [None])
    async with asking(gateway) as url:
        report = await simulate(providers.load(kind), url=url, **QUICK)
    assert (True, "caller", 1, None) == (report.ok, report.ended_by, len(report.streams), report.ended_with)
    told = [(form["SessionStatus"], form["CallStatus"]) for form in gateway.asked]
    assert ([("completed", "completed")] if kind in TEXT else []) == told


@pytest.mark.parametrize(("stop", "status", "error"), [(True, "ended", None), (False, "failed", "64105")])
async def test_relay_tells_how_the_session_went(stop: bool, status: str, error: str | None) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await (send(Stop(handoff="to Bob")) if stop else asyncio.sleep(0))
            if not stop:
                gateway.die()

    gateway = Asked(TEXT[0], service, [])
    async with asking(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, **QUICK | {"hold_secs": 30})
    (form,) = gateway.asked
    assert (report.stream_id, status, "in-progress", error) == (
        form["SessionId"], form["SessionStatus"], form["CallStatus"], form.get("ErrorCode"),
    )  # fmt: skip
    assert ("to Bob" if stop else None) == form.get("HandoffData")
    assert form["SessionDuration"].isdecimal()
    assert "<Response></Response>" == report.ended_with


@pytest.mark.parametrize("kind", TEXT)
async def test_a_greeting_is_said_on_each_stream(kind: str) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Spoken) and 1 == len(gateway.told(Start)):
            gateway.die()

    gateway = Asked(kind, service, [None], {"welcome_greeting": "Hello."})
    async with asking(gateway) as url:
        report = await simulate(providers.load(kind), url=url, chars_per_sec=300, **QUICK | {"hold_secs": 2})
    assert ("Hello.Hello.", 2) == (report.spoken, len(report.streams)), report


async def test_an_action_that_nobody_answers_ends_the_call_after_one_more_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Audio):
            gateway.die()

    gateway, attempts = Asked(AUDIO[0], service, []), []
    request = aiohttp.ClientSession.request

    def count(self: aiohttp.ClientSession, method: str, url: str, **options: Any) -> Any:
        attempts.append(url)
        return request(self, method, url, **options)

    monkeypatch.setattr(aiohttp.ClientSession, "request", count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gateway.action = f"http://127.0.0.1:{free.getsockname()[1]}/action"
        async with asking(gateway) as url:
            report = await simulate(providers.load(gateway.kind), url=url, **QUICK | {"hold_secs": 30})
    assert 2 == len(report.errors), report.errors
    assert "1006" in report.errors[0]
    assert "nothing listens there" in report.errors[1]
    assert [url, gateway.action, gateway.action] == [each for each in attempts if each.startswith("http")]


async def test_an_action_that_answers_no_xml_is_a_carriers_complaint() -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Stop())

    gateway = Asked(AUDIO[0], service, ["<Dial>"])
    async with asking(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, **QUICK | {"hold_secs": 30})
    assert failing(report).startswith("A real carrier would have refused the answer of ")


@pytest.mark.parametrize("kind", providers.names())
async def test_a_stream_that_can_not_be_connected_is_tried_as_often_as_the_carrier_does(kind: str) -> None:
    knocked = []

    async def refuse(request: web.Request) -> web.Response:
        knocked.append(request)
        return web.Response(status=403)

    gateway = Asked(kind, silence, [None, "<Hangup/>"])
    async with listening({"/answer": gateway.answer, "/stream": refuse, "/action": gateway.ask}) as port:
        gateway.port = port
        report = await simulate(providers.load(kind), url=f"http://127.0.0.1:{port}/answer", **QUICK)
    assert (6 if kind.startswith("plivo") else 2) == len(knocked)
    assert (False, 2, 2) == (report.connected, len(report.streams), len(gateway.asked))
    assert "<Response><Hangup/></Response>" == report.ended_with
    assert "token" in report.streams[0].problem


async def test_without_an_action_the_rest_of_the_answer_follows() -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Stop())

    gateway = Gateway("plivo_audio_streaming", service, {"after": "<Speak>Bye</Speak><Hangup/>"})
    async with serving(gateway) as url:
        report = await simulate(providers.load(gateway.kind), url=url, **QUICK | {"hold_secs": 30})
    assert (True, "<Response><Speak>Bye</Speak><Hangup /></Response>") == (report.ok, report.ended_with)


@pytest.mark.parametrize("gap", [False, True])
async def test_a_caller_can_be_told_to_hang_up_also_without_a_stream(gap: bool) -> None:
    hang_up, hanging = asyncio.Event(), asyncio.Event()

    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Audio):
            await send(Stop()) if gap else hang_up.set()

    async def hang(request: web.Request) -> web.Response:
        hang_up.set()
        await hanging.wait()
        return web.Response()

    gateway = Asked(AUDIO[0], service, [])
    async with listening({"/answer": gateway.answer, "/stream": gateway.stream, "/action": hang}) as port:
        gateway.port, url = port, f"http://127.0.0.1:{port}/answer"
        report = await simulate(providers.load(gateway.kind), url=url, hang_up=hang_up, **QUICK | {"hold_secs": 30})
        hanging.set()
    assert (True, "caller") == (report.ok, report.ended_by), report
    assert report.duration_ms < 10_000


async def test_many_calls_go_by_larger_chunks_and_without_a_recording() -> None:
    gateway = Gateway("twilio_media_streams", echo)
    async with serving(gateway) as url:
        report = await simulate(TWILIO, url=url, audio=tone(400), measure=False, chunk_ms=100, **QUICK | {"hold_secs": 0.2})
    assert (True, None, None, 600) == (report.ok, report.echo, report.recording, report.audio_sent_ms), report
    assert {800} == {len(event.payload) for event in gateway.told(Audio)}


# --- carriers of text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXT)
async def test_a_conversation_in_words(kind: str) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Transcript) and event.final:
            await send(Say("You said", final=False), Say(f" {event.text}"))
            if event.text == "bye now":
                await send(Dtmf("7"))

    gateway = Gateway(kind, service)
    async with serving(gateway) as url:
        report = await simulate(
            providers.load(kind), url=url, say=["my order please", "bye now"], dtmf="5", chars_per_sec=300, **QUICK
        )
    assert report.ok, report
    assert ["my order please", "bye now"] == report.said
    assert "You said my order pleaseYou said bye now" == report.spoken
    assert ("7", "5", "caller") == (report.dtmf_heard, report.dtmf_sent, report.ended_by)
    assert "You said my order pleaseYou said bye now7" == "".join(event.text for event in gateway.told(Spoken))
    assert [("my order", False), ("my order please", True), ("bye now", False), ("bye now", True)] == [
        (event.text, event.final) for event in gateway.told(Transcript)
    ]
    for party in Party:
        assert [True, False] * 2 == [event.active for event in gateway.told(Speech) if event.who is party]


@pytest.mark.parametrize("kind", TEXT)
async def test_the_last_turn_interrupts_in_the_recorded_order(kind: str) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(Say("One long sentence that nobody will ever hear whole"))

    gateway = Gateway(kind, service)
    async with serving(gateway) as url:
        report = await simulate(
            providers.load(kind), url=url, say=["stop it"], barge_in_after_secs=0.3, **QUICK | {"reply_timeout_secs": 0.6}
        )
    assert report.ok, report
    expected = [Speech, Speech, Spoken, BargeIn, Transcript, Speech, Speech, Transcript]
    assert expected == [type(event) for event in gateway.events if not isinstance(event, Start | Unknown)]
    (cut,) = gateway.told(BargeIn)
    assert cut.heard == report.spoken.strip()
    assert report.spoken.startswith("One")
    assert 200 < cut.after_ms < 1500


@pytest.mark.parametrize("kind", TEXT)
async def test_an_end_message_closes_after_a_moment(kind: str) -> None:
    class Ends(Gateway):
        async def stream(self, request: web.Request) -> web.WebSocketResponse:
            ws, codec = web.WebSocketResponse(), self.provider.codec()
            await ws.prepare(request)
            list(codec.decode(await ws.receive_str()))
            for frame in codec.encode(Stop()):
                await ws.send_str(str(frame))
            sent = time.monotonic()
            await ws.receive()
            assert 0.08 < time.monotonic() - sent < 2
            self.close_code = ws.close_code
            return ws

    gateway = Ends(kind, silence)
    async with serving(gateway) as url:
        report = await simulate(providers.load(kind), url=url, say=["x"], **QUICK | {"hold_secs": 30})
    assert (True, "gateway", 1000, 1000) == (report.ok, report.ended_by, report.close_code, gateway.close_code)


@pytest.mark.parametrize("kind", TEXT)
async def test_ten_bad_frames_in_a_row_end_a_text_call(kind: str) -> None:
    async def service(event: Event, send: Send) -> None:
        if isinstance(event, Start):
            await send(*["{}"] * 9, Say("fine"), *["{}"] * 10)

    gateway = Gateway(kind, service)
    async with serving(gateway) as url:
        report = await simulate(providers.load(kind), url=url, **QUICK | {"hold_secs": 30})
    assert [19] == [refusal.count for refusal in report.refusals]
    assert "1007" in report.errors[0]
    assert 1007 == gateway.close_code


# --- what goes wrong ----------------------------------------------------------------------------------------------------

TWILIO = providers.load("twilio_media_streams")


def failing(report: CallReport) -> str:
    assert (False, 1) == (report.ok, len(report.errors))
    return report.errors[0]


@pytest.mark.parametrize("scheme", ["http", "ws"])
async def test_nobody_listens(scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        report = await simulate(TWILIO, url=f"{scheme}://127.0.0.1:{port}/x/answer", **QUICK)
    assert f"{scheme}://127.0.0.1:{port} refused the connection: nothing listens there." in failing(report)
    assert not report.connected


@pytest.mark.parametrize(
    ("status", "says"),
    [(403, "not signed"), (404, "no such path"), (503, "draining or full"), (500, "HTTP 500")],
)
async def test_a_webhook_that_says_no(status: int, says: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with listening({"/answer": handler}) as port:
        report = await simulate(TWILIO, url=f"http://127.0.0.1:{port}/answer", **QUICK)
    assert says in failing(report)


@pytest.mark.parametrize(("status", "says"), [(403, "token"), (404, "no such path"), (200, "in place of 101")])
async def test_a_stream_that_says_no(status: int, says: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with listening({"/secret-token": handler}) as port:
        report = await simulate(TWILIO, url=f"ws://127.0.0.1:{port}/secret-token", **QUICK)
    assert says in failing(report)
    assert "secret-token" not in failing(report)


async def test_redirects_of_a_stream_are_not_followed() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPFound("/elsewhere")

    async with listening({"/stream": handler, "/elsewhere": Gateway(AUDIO[-1], echo).stream}) as port:
        report = await simulate(TWILIO, url=f"ws://127.0.0.1:{port}/stream", **QUICK)
    assert "redirect, which carriers do not follow" in failing(report)


async def test_an_answer_that_names_no_stream() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text="<Response><Say>Hello</Say></Response>", content_type="application/xml")

    async with listening({"/answer": handler}) as port:
        report = await simulate(TWILIO, url=f"http://127.0.0.1:{port}/answer", **QUICK)
    assert failing(report).startswith(f"A real carrier would have refused the answer of http://127.0.0.1:{port}: ")


@pytest.mark.parametrize("scheme", ["http", "ws"])
async def test_a_server_that_never_answers_is_given_up(scheme: str) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        report = await simulate(TWILIO, url=f"{scheme}://127.0.0.1:{port}/", **QUICK | {"connect_timeout_secs": 0.2})
    assert "did not answer within 0.2 s" in failing(report)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://localhost/x", "http://", "ws://127.0.0.1:99999/"])
async def test_no_url_at_all(url: str) -> None:
    assert "is no URL to call" in failing(await simulate(TWILIO, url=url, **QUICK))


async def test_a_socket_that_goes_away_without_a_close_frame() -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.receive()
        assert request.transport is not None
        request.transport.abort()
        return ws

    async with listening({"/stream": handler}) as port:
        report = await simulate(TWILIO, url=f"ws://127.0.0.1:{port}/stream", **QUICK | {"hold_secs": 30})
    assert "without a close frame (1006)" in failing(report)
    assert ("gateway", 1006) == (report.ended_by, report.close_code)


async def test_a_close_frame_that_is_never_answered_does_not_hang_the_caller() -> None:
    release = asyncio.Event()

    async def handler(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(autoclose=False)
        await ws.prepare(request)
        await release.wait()
        return ws

    async with listening({"/stream": handler}) as port:
        report = await simulate(TWILIO, url=f"ws://127.0.0.1:{port}/stream", **QUICK)
        release.set()
    assert "did not answer the close frame within 0.3 s" in failing(report)


async def test_a_broken_websocket_frame() -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        assert request.transport is not None
        request.transport.write(b"\xff\xff\xff\xff")
        await ws.receive()
        return ws

    async with listening({"/stream": handler}) as port:
        report = await simulate(TWILIO, url=f"ws://127.0.0.1:{port}/stream", **QUICK | {"hold_secs": 30})
    assert any("broke the WebSocket protocol" in error for error in report.errors)


async def test_the_longest_call_is_cut() -> None:
    gateway = Gateway("twilio_media_streams", echo)
    async with serving(gateway) as url:
        report = await simulate(TWILIO, url=url, **QUICK | {"hold_secs": 60, "longest_call_secs": 0.3})
    assert "still running after 0.3 s" in failing(report)
    assert report.heard_ms > 0


async def test_the_webhook_can_be_signed() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers["X-Signature"])
        return web.Response(status=403)

    def sign(request: HttpRequest) -> HttpRequest:
        return msgspec.structs.replace(request, headers={**request.headers, "X-Signature": "s"})

    async with listening({"/answer": handler}) as port:
        await simulate(TWILIO, url=f"http://127.0.0.1:{port}/answer", sign=sign, **QUICK)
    assert ["s"] == seen


async def test_many_calls_at_once() -> None:
    gateway, progress = Gateway("twilio_media_streams", echo), []
    async with serving(gateway) as url:
        reports = await simulate_many(
            20,
            lambda index: simulate(TWILIO, url=url, audio=WORDS, audio_format=CLIP.media_format, call_id=f"c{index}", **QUICK),
            ramp_secs=0.2,
            on_progress=lambda started, finished: progress.append((started, finished)),
        )
    assert [f"c{index}" for index in range(20)] == [report.call_id for report in reports]
    assert all(report.ok for report in reports), [report.errors for report in reports]
    assert ((1, 0), (20, 20)) == (progress[0], progress[-1])


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 96000, 6000])
def test_recordings_of_any_rate_can_be_said(rate: int) -> None:
    sine = (10000 * np.sin(np.arange(rate) * 2 * np.pi * 440 / rate)).astype("<i2").tobytes()
    assert abs(len(convert(sine, MediaFormat(Encoding.PCM_S16LE, rate), MULAW_8K)) - 8000) <= 1


def test_every_provider_is_simulated_here() -> None:
    assert set(providers.names()) == {*AUDIO, *TEXT}
    assert AUDIO
    assert TEXT
