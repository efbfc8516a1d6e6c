"""Messages are handed over from within the loop's reading, in order, few in a row; where that can't be, all goes on by queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from gateway import direct
from gateway.direct import IN_A_ROW, CarrierSocket, DirectQueue, HandlerFailed, hand_over
from gateway.services.dialler import ServiceSocket
from tests.conftest import Launch
from tests.doubles import RecordingService, TwilioMedia
from tests.services.test_websocket import (  # noqa: F401 they run here by queue
    test_d2_a_service_that_dies_in_mid_call_loses_nothing,
    test_d2_a_service_that_says_1000_is_done_and_one_that_vanishes_is_not,
    test_d5_a_call_that_ends_does_not_wait_for_a_stalled_service,
    test_d6_a_flood_of_audio_is_paused_then_refused,
    test_playback_goes_on_and_frames_sent_again_are_taken_once,
    test_raw_mode_comes_back_live_and_tells_what_was_missed,
)
from tests.test_end_to_end import (  # noqa: F401 likewise
    played,
    stream_url,
    test_barge_in_cuts_the_line_at_once,
    test_mulaw_passes_bit_exact,
    test_rubbish_from_the_carrier_is_skipped_and_logged_once,
    test_speech_comes_back_from_an_external_echo_service_at_16_khz,
    test_stop_after_played_follows_a_checkpoint_at_once,
)

BY_QUEUE = frozenset(name for name in globals() if name.startswith("test_"))


@pytest.fixture(autouse=True)
def by_queue(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of other files run once more, as with an aiohttp that we don't know."""
    if request.node.originalname in BY_QUEUE:
        monkeypatch.setattr(direct, "hand_over", lambda *_: False)
        monkeypatch.setattr(direct, "OUTLETS_WORK", False)


Serve = Callable[[CarrierSocket], Awaitable[None]]


@asynccontextmanager
async def connected(serve: Serve, *, heartbeat: float | None = None, **options: Any) -> AsyncIterator[ServiceSocket]:
    """A client whose server is `serve`."""

    async def answer(request: web.Request) -> web.WebSocketResponse:
        socket = CarrierSocket(heartbeat=heartbeat, compress=False)
        await socket.prepare(request)
        await serve(socket)
        return socket

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession(ws_response_class=ServiceSocket) as http:
            socket = await http.ws_connect(f"http://127.0.0.1:{port}/", compress=0, **options)
            assert isinstance(socket, ServiceSocket)
            yield socket
            await socket.close()
    finally:
        await runner.cleanup()


async def rest(socket: web.WebSocketResponse | ServiceSocket) -> list[aiohttp.WSMessage]:
    """What comes out of `receive` until the end."""
    found = []
    while (message := await socket.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY):
        found.append(message)
    return [*found, message]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_the_installed_aiohttp_is_as_expected() -> None:
    assert direct.WORKS, "queues of this aiohttp can't be ours: see gateway/direct.py"
    assert direct.OUTLETS_WORK, "this aiohttp writes otherwise than our outlets: see gateway/direct.py"
    assert direct.HEARTBEAT_WORKS, "heartbeats of this aiohttp don't go by what ours sets: see gateway/direct.py"


def into(taken: list[object]) -> Callable[[object], bool]:
    """A handler that takes everything."""

    def take(data: object) -> bool:
        taken.append(data)
        return True

    return take


async def test_messages_are_handed_over_at_both_ends_and_the_close_is_received() -> None:
    there: list[object] = []
    here: list[object] = []
    ends: list[object] = []
    begin = asyncio.Event()

    async def serve(socket: CarrierSocket) -> None:
        assert hand_over(socket, into(there))
        await begin.wait()
        await socket.send_str("text")
        await socket.send_bytes(b"bytes")
        ends.extend(message.type for message in await rest(socket))

    async with connected(serve) as socket:
        assert hand_over(socket, into(here))
        receiving = asyncio.ensure_future(rest(socket))  # noqa: TID251 a reader that waits
        begin.set()
        await until(lambda: len(here) == 2)
        for n in range(20):
            socket.write(str(n))
            socket.write(b"ab")
            await until(lambda n=n: len(there) == 2 * n + 2)  # type: ignore[misc]
        await socket.close(code=4000)
        await receiving
    assert ["text", b"bytes"] == here
    assert [each for n in range(20) for each in (str(n), b"ab")] == there
    assert [WSMsgType.CLOSE] == ends


