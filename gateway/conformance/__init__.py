"""Is somebody's service right? Plays the gateway's side of the service protocol against it, by real links on scripted calls.

`examine` runs every scene and gives one `Result` for each of `CHECKS`. What a service never does can't be wrong: it is not
applicable. The checks are independent of each other, so that one fault of a service fails the check that is about it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np
from msgspec import UNSET

from gateway import __version__, events, speech
from gateway.audio.g711 import encode_mulaw, pcm16_to_mulaw
from gateway.conformance.call import ScriptedCall, TapDialler, scripted_call
from gateway.conformance.checks import CHECKS, GROUPS, TEXTS_PER_SEC, Check, Outcome, Report, Result
from gateway.conformance.seen import (
    about_numbers,
    acks,
    flow_state,
    frames,
    how_it_closed,
    leaves_out,
    meaningful,
    mistakes,
    mixed_calls,
    most_texts_per_sec,
    odd_sizes,
    paused_at,
    readies,
)
from gateway.conformance.wire import CONNECT_SECS, Wire, probe, what_it_answered
from gateway.events import (
    BargeIn,
    Checkpoint,
    Clear,
    Dtmf,
    Event,
    Fault,
    Flow,
    FlowState,
    Gap,
    GapReason,
    Party,
    Speech,
    Spoken,
    StopReason,
    Transcript,
)
from gateway.media import Encoding, MediaFormat, Track
from gateway.services.dialler import Unreachable
from gateway.services.framed import SUBPROTOCOL_FRAMED
from gateway.services.native import SUBPROTOCOL_RAW, Resume
from gateway.services.websocket import READY_SECS
from gateway.settings import WebsocketService

__all__ = ["CHECKS", "GROUPS", "PCM_16K", "Check", "Progress", "Report", "Result", "examine"]

PCM_16K = MediaFormat(Encoding.PCM_S16LE, 16000)
FRAME_SIZES = (10, 20, 40, 60, 100)
SCENE_SECS = 45.0
AT_ONCE = 4
"""Scenes that run side by side."""

SETTLE_SECS = 0.3
"""How long a service is watched after something that could upset it."""

AFTER_PAUSE_MS = 30_000
"""Audio that may still come when a service was told to pause: what was on its way, and a long sentence."""

WORDS: tuple[Event, ...] = (
    Transcript("Where is my", final=False, language="en-US"),
    Transcript("Where is my order?", language="en-US"),
    Speech(Party.CALLER, True),
    Speech(Party.AGENT, False),
    Spoken("Your order is on its way."),
    Gap(2400, Track.OUTBOUND, GapReason.OVERFLOW),
)
"""What has no check of its own. Most of it belongs to streams of text; a service may still not fall over it."""

Progress = Callable[[int, int, str], None]
"""Called with scenes done, scenes in all, and the name of the scene that was done last."""


async def examine(
    url: str,
    *,
    formats: tuple[MediaFormat, ...] = (PCM_16K,),
    frame_ms: Literal[10, 20, 40, 60, 100] = 20,
    authorization: str | None = None,
    calls: int = 20,
    idle_secs: float = 3.0,
    at_once: int = AT_ONCE,
    only: Collection[str] = (),
    scenes: Collection[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Runs every check against the service at `url` (ws:// or wss://). Never raises for what the service does.

    formats — asked for one by one in `format`; the first is that of all other calls. authorization — the bearer token.
    calls — how many at once in the checks of many calls. idle_secs — how long a call says nothing in `idle`.
    at_once — scenes side by side. only — names of checks, and nothing else is looked at.
    scenes — those of `SCENES` to play; default: all that `only` needs.
    """
    dialler = TapDialler(f"telephony-gateway-conformance/{__version__}")
    service = WebsocketService(
        url,
        media_format=formats[0],
        frame_ms=frame_ms,
        authorization=authorization,
        connect_timeout_secs=CONNECT_SECS,
        give_up_secs=2.0,
    )
    bench = _Bench(dialler, service, formats, calls, idle_secs)
    try:
        await bench.run(at_once, _scenes(set(only), scenes), progress)
    finally:
        await dialler.close()
    return Report(url, bench.mode, [result for result in bench.results() if not only or result.check in only])


