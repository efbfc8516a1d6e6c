"""Plays a captured stream to a gateway as the carrier did, and compares what comes back: by kind and order, whatever the pace."""

from __future__ import annotations

import asyncio
import difflib
import random
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import groupby

import aiohttp
import msgspec
from msgspec import Struct

from gateway.callreport import explain, explain_status
from gateway.capture import Frame, Header
from gateway.errors import GatewayError, MalformedFrame
from gateway.events import COMMAND_NAMES, Audio, Event, Start, Stop
from gateway.provider import Call, Carrier, Codec, HttpRequest, Provider
from gateway.signing import UPGRADE

REPLY_SECS = 5.0
"""How long an answer of the gateway may come later than it did, before the carrier goes on without it."""

QUIET_SECS = 1.0
"""The caller who has heard less than then hangs up once nothing has come for so long."""

CONNECT_SECS, CLOSE_SECS = 5.0, 3.0
IN_A_ROW = ("audio", "say")
"""Kinds that a service sends in as many pieces as it likes."""


class ReplayError(GatewayError):
    """It could not be played. `str(error)` says why and what to do."""


class Outcome(Struct):
    """What came back, now and then: kinds in order, pieces in a row told as one; `audio_ms` in all."""

    expected: list[str]
    got: list[str]
    expected_audio_ms: int
    got_audio_ms: int
    late: int
    """Answers that the carrier did not wait for any longer."""

    @property
    def difference(self) -> list[str]:
        """Lines of a diff; none if both are the same."""
        if self.expected == self.got:
            return []
        return list(difflib.unified_diff(self.expected, self.got, "then", "now", lineterm="", n=2))


class Listener:
    """Reads frames from the gateway as the carrier does, and keeps their kinds."""

    def __init__(self, carrier: Carrier, bytes_per_ms: float) -> None:
        self._carrier = carrier
        self._bytes_per_ms = bytes_per_ms
        self._kinds: list[str] = []
        self._audio_bytes = 0

    def take(self, frame: str | bytes) -> None:
        try:
            for command in self._carrier.decode(frame):
                self._kinds.append(COMMAND_NAMES[type(command)])
                if isinstance(command, Audio):
                    self._audio_bytes += len(command.payload)
        except MalformedFrame as error:
            self._kinds.append(f"refused: {error.reason}")

    @property
    def kinds(self) -> list[str]:
        """Pieces in a row told as one."""
        return [kind for kind, same in groupby(self._kinds) for _ in ([0] if kind in IN_A_ROW else same)]

    @property
    def answers(self) -> int:
        """How many things came that a carrier answers, or that say where a service is in what it does."""
        return sum(kind not in IN_A_ROW for kind in self._kinds)

    @property
    def audio_ms(self) -> int:
        return round(self._audio_bytes / self._bytes_per_ms)


def start_of(kind: type[Provider], frames: Iterable[Frame]) -> Start:
    """The stream's start, as our half reads it. Raises ReplayError."""
    config = msgspec.convert({"auth": "none"}, kind.Config)
    codec = kind(config).codec()
    for frame in frames:
        if frame.dir == "in":
            try:
                found = next((event for event in codec.decode(frame.frame) if isinstance(event, Start)), None)
            except MalformedFrame:
                continue
            if found is not None:
                return found
    raise ReplayError("there is no start frame in it: the stream never began")