async def test_a_burst_is_in_order_and_other_work_has_its_turn() -> None:
    taken: list[int] = []
    by_task: list[int] = []
    most = 0

    async def serve(socket: CarrierSocket) -> None:
        nonlocal most
        loop, laps = asyncio.get_running_loop(), 0
        row: dict[int, int] = {}

        def lap() -> None:
            nonlocal laps
            laps += 1
            loop.call_soon(lap)

        def take(data: str) -> bool:
            row[laps] = row.get(laps, 0) + 1
            taken.append(int(data))
            return True

        hand_over(socket, take)
        lap()
        while (message := await socket.receive()).type is WSMsgType.TEXT:
            by_task.append(int(message.data))
            taken.append(int(message.data))
        most = max(row.values())
        assert message.type is WSMsgType.CLOSE

    async with connected(serve) as socket:
        await asyncio.sleep(0.05)
        for n in range(500):
            socket.write(str(n))  # one write to the kernel
        await until(lambda: len(taken) == 500)
        await asyncio.sleep(0.05)
        for n in range(500, 510):
            socket.write(str(n))
            await asyncio.sleep(0.01)
        await until(lambda: len(taken) == 510)
        await socket.close()
    assert [*range(510)] == taken
    assert 0 < most <= IN_A_ROW
    assert by_task, "the rest of the burst waited for the task's turn"
    assert not {*by_task} & {*range(500, 510)}, "and single messages did not"


async def test_what_is_not_taken_is_received_and_nothing_overtakes_it() -> None:
    order: list[str] = []

    async def serve(socket: CarrierSocket) -> None:
        def take(data: str) -> bool:
            if data.startswith("long"):
                return False
            order.append(data)
            return True

        hand_over(socket, take)
        while (message := await socket.receive()).type is WSMsgType.TEXT:
            await asyncio.sleep(0.05)  # it takes a while; what comes meanwhile waits
            order.append(message.data)

    sent = [f"{'long' if n % 3 == 0 else 'short'}{n}" for n in range(12)]
    async with connected(serve) as socket:
        await asyncio.sleep(0.05)
        for text in sent:
            socket.write(text)
            await asyncio.sleep(0.02)
        await until(lambda: len(order) == 12)
    assert sent == order


async def test_a_handler_that_fails_is_told_to_the_reader_and_gets_nothing_further() -> None:
    calls: list[str] = []
    found: list[aiohttp.WSMessage] = []

    async def serve(socket: CarrierSocket) -> None:
        def take(data: str) -> bool:
            calls.append(data)
            raise KeyError("no such thing")

        hand_over(socket, take)
        found.extend(await rest(socket))

    async with connected(serve) as socket:
        await asyncio.sleep(0.05)
        for text in ("one", "two"):
            socket.write(text)
        await until(lambda: found)
    assert ["one"] == calls
    assert isinstance(found[0].data, HandlerFailed)
    assert isinstance(found[0].data.__cause__, KeyError)


async def test_a_peer_that_floods_is_not_read_while_nobody_receives() -> None:
    paused = asyncio.Event()

    async def serve(socket: CarrierSocket) -> None:
        hand_over(socket, lambda _: True)
        await socket.receive()  # the handler's refusal
        await asyncio.sleep(0.01)
        await until(lambda: socket._reader._protocol._reading_paused)  # type: ignore[union-attr]
        paused.set()
        hand_over(socket, None)
        await rest(socket)

    async with connected(serve) as socket:
        await asyncio.sleep(0.05)
        for _ in range(3000):
            socket.write("x" * 1000)
        await asyncio.wait_for(paused.wait(), 10)