class _Bench:
    """One examination: the service, and what is known of it so far."""

    def __init__(
        self, dialler: TapDialler, service: WebsocketService, formats: tuple[MediaFormat, ...], calls: int, idle_secs: float
    ) -> None:
        self._dialler = dialler
        self._service = service
        self._formats = formats
        self._calls = calls
        self._idle_secs = idle_secs
        self._verdicts: dict[str, tuple[Outcome, str]] = {}
        self._seen: list[ScriptedCall] = []
        self.mode: str | None = None
        clip = speech.hello()
        self._clip = pcm16_to_mulaw(clip.pcm) if clip.media_format.sample_rate == 8000 else b""

    # --- verdicts ---

    def passed(self, name: str) -> None:
        if self._verdicts.get(name, ("",))[0] != "failed":
            self._verdicts[name] = ("passed", "")

    def failed(self, name: str, detail: str) -> None:
        if self._verdicts.get(name, ("",))[0] != "failed":
            self._verdicts[name] = ("failed", detail)

    def spared(self, name: str, why: str) -> None:
        self._verdicts.setdefault(name, ("not applicable", why))

    def judge(self, name: str, good: object, detail: str) -> None:
        if good:
            self.passed(name)
        else:
            self.failed(name, detail)

    def results(self) -> list[Result]:
        results = []
        for check in CHECKS:
            outcome, detail = self._verdicts.get(check.name, ("not applicable", "it was never reached"))
            advice = check.advice if outcome == "failed" else ""
            results.append(Result(check.name, check.title, outcome, detail, advice))
        return results

    # --- course ---

    async def run(self, at_once: int, names: list[str], progress: Progress | None) -> None:
        done = 0

        def tell(name: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(names) + 1, name)

        await self._handshake()
        tell("handshake")
        if self.mode is None:
            for check in CHECKS:
                self.spared(check.name, "there was no connection")
            return
        room = asyncio.Semaphore(at_once)

        async def play(name: str, scene: Callable[[], Awaitable[None]]) -> None:
            async with room:
                try:
                    async with asyncio.timeout(SCENE_SECS):
                        await scene()
                except TimeoutError:
                    self._broke_off(name, f"it was not over after {SCENE_SECS:g} s")
                except (Unreachable, ConnectionError) as error:
                    self._broke_off(name, str(error))
                except ExceptionGroup as group:
                    gone, others = group.split((Unreachable, ConnectionError))
                    if others is not None or gone is None:
                        raise
                    self._broke_off(name, _first_of(gone))
                tell(name)

        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(play(name, getattr(self, f"_{name.replace('-', '_')}")))
        self._sum_up()

    def _broke_off(self, scene: str, why: str) -> None:
        for name in SCENES[scene]:
            self.failed(name, why)

    def _call(self, *, service: WebsocketService | None = None, **options: Any) -> AbstractAsyncContextManager[ScriptedCall]:
        return scripted_call(self._dialler, service or self._service, watch=self._seen.append, **options)

    def _wire(self) -> Wire:
        return Wire(self._dialler, self._service, framed=self.mode == "framed")

    def _changed(self, **fields: Any) -> WebsocketService:
        return msgspec.structs.replace(self._service, **fields)

    def _survived(self, name: str, call: ScriptedCall, what: str) -> None:
        """The verdict on a call during which something happened, once it is over."""
        if call.lost is not None and not call.taps:
            self.failed(name, call.lost)
        elif call.trouble is not None:
            self.failed(name, f"{what}: it {how_it_closed(call.trouble)}")
        elif call.lost is not None:
            self.failed(name, call.lost)
        elif call.ended_it:
            self.spared(name, "it ended the call by itself before")
        else:
            self.passed(name)

    async def _survives(
        self, name: str, what: str, upset: Callable[[ScriptedCall], Awaitable[None]] | None = None, **options: Any
    ) -> None:
        """A call with something upsetting in the middle of it."""
        async with self._call(**options) as call:
            await self._taken(call)
            await call.speak(100, self._clip)
            if upset is not None:
                await upset(call)
            await call.speak(100, self._clip)
            await asyncio.sleep(SETTLE_SECS)
        self._survived(name, call, what)

    async def _taken(self, call: ScriptedCall) -> None:
        """Until audio flows: in framed mode, until it was ready."""
        if self.mode == "framed" and call.carrier_format is not None:
            await call.until(lambda: not call.open or readies(call), READY_SECS + 1)

    # --- handshake ---

    async def _handshake(self) -> None:
        answer = await probe(self._service.url, self._service.authorization)
        if isinstance(answer, str):
            self.failed("connect", answer)
            return
        self.judge(
            "no-redirect", not 300 <= answer.status < 400, f"it answered HTTP {answer.status} to {answer.header('location')}"
        )
        self.judge("connect", answer.status == 101, f"it answered the handshake with HTTP {answer.status}")
        if answer.status != 101:
            return
        self.judge("accept-key", answer.key_ok, "Sec-WebSocket-Accept does not belong to the key")
        selected = answer.header("sec-websocket-protocol")
        good = selected in ("", SUBPROTOCOL_RAW, SUBPROTOCOL_FRAMED)
        self.judge("subprotocol", good, f"it selected {selected!r}")
        extension = answer.header("sec-websocket-extensions")
        self.judge("no-extension", not extension, f"it selected {extension!r}, and nothing was offered")
        if not good or not answer.key_ok or extension:
            return
        self.mode = "framed" if selected == SUBPROTOCOL_FRAMED else "raw"
        again = [await probe(self._service.url, self._service.authorization) for _ in range(3)]
        others = {each if isinstance(each, str) else each.header("sec-websocket-protocol") for each in again} - {selected}
        self.judge(
            "same-mode", not others, f"it selected {selected or 'nothing'!r}, then {', '.join(sorted(others)) or 'nothing'!r}"
        )
        known = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        strange = await probe(self._service.url, self._service.authorization, {"traceparent": known, "X-Novelty": "1"})
        self.judge("headers", not isinstance(strange, str) and strange.status == 101, f"it answered {what_it_answered(strange)}")
        parts = urlsplit(self._service.url)
        lost = await probe(parts._replace(path=f"{parts.path.rstrip('/')}/no-such-path").geturl(), self._service.authorization)
        orderly = not isinstance(lost, str) and (lost.status == 101 or 400 <= lost.status < 500)
        self.judge("unknown-path", orderly, f"it answered {what_it_answered(lost)}")
        if self._service.authorization is None:
            self.spared("authorization", "no token was given (--authorization)")
        else:
            self.judge("authorization", await self._refuses("wrong-token"), "it took a call with a wrong token")

    async def _refuses(self, token: str) -> bool:
        async with self._call(service=self._changed(authorization=token)) as call:
            await call.until(lambda: not call.open, 1.0)
            refused = not call.taps or any(tap.ended_by is not None for tap in call.taps)
        self._seen.remove(call)
        return refused

    # --- start ---

    async def _formats_asked(self) -> None:
        for media_format in self._formats:
            async with self._call(service=self._changed(media_format=media_format)) as call:
                await self._taken(call)
                await call.speak(400, self._clip)
                await asyncio.sleep(SETTLE_SECS)
            self._survived("format", call, str(media_format))
            self._closing(call)

    def _closing(self, call: ScriptedCall) -> None:
        if call.trouble is not None or call.lost is not None or call.ended_it or not call.taps:
            why = "the call did not come to a stop"
            self.spared("close-time", why)
            self.spared("close-code", why)
            return
        took, code = call.tap.close_secs, call.tap.close_code
        in_time = took is not None and took < CONNECT_SECS and code != 1006
        self.judge("close-time", in_time, "it did not answer the close frame after stop")
        if in_time:
            self.judge("close-code", code in (1000, 1005), f"it answered the close with {code}")

    async def _frame_sizes(self) -> None:
        async def one(frame_ms: int) -> None:
            await self._survives("frame-sizes", f"frames of {frame_ms} ms", service=self._changed(frame_ms=frame_ms))

        await _side_by_side([one(frame_ms) for frame_ms in FRAME_SIZES])

    async def _short_frame(self) -> None:
        async def one_sample(call: ScriptedCall) -> None:
            sample = self._service.media_format.silence(1)[: self._service.media_format.sample_bytes]
            if self.mode == "framed":
                return  # the last frame of the call is short
            await call.inject(sample)

        await self._survives("short-frame", "a frame of one sample", one_sample)

    async def _burst(self) -> None:
        await self._survives("burst", "two seconds of audio at once", lambda call: call.speak(2000, self._clip, pace=0))

    async def _text_stream(self) -> None:
        async with self._call(text=True) as call:
            await call.until(lambda: not call.open, 0.1)
            if call.open:
                call.tell(Transcript("Hello, is anybody there?", language="en-US"))
            await asyncio.sleep(SETTLE_SECS * 2)
        if any(tap.ended_by == 4003 for tap in call.taps):
            self.passed("text-stream")
            self.spared("text-silent", "it does not take streams of text")
            self._seen.remove(call)
            return
        self._survived("text-stream", call, "a stream of text")
        size = call.audio_bytes
        self.judge("text-silent", not size, f"it sent {size} bytes of audio")

    async def _anonymous(self) -> None:
        await self._survives("anonymous", "no caller", caller="", called="", direction="", account_id="", parameters={})

    async def _parameters(self) -> None:
        parameters = {
            "name": "Zoë Großmann \u4f60\u597d \U0001f4de",
            "long": "x" * 10_000,
            "": "empty",
            'quo"te': "line\nbreak\u2028",
        }
        await self._survives("parameters", "long parameters", parameters=parameters)

    # --- what it is told ---

    async def _unknown_type(self) -> None:
        await self._survives(
            "unknown-type", "an unknown type", lambda call: call.inject('{"type":"novelty","value":{"a":[1,null]}}')
        )

    async def _unknown_field(self) -> None:
        def add(text: str) -> str:
            return text[:-1] + ',"novelty":{"a":[1,null]}}'

        async def keys(call: ScriptedCall) -> None:
            call.tell(Dtmf("5"))

        await self._survives("unknown-field", "an unknown field", keys, alter=add)

    async def _json_spelling(self) -> None:
        def respell(text: str) -> str:
            fields = dict(reversed(json.loads(text).items()))
            return (
                json.dumps(fields, indent=2)
                .replace("1", "\\u0031", 0)
                .replace("dtmf", "\\u0064tmf")
                .replace("start", "st\\u0061rt")
            )

        async def keys(call: ScriptedCall) -> None:
            call.tell(Dtmf("5"))

        await self._survives("json-spelling", "JSON written otherwise", keys, alter=respell)

    async def _all_words(self) -> None:
        async def say(call: ScriptedCall) -> None:
            for event in WORDS:
                call.publish(event)
                await asyncio.sleep(0.02)

        await self._survives("all-words", "every message", say)

    async def _dtmf(self) -> None:
        async def keys(call: ScriptedCall) -> None:
            for digit in "0123456789*#ABCD":
                call.tell(Dtmf(digit))
                await asyncio.sleep(0.01)

        await self._survives("dtmf", "keys", keys)

    async def _outcomes(self) -> None:
        async def say(call: ScriptedCall) -> None:
            for outcome in events.Outcome:
                call.publish(Checkpoint(f"nobody-asked-{outcome}", outcome, 20))

        await self._survives("outcomes", "unknown checkpoints", say)

    async def _clear_told(self) -> None:
        async def say(call: ScriptedCall) -> None:
            before = call.commands[Clear]
            call.publish(Clear(120, 880))
            looped = await call.until(lambda: call.commands[Clear] >= before + 3, 2 * SETTLE_SECS)
            self.judge("clear-once", not looped, "it answered each clear with the next one")

        await self._survives("clear-told", "a clear", say)

    async def _gap(self) -> None:
        async def hole(call: ScriptedCall) -> None:
            call.skip(700)
            await call.speak(100, self._clip)
            call.skip(15_000)

        await self._survives("gap", "missing audio", hole)

    async def _fault(self) -> None:
        async def refuse(call: ScriptedCall) -> None:
            call.publish(Fault("novelty", "something was refused"))
            before = mistakes(call)
            looped = await call.until(lambda: mistakes(call) >= before + 2, 2 * SETTLE_SECS)
            if looped:
                self.failed("fault", "it answered each fault with the next mistake")

        await self._survives("fault", "a fault", refuse)

    async def _flow(self) -> None:
        async def tide(call: ScriptedCall) -> None:
            call.publish(Flow(FlowState.PAUSE, 60_000))
            await asyncio.sleep(0.1)
            call.publish(Flow(FlowState.RESUME, 30_000))

        await self._survives("flow", "pause and resume", tide)

    async def _idle(self) -> None:
        """Silence: also the scene in which it may talk as much as it likes."""
        async with self._call() as call:
            await self._taken(call)
            await call.until(lambda: not call.open or paused_at(call) is not None, self._idle_secs)
            await self._watch_pause(call)
        self._survived("idle", call, "silence")

    async def _watch_pause(self, call: ScriptedCall) -> None:
        paused = paused_at(call)
        if paused is None:
            return
        await asyncio.sleep(1.5)
        sent = sum(
            len(each.data)
            for tap in call.taps
            for each in tap.received
            if isinstance(each.data, bytes) and each.at > paused + 0.5
        )
        sent_ms = round(self._service.media_format.duration_ms(sent))
        overflow = any(fault.code == "playout_overflow" for fault in call.faults())
        obeyed = sent_ms <= AFTER_PAUSE_MS and not overflow
        self.judge("pause", obeyed, f"after pause it sent {sent_ms / 1000:.1f} s more{', until the queue was full' * overflow}")
        if obeyed and call.open:
            call.hurry(200)
            flowed = await call.until(lambda: any(flow_state(event) is FlowState.RESUME for _, event in call.told(Flow)), 3.0)
            call.hurry(1)
            await asyncio.sleep(SETTLE_SECS)
            if flowed:
                self.judge("resume-flow", call.trouble is None, f"it {how_it_closed(call.trouble)}")

    async def _ping(self) -> None:
        service = self._service
        headers = {"Authorization": f"Bearer {service.authorization}"} if service.authorization else {}
        modes = (SUBPROTOCOL_RAW, SUBPROTOCOL_FRAMED)
        try:
            async with (
                asyncio.timeout(2 * CONNECT_SECS),
                self._dialler.http.ws_connect(service.url, protocols=modes, headers=headers, autoping=False) as socket,
            ):
                await socket.ping(b"conformance")
                while (message := await socket.receive(CONNECT_SECS)).type is not aiohttp.WSMsgType.PONG:
                    if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                        self.spared("ping", "it closed a connection on which nothing was said")
                        return
                self.passed("ping")
        except TimeoutError:
            if self._verdicts.get("ping", ("",))[0] != "passed":  # else it was the closing that took so long
                self.failed("ping", f"no pong came within {CONNECT_SECS:g} s")

    # --- what it says ---

    async def _barge_in(self) -> None:
        async def talk_over(call: ScriptedCall) -> None:
            await call.until(lambda: call.audio_bytes or not call.open, 0.5)
            await call.speak(600, self._clip, pace=0.25)
            call.tell(BargeIn("", 0))

        await self._survives("barge-in", "a barge-in", talk_over)

    # --- ends ---

    async def _stop_at_once(self) -> None:
        async with self._call() as call:
            pass
        await self._next_call("stop-at-once", call, "stop right after start")

    async def _stop_speaking(self) -> None:
        async with self._call() as call:
            await self._taken(call)
            await call.speak(500, self._clip, pace=0.1)
        await self._next_call("stop-speaking", call, "stop while it speaks")

    async def _stop_reasons(self) -> None:
        async def one(reason: StopReason) -> None:
            async with self._call() as call:
                await self._taken(call)
                await call.speak(40)
                call.session.end(reason, call.now())
                await asyncio.sleep(0.1)
            self._survived("stop-reasons", call, f"stop with {reason}")

        await _side_by_side([one(reason) for reason in StopReason])
        await self._survives("stop-reasons", "the call after all reasons to stop")

    async def _going_away(self) -> None:
        async with self._wire() as wire:
            await wire.begin()
            await wire.socket.close(code=1001)
        await self._next_call("going-away", None, "a close with 1001 and no stop")

    async def _cut(self) -> None:
        async with self._wire() as wire:
            await wire.begin()
            wire.socket.transport.abort()
        await self._next_call("cut", None, "a connection that was cut")

    async def _next_call(self, name: str, before: ScriptedCall | None, what: str) -> None:
        """The verdict: that call, if there was one, and the next one are well."""
        if before is not None and before.trouble is not None:
            self.failed(name, f"{what}: it {how_it_closed(before.trouble)}")
            return
        await self._survives(name, f"the call after {what}")

    # --- rubbish ---

    async def _rubbish_text(self) -> None:
        await self._witnessed("rubbish-text", ["{not json", "", "\x00", "hello"])

    async def _rubbish_json(self) -> None:
        await self._witnessed("rubbish-json", ["[]", "null", "42", '"start"', "{}", '{"type":7}', '{"type":"dtmf"}', "[" * 5000])

    async def _rubbish_binary(self) -> None:
        await self._witnessed("rubbish-binary", [b"", b"\x01", b"\xff" * 3, b"\x11" * 15, os.urandom(999)])

    async def _before_start(self) -> None:
        await self._witnessed("before-start", [b"\0" * 640, '{"type":"dtmf","digits":"1"}', '{"type":"stop"}'], start=False)

    async def _witnessed(self, name: str, frames: list[str | bytes], *, start: bool = True) -> None:
        """Each frame on a connection of its own, while another call goes on; then a new one."""
        async with self._call() as witness:
            await self._taken(witness)
            for frame in frames:
                async with self._wire() as wire:
                    if start:
                        await wire.begin()
                    await wire.say(frame)
                    await witness.speak(60, self._clip)
        self._survived(name, witness, "another call got rubbish, and this one")
        await self._survives(name, "the call after rubbish")

    # --- many calls ---

    async def _concurrent(self) -> None:
        chance = np.random.default_rng(20)
        clips = [encode_mulaw(chance.integers(-8000, 8000, 4000).astype(np.int16)).tobytes() for _ in range(self._calls)]
        calls: list[ScriptedCall] = []

        async def one(clip: bytes) -> None:
            async with self._call(connect_secs=10.0, service=self._changed(give_up_secs=10.0)) as call:
                calls.append(call)
                await self._taken(call)
                await call.speak(500, clip, pace=1.0)
                await asyncio.sleep(SETTLE_SECS)
            if call.trouble in (1013, 4029):
                self.spared("concurrent", f"it has no room for {self._calls} calls at once; try fewer (--calls)")
            else:
                self._survived("concurrent", call, f"{self._calls} calls at once")

        await _side_by_side([one(clip) for clip in clips])
        if not any(call.audio_bytes for call in calls):
            self.spared("isolation", "it sent no audio")
            return
        mixed = await asyncio.to_thread(mixed_calls, calls, self.mode == "framed")
        self.judge("isolation", not mixed, f"{mixed} calls got audio of other callers")

    async def _sequence(self) -> None:
        for number in range(15):
            async with self._call() as call:
                await self._taken(call)
                await call.speak(40)
            self._survived("sequence", call, f"call {number + 1} of a row")

    async def _mass_hangup(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._calls):
                tasks.create_task(self._rude())
        await self._survives("mass-hangup", f"the call after {self._calls} that were cut")

    async def _rude(self) -> None:
        async with self._wire() as wire:
            await wire.begin()
            wire.socket.transport.abort()

    # --- coming back ---

    async def _reconnect(self) -> None:
        async with self._call(service=self._changed(give_up_secs=8.0)) as call:
            await self._taken(call)
            await call.speak(600, self._clip)
            if not call.open:
                self._survived("reconnect", call, "before the cut")
                return
            sent = len(call.tap.sent)
            call.tap.hang_up_rudely()
            back = await call.until(lambda: len(call.taps) > 1 or call.lost is not None, 6.0) and call.lost is None
            await self._taken_again(call)
            await call.speak(300, self._clip)
            await asyncio.sleep(SETTLE_SECS)
        if not back or call.lost is not None:
            self.failed("reconnect", call.lost or "it did not take the call again")
        else:
            self._survived("reconnect", call, "the second connection")
        if self.mode == "framed":
            self._judge_resume(call, sent)

    async def _taken_again(self, call: ScriptedCall) -> None:
        if self.mode == "framed":
            await call.until(lambda: readies(call, -1) or call.lost is not None, READY_SECS)

    def _judge_resume(self, call: ScriptedCall, sent: int) -> None:
        if len(call.taps) < 2:
            self.failed("resume", "it did not take the call again")
            return
        ready = next(iter(readies(call, -1)), None)
        self.judge("resume", ready is not None, f"no ready came within {READY_SECS:g} s of a start with resume")
        if ready is None:
            return
        first = max((ack.seq for ack in acks(call.taps[0])), default=-1) + 1
        if ready.next is None or ready.next is UNSET:
            self.spared("resume-next", "it chose to go on live" if ready.next is None else "it left the choice to the gateway")
        else:
            good = min(first, sent) <= ready.next <= sent
            self.judge("resume-next", good, f"it asked for frame {ready.next}; acknowledged were {first}, sent {sent}")
        before, after = (frames(tap, self._width) for tap in call.taps[:2])
        if not before or not after:
            self.spared("resume-numbers", "it sent no audio before and after the cut")
            return
        said = {header.seq: samples for header, samples in before}
        wrong = next((header.seq for header, samples in after if said.get(header.seq, samples) != samples), None)
        self.judge(
            "resume-numbers", wrong is None, f"it gave number {wrong} to other audio than before the cut: that is never played"
        )

    async def _framed_session(self) -> None:
        if self.mode != "framed":
            for check in CHECKS:
                if check.title.startswith("framed:"):
                    self.spared(check.name, "it selected raw mode")
            return
        async with self._call() as call:
            ready = await call.until(lambda: not call.open or readies(call), READY_SECS + 0.5) and bool(readies(call))
            self.judge("ready", ready, "ready did not come")
            await call.speak(2000, self._clip, pace=1.0)
            await call.until(lambda: not call.open or bool(call.taps and acks(call.tap)), 2.0)
            if ready:
                self.judge(
                    "acks", call.taps and acks(call.tap), "2 s of audio were sent, and none of it acknowledged after 2 s more"
                )

    async def _resume_unknown(self) -> None:
        if self.mode != "framed":
            return
        async with self._wire() as wire:
            await wire.start(Resume(wire.session, 120, 150, 12, 0, ("greeting",)))
            self.judge("resume-unknown", await wire.ready(), "no ready came for a session it has never seen")

    async def _replaced(self) -> None:
        if self.mode != "framed":
            return
        async with self._wire() as older, self._wire() as newer:
            await older.begin()
            newer.session = older.session
            await newer.start(Resume(older.session, 0, 1, 0, 0, ()))
            self.judge("replaced", await newer.ready(), "no ready came on the newer connection")

    # --- what all calls together say ---

    @property
    def _width(self) -> int:
        return self._service.media_format.sample_bytes

    def _sum_up(self) -> None:
        calls = [call for call in self._seen if call.taps]
        faults: dict[str, Fault] = {}
        for call in calls:
            for fault in call.faults():
                if call.carrier_format is not None or "'audio'" not in fault.message:  # that is `text-silent`
                    faults.setdefault(fault.code, fault)
        texts = sum(isinstance(each.data, str) for call in calls for tap in call.taps for each in tap.received)
        audio = sum(isinstance(each.data, bytes) for call in calls for tap in call.taps for each in tap.received)
        double_ready = any("ready was said before" in fault.message for call in calls for fault in call.faults())
        malformed = next(
            (
                fault
                for call in calls
                for fault in call.faults()
                if fault.code == "malformed_command" and not about_numbers(fault)
            ),
            None,
        )
        self._judge_if("commands", texts, malformed is None, malformed.message if malformed else "", "it sent no texts")
        self._judge_fault("accepts", texts or audio, faults.get("unsupported_command"), "it sent nothing")
        self._judge_fault("message-size", texts or audio, faults.get("message_too_large"), "it sent nothing")
        flood = max((most_texts_per_sec(call) for call in calls), default=0.0)
        self._judge_if("pace", texts, flood <= TEXTS_PER_SEC, f"it sent {flood:.0f} texts a second", "it sent no texts")
        asked = any(call.names for call in calls)
        again = next((call.reused[0] for call in calls if call.reused), None)
        self._judge_if("checkpoint-names", asked, again is None, f"{again!r} was asked for twice", "it asked for no checkpoint")
        self._judge_fault("checkpoint-count", asked, faults.get("too_many_checkpoints"), "it asked for no checkpoint")
        self.spared("pause", "it never sent so much that it was told to pause")
        self.spared("resume-flow", "it was never told to pause")
        bad_code = next((tap.ended_by for call in calls for tap in call.taps if not meaningful(tap.ended_by)), None)
        if not any(tap.ended_by for call in calls for tap in call.taps):
            self.spared("close-codes", "it never closed a connection by itself")
        else:
            self.judge("close-codes", bad_code is None, f"it {how_it_closed(bad_code)}")
        odd = next((size for call in calls for size in odd_sizes(call, self.mode == "framed")), None)
        self._judge_if("whole-samples", audio, odd is None, f"a message had {odd} bytes of audio", "it sent no audio")
        if self.mode == "framed":
            self._sum_up_frames(calls, faults, audio, double_ready)

    def _sum_up_frames(self, calls: list[ScriptedCall], faults: dict[str, Fault], audio: int, double_ready: bool) -> None:
        self.judge("ready-once", not double_ready, "it said ready again on the same connection")
        no_header = faults.get("malformed_audio")
        if no_header is not None and "whole number" in no_header.message:
            no_header = None
        self._judge_fault("header", audio, no_header, "it sent no audio")
        if not audio or no_header is not None:
            self.spared("numbers", "it sent no audio" if not audio else "its frames have no header")
        else:
            numbered = [
                (number, [header.seq for header, _ in frames(tap, self._width)])
                for call in calls
                for number, tap in enumerate(call.taps)
            ]
            holes = next((seqs for number, seqs in numbered if seqs and leaves_out(seqs, first=number == 0)), [])
            self.judge("numbers", not holes, f"its frames were numbered {', '.join(map(str, holes[:6]))} …")
        wrong = next((fault.message for call in calls for fault in call.faults() if "ack of" in fault.message), None)
        falling = any(seqs != sorted(seqs) for call in calls for tap in call.taps for seqs in [[ack.seq for ack in acks(tap)]])
        acked = any(acks(tap) for call in calls for tap in call.taps)
        self._judge_if("ack-valid", acked, wrong is None and not falling, wrong or "a later ack was lower", "it sent no ack")

    def _judge_if(self, name: str, applicable: object, good: bool, detail: str, why_not: str) -> None:
        if applicable:
            self.judge(name, good, detail)
        else:
            self.spared(name, why_not)

    def _judge_fault(self, name: str, applicable: object, fault: Fault | None, why_not: str) -> None:
        self._judge_if(name, applicable or fault is not None, fault is None, fault.message if fault else "", why_not)


