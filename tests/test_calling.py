"""A call around its streams, by foreign carriers that go on as real ones do when a socket of ours is gone."""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.conftest import Launch
from tests.doubles import Calling, ConversationRelay, Plivo, RecordingService, TwilioMedia
from tests.doubles.calling import plivo_post_signature

CARRIERS = {"twilio": TwilioMedia, "relay": ConversationRelay, "plivo": Plivo}
KINDS = {"twilio": "twilio_media_streams", "relay": "twilio_conversation_relay", "plivo": "plivo_audio_streaming"}
PUBLIC = "https://voice.example.com/gw"
TOKEN = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
every_carrier = pytest.mark.parametrize("name", [*CARRIERS])


@asynccontextmanager
async def fake(answers: list[str], **more: Any) -> AsyncIterator[tuple[str, list[web.WebSocketResponse], list[web.Request]]]:
    """A gateway of one call: documents in order ({} is its own base URL), and sockets that do nothing of themselves."""
    sockets: list[web.WebSocketResponse] = []
    requests: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        await request.post()
        return web.Response(text=f"<Response>{answers.pop(0).format(base)}</Response>", content_type="application/xml")

    async def stream(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sockets.append(socket)
        requests.append(request)
        async for _ in socket:
            pass
        return socket

    app = web.Application()
    app.router.add_post("/answer", answer)
    app.router.add_post("/action", answer)
    app.router.add_get("/stream", stream)
    async with TestServer(app) as server:
        base = f"127.0.0.1:{server.port}"
        yield f"http://{base}/answer", sockets, requests


DOCUMENTS = {
    "twilio": '<Connect action="/action"><Stream url="ws://{}/stream"><Parameter name="a" value="b"/></Stream></Connect>',
    "relay": '<Connect action="/action"><ConversationRelay url="ws://{}/stream"/></Connect>',
    "plivo": '<Stream bidirectional="true" keepCallAlive="true" contentType="audio/x-mulaw;rate=8000">ws://{0}/stream</Stream>'
    "<Redirect>http://{0}/action</Redirect>",
}


@every_carrier
async def test_the_call_goes_on_with_another_stream_when_a_socket_dies(name: str) -> None:
    document = DOCUMENTS[name]
    async with fake([document, document, "<Hangup/>"]) as (url, sockets, requests), Calling(CARRIERS[name], url) as call:
        first = await call.attached()
        assert requests[0].transport is not None
        requests[0].transport.abort()
        second = await call.attached(2)
        await sockets[1].close()
        await asyncio.wait_for(call.over.wait(), 5)
    assert "<Response><Hangup/></Response>" == call.ended_with
    assert [200] * 3 == [status for _, _, status in call.asked]
    assert (1006, 1000) == (first.close_code, second.close_code)
    assert 1 == len(call.gaps)
    ids = {str(getattr(peer, "stream_sid", None) or getattr(peer, "stream_id", None) or peer.session_id) for peer in call.streams}  # type: ignore[union-attr]
    assert 2 == len(ids)
    if name == "relay":
        assert ["failed", "failed"] == [form["SessionStatus"] for _, form, _ in call.asked[1:]]
    if name == "twilio":
        assert {"a": "b"} == second.parameters  # type: ignore[union-attr]


@every_carrier
async def test_a_caller_who_hangs_up_ends_the_call_and_only_relay_tells_it(name: str) -> None:
    async with fake([DOCUMENTS[name], ""]) as (url, _, _), Calling(CARRIERS[name], url) as call:
        await call.attached()
    told = [form["SessionStatus"] for _, form, _ in call.asked[1:]]
    assert (["completed"] if name == "relay" else [], None) == (told, call.ended_with)


async def test_the_caller_talks_on_in_real_time_and_what_finds_no_stream_is_lost() -> None:
    async with fake([DOCUMENTS["twilio"]] * 2) as (url, _, requests), Calling(TwilioMedia, url, line_silence=False) as call:
        first = await call.attached()
        async with asyncio.TaskGroup() as group:
            group.create_task(call.speak(b"\x20" * 160 * 50))
            await first.until(lambda: first.frames_sent >= 10)
            assert requests[0].transport is not None
            requests[0].transport.abort()
            second = await call.attached(2)
    assert 50 == first.frames_sent + second.frames_sent + call.lost_frames
    assert second.frames_sent > 0


async def test_a_webhook_without_a_connection_is_asked_once_more_and_then_the_call_is_over(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}/answer"
    async with Calling(TwilioMedia, url) as call:
        await asyncio.wait_for(call.over.wait(), 5)
    assert ([0, 0], "") == ([status for _, _, status in call.asked], call.ended_with)


def test_plivos_signature_of_a_post_is_that_of_the_worked_example() -> None:
    form = {"To": "+15555555555", "Digits": "1234", "From": "+15551111111", "CallUuid": "4vbc"}
    text = "https://example.com/abcd?foo=bar.CallUuid4vbcDigits1234From+15551111111To+15555555555.05429567804466091622"
    expected = base64.b64encode(hmac.digest(b"t", text.encode(), "sha256")).decode()
    assert expected == plivo_post_signature("t", "https://example.com/abcd?foo=bar", form, "05429567804466091622")


@every_carrier
async def test_the_gateway_takes_a_signed_call_and_says_what_comes_after_its_stream(launch: Launch, name: str) -> None:
    async with RecordingService() as service:
        server = await launch(
            services={"agent": {"kind": "websocket", "url": service.url}},
            providers={name: {"kind": KINDS[name], "auth_token": TOKEN, "after": "<Hangup/>"}},
            secret="s" * 40,
            public_url=PUBLIC,
        )

        def reach(url: str) -> str:
            return (
                url.replace(PUBLIC[len("https") :], f"://127.0.0.1:{server.port}")
                .replace("https:", "http:")
                .replace("wss:", "ws:")
            )

        async with Calling(CARRIERS[name], f"{PUBLIC}/{name}/answer", auth_token=TOKEN, reach=reach) as call:
            await call.attached()
            link = await service.connected()
            await link.send(type="stop")
            await asyncio.wait_for(call.over.wait(), 5)
    assert ([200, 200], 1) == ([status for _, _, status in call.asked], len(call.streams))
    assert call.ended_with is not None
    assert "<Hangup/>" in call.ended_with
    assert [] == call.streams[0].violations