@pytest.mark.allow_errors("stream_failed")
async def test_a_stream_whose_handling_fails_ends_as_failed(
    launch: Launch, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await service.connected()
            (stream,) = server.streams.values()
            monkeypatch.setattr(type(stream.session), "receive", lambda *_: 1 // 0)
            await call.speak(bytes(160))
            await asyncio.wait_for(call.closed.wait(), 10)
            link = service.link
            await link.wait_for("stop")
    assert ["stream_failed"] == [entry["event"] for entry in log if entry["log_level"] == "error"]


async def test_whoever_has_a_receive_of_his_own_sees_everything() -> None:
    class Watched(CarrierSocket):
        async def receive(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109
            return await super().receive(timeout)

    queue = DirectQueue(SimpleNamespace(), 1, loop=asyncio.get_running_loop())  # type: ignore[arg-type]
    for kind in (CarrierSocket, Watched):
        socket = kind()
        socket._reader = queue
        assert hand_over(socket, into([])) is (kind is CarrierSocket)


@pytest.mark.parametrize("name", ["send_str", "send_bytes"])
async def test_whoever_has_a_send_of_his_own_is_asked_for_everything(name: str) -> None:
    sent: list[object] = []

    async def send(socket: CarrierSocket, data: Any, compress: int | None = None) -> None:
        sent.append(data)

    async def serve(socket: CarrierSocket) -> None:
        socket.__class__ = type("Watched", (CarrierSocket,), {name: send})
        put = direct.outlet(socket)
        put("text")
        put(b"bytes")
        await rest(socket)

    async with connected(serve) as socket:
        assert ("text" if name == "send_bytes" else b"bytes") == (await socket.receive()).data
    assert ["text" if name == "send_str" else b"bytes"] == sent


async def test_an_aiohttp_that_we_do_not_know_is_said_in_the_log(
    launch: Launch, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "WORKS", False)
    await launch()
    assert [aiohttp.__version__] == [entry["version"] for entry in log if entry["event"] == "aiohttp_unknown"]


# --- heartbeats ---


@pytest.mark.parametrize("answers", [True, False])
async def test_a_silent_peer_is_pinged_and_let_go_if_it_does_not_answer(answers: bool) -> None:
    ends: list[aiohttp.WSMessage] = []

    async def serve(socket: CarrierSocket) -> None:
        ends.extend(await rest(socket))

    async with connected(serve, heartbeat=0.2, autoping=answers) as socket:
        receiving = asyncio.ensure_future(rest(socket))  # noqa: TID251 a reader that waits
        await asyncio.sleep(1.5)
        assert answers is not bool(ends)
        if answers:
            await socket.close()
        await receiving
    assert answers is (ends[-1].type is WSMsgType.CLOSE)


async def test_whoever_speaks_is_not_pinged_and_is_once_it_is_silent() -> None:
    pings: list[float] = []
    loop = asyncio.get_running_loop()

    async def serve(socket: CarrierSocket) -> None:
        hand_over(socket, lambda _: True)
        await rest(socket)

    async with connected(serve, heartbeat=0.5, autoping=False) as socket:

        async def listen() -> None:
            while (await socket.receive()).type is WSMsgType.PING:
                pings.append(loop.time())

        listening = asyncio.ensure_future(listen())  # noqa: TID251 a reader that waits
        for _ in range(75):
            socket.write("x")
            await asyncio.sleep(0.02)
        last = loop.time()
        assert [] == pings
        await listening
    assert len(pings) == 1
    assert 0.4 < pings[0] - last


@pytest.mark.parametrize("ours", [True, False])
async def test_an_outlet_writes_messages_of_any_length_at_both_ends(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    monkeypatch.setattr(direct, "OUTLETS_WORK", ours)
    messages: list[str | bytes] = []
    for size in (0, 1, 125, 126, 127, 65535, 65536, 100_000, 126, 125):
        messages += [bytes(range(256)) * (size // 256) + bytes(size % 256), "x" * size, "ü" * size]
    there: list[object] = []

    async def serve(socket: CarrierSocket) -> None:
        put = direct.outlet(socket)
        for message in messages:
            put(message)
            there.append((await socket.receive()).data)
        assert isinstance(put, partial) is not ours
        await rest(socket)

    async with connected(serve) as socket:
        for message in messages:
            assert message == (await socket.receive()).data
            socket.write(message)
        assert isinstance(socket.write, partial) is not ours
    assert messages == there


async def test_an_outlet_of_a_socket_that_is_gone_raises() -> None:
    gone = asyncio.Event()

    async def serve(socket: CarrierSocket) -> None:
        await rest(socket)
        put = direct.outlet(socket)
        with pytest.raises(ConnectionError):
            put("after the close")
        gone.set()

    async with connected(serve) as socket:
        await socket.close()
        with pytest.raises(ConnectionError):
            socket.write(b"after the close")
        await asyncio.wait_for(gone.wait(), 5)

    async with connected(rest) as cut:  # type: ignore[arg-type]
        cut.transport.abort()
        with pytest.raises(ConnectionError):
            cut.write(b"after the end")


async def test_what_an_outlet_wrote_counts_for_a_send_that_waits() -> None:
    """Nobody reads: aiohttp's own send, after an outlet has filled the transport, waits as it would after its own."""
    held = asyncio.Event()

    async def serve(socket: CarrierSocket) -> None:
        put = direct.outlet(socket)
        for _ in range(200):
            put(bytes(100_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await socket.send_bytes(b"x")
        held.set()

    async with connected(serve) as socket:
        socket.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.wait_for(held.wait(), 5)
        socket.transport.abort()