SCENES: dict[str, tuple[str, ...]] = {
    "formats-asked": ("format", "close-time", "close-code"),
    "frame-sizes": ("frame-sizes",),
    "short-frame": ("short-frame",),
    "burst": ("burst",),
    "text-stream": ("text-stream", "text-silent"),
    "anonymous": ("anonymous",),
    "parameters": ("parameters",),
    "unknown-type": ("unknown-type",),
    "unknown-field": ("unknown-field",),
    "json-spelling": ("json-spelling",),
    "all-words": ("all-words",),
    "dtmf": ("dtmf",),
    "outcomes": ("outcomes",),
    "clear-told": ("clear-told", "clear-once"),
    "gap": ("gap",),
    "fault": ("fault",),
    "flow": ("flow",),
    "idle": ("idle", "pause", "resume-flow"),
    "ping": ("ping",),
    "barge-in": ("barge-in",),
    "stop-at-once": ("stop-at-once",),
    "stop-speaking": ("stop-speaking",),
    "stop-reasons": ("stop-reasons",),
    "going-away": ("going-away",),
    "cut": ("cut",),
    "rubbish-text": ("rubbish-text",),
    "rubbish-json": ("rubbish-json",),
    "rubbish-binary": ("rubbish-binary",),
    "before-start": ("before-start",),
    "concurrent": ("concurrent", "isolation"),
    "sequence": ("sequence",),
    "mass-hangup": ("mass-hangup",),
    "reconnect": ("reconnect", "resume", "resume-next", "resume-numbers"),
    "framed-session": ("ready", "acks"),
    "resume-unknown": ("resume-unknown",),
    "replaced": ("replaced",),
}
"""Scenes, and the checks that they decide."""


def _scenes(only: set[str], wanted: Collection[str]) -> list[str]:
    """The scenes to play for these checks: all, where one of them is judged by all calls together."""
    if wanted:
        return [name for name in SCENES if name in wanted]
    first = {check.name for check in CHECKS if GROUPS[check.name] == "Handshake"}
    if only - first - {check for decided in SCENES.values() for check in decided}:
        only = set()
    return [name for name, decided in SCENES.items() if not only or only & set(decided)]


def _first_of(error: Exception) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return str(error)


async def _side_by_side(parts: list[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for part in parts:
            tasks.create_task(part)