async def replay(
    kind: type[Provider],
    header: Header,
    frames: list[Frame],
    *,
    url: str,
    speed: float = 1.0,
    sign: Callable[[HttpRequest], HttpRequest] | None = None,
) -> Outcome:
    """Play it to `url`: a stream's `ws(s)://…`, or a webhook's `http(s)://…/answer`. Raises ReplayError.

    `sign` signs the webhook and the upgrade, and may send them elsewhere (`gateway.signing.Signing`).
    """
    start = start_of(kind, frames)
    if url.startswith("http"):  # a call of its own: of the first one the gateway may know that it is over, or still have it
        frames, start = _renamed(frames, start)
    per_ms = start.media_format.bytes_per_second / 1000 if start.media_format is not None else 1.0
    expected, got = (Listener(_carrier(kind, start), per_ms) for _ in range(2))
    codec = kind(msgspec.convert({"auth": "none"}, kind.Config)).codec()
    offered = (kind.carrier().habits.subprotocol,) if kind.carrier().habits.subprotocol else ()
    late = 0
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CONNECT_SECS)) as http:
            upgrade = HttpRequest("GET", await _ask(http, kind, start, url, sign) if url.startswith("http") else url, UPGRADE)
            upgrade = sign(upgrade) if sign is not None else upgrade
            headers = {name: value for name, value in upgrade.headers.items() if name not in UPGRADE}
            protocols = [name for name in offered if name]
            async with http.ws_connect(upgrade.url, protocols=protocols, headers=headers, max_msg_size=16 * 2**20) as socket:
                arrived = asyncio.Event()

                async def listen() -> None:
                    with suppress(aiohttp.ClientError, ConnectionError):
                        async for message in socket:
                            if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                                got.take(message.data)
                                arrived.set()

                async def until(answers: int) -> bool:
                    """Whether so many answers have come, in time."""
                    with suppress(TimeoutError):
                        async with asyncio.timeout(REPLY_SECS):
                            while not listening.done() and got.answers < answers:
                                arrived.clear()
                                await arrived.wait()
                    return got.answers >= answers

                async def heard(audio_ms: int) -> None:
                    """As much as then was heard, or it is quiet: where something was cut, it may be less."""
                    with suppress(TimeoutError):
                        while not listening.done() and got.audio_ms < audio_ms:
                            arrived.clear()
                            async with asyncio.timeout(QUIET_SECS):
                                await arrived.wait()

                async with asyncio.TaskGroup() as tasks:
                    listening = tasks.create_task(listen())
                    listening.add_done_callback(lambda _: arrived.set())
                    loop = asyncio.get_running_loop()
                    due, before = loop.time(), 0.0
                    for frame in frames:
                        if frame.dir == "out":
                            expected.take(frame.frame)
                            continue
                        if socket.closed or listening.done():
                            continue  # the gateway has ended it; what it said then is still to be compared
                        due += max(0.0, frame.at - before) / speed
                        before = frame.at
                        await asyncio.sleep(due - loop.time())
                        events = _read(codec, frame)
                        if any(not isinstance(event, (Audio, Start)) for event in events):
                            late += not await until(expected.answers)
                            if any(isinstance(event, Stop) for event in events):
                                await heard(expected.audio_ms - 100)
                            due = max(due, loop.time())
                        await _send(socket, frame)
                    late += not await until(expected.answers)
                    await socket.close()
                    await asyncio.wait([listening], timeout=CLOSE_SECS)
                    listening.cancel()
    except aiohttp.WSServerHandshakeError as error:
        raise ReplayError(explain_status(error.status, url, "stream")) from error
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        raise ReplayError(explain(error, url, CONNECT_SECS)) from error
    return Outcome(expected.kinds, got.kinds, expected.audio_ms, got.audio_ms, late)


def _renamed(frames: list[Frame], start: Start) -> tuple[list[Frame], Start]:
    """The same under another call id of the same shape."""
    old = start.call_id
    new = re.sub("[0-9a-f]", lambda _: random.choice("0123456789abcdef"), old)  # noqa: S311 - unlike others, not secret
    renamed = [
        msgspec.structs.replace(frame, text=frame.text.replace(old, new)) if old and frame.text is not None else frame
        for frame in frames
    ]
    return renamed, msgspec.structs.replace(start, call_id=new)


def _carrier(kind: type[Provider], start: Start) -> Carrier:
    carrier = kind.carrier()
    list(carrier.encode(start))  # it learns its ids
    return carrier


def _read(codec: Codec, frame: Frame) -> list[Event]:
    try:
        return list(codec.decode(frame.frame))
    except MalformedFrame:
        return []


async def _send(socket: aiohttp.ClientWebSocketResponse, frame: Frame) -> None:
    content = frame.frame
    try:
        await (socket.send_str(content) if isinstance(content, str) else socket.send_bytes(content))
    except ConnectionError:
        return  # who listens sees it too


async def _ask(
    http: aiohttp.ClientSession,
    kind: type[Provider],
    start: Start,
    url: str,
    sign: Callable[[HttpRequest], HttpRequest] | None,
) -> str:
    """The stream's URL, from the webhook."""
    request = kind.webhook(Call(start.call_id, start.caller, start.called, account_id=start.account_id), url)
    request = sign(request) if sign is not None else request
    async with http.request(request.method, request.url, headers=dict(request.headers), data=dict(request.form)) as response:
        text = await response.text()
        if response.status != 200:
            raise ReplayError(explain_status(response.status, url, "webhook"))
    try:
        return kind.dial(text).url
    except MalformedFrame as error:
        raise ReplayError(f"a carrier would have refused the answer of {url}: {error}") from error
