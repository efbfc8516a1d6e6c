"""Services behind the gateway: the external echo of twenty lines, and one that records, judges and misbehaves on order."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import websockets
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from . import echo20
from .wire import NotJson, Violations, is_kind, parse

RAW, FRAMED = "telephony-gateway.v1.raw", "telephony-gateway.v1"
WIDTHS = {"mulaw": 1, "alaw": 1, "pcm_s16le": 2, "pcm_f32le": 4}


def _address(server: Server) -> str:
    return f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


class EchoService20:
    """`echo20.py` in this process: `.url`, and `.log` with the JSON texts it was sent."""

    def __init__(self) -> None:
        self.url = ""
        self._first = 0

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in echo20.log[self._first :]]

    async def __aenter__(self) -> Self:
        self._first = len(echo20.log)
        self._server = await websockets.serve(echo20.echo, "127.0.0.1", 0)
        self.url = _address(self._server)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await asyncio.wait_for(self._server.wait_closed(), 5)


# What the gateway may say: fields and their kinds. `?` after a kind allows null.
STRINGS = "strings"
TELLS: dict[str, dict[str, str]] = {
    "start": {
        "session": "string",
        "provider": "string",
        "kind": "string",
        "stream_id": "string",
        "call_id": "string?",
        "account_id": "string?",
        "caller": "string?",
        "called": "string?",
        "direction": "string?",
        "role": "speaker|listener",
        "track": "inbound|outbound",
        "media_format": "object?",
        "frame_ms": "integer?",
        "accepts": "array",
        "parameters": STRINGS,
        "resume": "object?",
    },
    "dtmf": {"digits": "string"},
    "checkpoint": {"name": "string", "outcome": "played|cleared|lost", "played_ms": "integer"},
    "clear": {"played_ms": "integer", "cleared_ms": "integer"},
    "transcript": {"text": "string", "final": "boolean", "language": "string?"},
    "barge_in": {"heard": "string?", "after_ms": "integer?"},
    "speech": {"who": "caller|agent", "active": "boolean"},
    "spoken": {"text": "string"},
    "gap": {"track": "inbound|outbound", "lost_ms": "integer", "reason": "carrier|overflow|resume"},
    "flow": {"state": "pause|resume", "buffered_ms": "integer"},
    "fault": {"code": "string", "message": "string", "ref": "any"},
    "ack": {"seq": "integer"},
    "stop": {
        "reason": "caller_hangup|carrier_closed|service_stop|service_lost|drain|protocol_error|timeout|detached",
        "account": "object",
    },
}
ACCOUNT = ("received", "forwarded", "dropped", "queued", "played", "cleared", "lost")
MAY_MISS = {("fault", "ref")}
RESUME = {
    "session": "string",
    "oldest": "integer",
    "next": "integer",
    "next_out": "integer",
    "queued_ms": "integer",
    "checkpoints": "array",
}
HEADER = struct.Struct("<BBHIQ")
REPLAYED, DISCONTINUITY, SILENCE, LAST = 1, 2, 4, 8


def wrong_field(value: object, rule: str) -> bool:
    if rule.endswith("?"):
        return value is not None and wrong_field(value, rule[:-1])
    if "|" in rule:
        return value not in rule.split("|")
    if rule == STRINGS:
        return not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values())
    return not is_kind(value, rule)  # type: ignore[arg-type]


@dataclass
class Message:
    at: float
    payload: Any
    """A dict (JSON), bytes (audio), or the text that was no JSON."""


@dataclass
class Frame:
    """Audio of framed mode."""

    track: int
    flags: int
    seq: int
    pos: int
    samples: bytes
    at: float = 0.0


@dataclass
class Memory:
    """What a service in framed mode knows of one stream, on whichever connection it came; each thing is taken once."""

    frames: list[Frame] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    """Everything but `start`, without the numbers."""
    next: int = 0
    next_text: int = 0
    repeated: int = 0
    out: int = 0
    """The number of the next frame of ours."""

    @property
    def audio(self) -> bytes:
        return b"".join(frame.samples for frame in self.frames)

    def take(self, frame: Frame) -> None:
        if frame.seq < self.next:
            self.repeated += 1
            return
        self.next = frame.seq + 1
        self.frames.append(frame)

    def read(self, text: dict[str, Any]) -> None:
        number = text.get("n")
        if number is None or number >= self.next_text:
            self.next_text = self.next_text if number is None else number + 1
            self.texts.append({name: value for name, value in text.items() if name not in ("n", "replayed")})

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [text for text in self.texts if text.get("type") == kind]


@dataclass
class Link:
    """One connection from the gateway, seen by the service."""

    ws: ServerConnection
    subprotocol: str | None
    headers: dict[str, str]
    path: str
    ledger: Violations
    messages: list[Message] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    close_code: int | None = None
    memory: Memory = field(default_factory=Memory)
    ready: bool = False
    _unacked: int = 0
    _expected: tuple[int, int] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def frames(self) -> list[Frame]:
        """Audio of this connection in framed mode."""
        return [m.payload for m in self.messages if isinstance(m.payload, Frame)]

    async def play(self, samples: bytes, *, frame_bytes: int = 320, flags: int = 0) -> None:
        """Audio in framed mode, numbered on from the last."""
        for at in range(0, len(samples), frame_bytes):
            await self.put(self.memory.out, samples[at : at + frame_bytes], flags=flags)

    async def put(self, seq: int, samples: bytes, *, flags: int = 0, pos: int = 0) -> None:
        """One frame with this number."""
        self.memory.out = max(self.memory.out, seq + 1)
        await self.ws.send(HEADER.pack(0x11, 1, flags, seq, pos) + samples)

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def audio(self) -> bytes:
        return b"".join(m.payload for m in self.messages if isinstance(m.payload, bytes))

    def texts(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [m.payload for m in self.messages if isinstance(m.payload, dict) and kind in (None, m.payload.get("type"))]

    @property
    def start(self) -> dict[str, Any]:
        return self.texts("start")[0]

    async def until(self, condition: Callable[[], object], timeout: float = 5.0) -> None:  # noqa: ASYNC109
        deadline = self.now() + timeout
        while not condition():
            left = deadline - self.now()
            if left <= 0:
                raise AssertionError(
                    f"not in {timeout} s; the gateway said {self.texts()[-5:]}, {len(self.audio)} bytes of audio"
                )
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, 0.05))

    async def wait_for(self, kind: str, *, count: int = 1, timeout: float = 5.0) -> dict[str, Any]:  # noqa: ASYNC109
        """The count-th text of this type."""
        await self.until(lambda: len(self.texts(kind)) >= count, timeout)
        return self.texts(kind)[count - 1]

    async def send(self, **command: Any) -> None:
        """A command: `await link.send(type="checkpoint", name="a")`."""
        await self.ws.send(json.dumps(command))

    async def send_audio(self, audio: bytes, *, frame_bytes: int | None = None, seconds: float = 0.0) -> None:
        """Audio in one message, or in messages of frame_bytes, one every `seconds` on an absolute schedule."""
        step = frame_bytes or len(audio)
        begin = self.now()
        for n, at in enumerate(range(0, len(audio), step)):
            if seconds:
                await asyncio.sleep(max(0.0, begin + n * seconds - self.now()))
            await self.ws.send(audio[at : at + step])

    async def raw(self, frame: Any, *, text: bool | None = None) -> None:
        """Rubbish as it is: str as text, bytes as binary, bytes with text=True as unchecked text, an iterable in fragments."""
        await self.ws.send(frame, text=text)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self.ws.close(code, reason)

    def drop(self) -> None:
        """Cut the TCP connection without a close frame."""
        self.ws.transport.abort()

    def stall(self) -> None:
        """Read nothing from now on."""
        self.ws.transport.pause_reading()

    def resume(self) -> None:
        self.ws.transport.resume_reading()


Script = Callable[[Link], Awaitable[None]]


class RecordingService:
    """Records every message with its time in `.links[n].messages`, and holds the gateway to its protocol in `.violations`.

    `subprotocol`: the one to answer, offered or not; None for none; a function of the offered list to choose.
    `script`: run once per connection beside the reading. `refuse`: HTTP statuses for the first handshakes, then it accepts.
    `offers`: the subprotocols the gateway must offer.
    In framed mode it says `ready` (`answer`: `next` that it remembers, None: live, `oldest`: no wish, `silent`: never)
    and acknowledges every `ack_frames` frames (0: never). `memories`, by session, may be shared by several services.
    `down` kills it, `up` brings it back on the same port.
    """

    def __init__(
        self,
        *,
        subprotocol: str | Callable[[list[str]], str | None] | None = None,
        script: Script | None = None,
        refuse: int | list[int] | None = None,
        handshake_delay: float = 0.0,
        small_buffers: bool = False,
        port: int = 0,
        offers: tuple[str, ...] = (RAW, FRAMED),
        answer: str | int | None = "next",
        ack_frames: int = 10,
        memories: dict[str, Memory] | None = None,
    ) -> None:
        self.answer, self.ack_frames = answer, ack_frames
        self.memories: dict[str, Memory] = {} if memories is None else memories
        self.offers = list(offers)
        self.subprotocol, self.script = subprotocol, script
        self.refusals = [refuse] * 10**6 if isinstance(refuse, int) else list(refuse or [])
        self.handshake_delay, self.small_buffers, self.port = handshake_delay, small_buffers, port
        self.links: list[Link] = []
        self.attempts: list[float] = []
        """Times of all handshakes, refused ones too."""
        self.ledger = Violations()
        self.errors: list[BaseException] = []
        self.url = ""

    @property
    def violations(self) -> list[str]:
        return self.ledger.lines()

    @property
    def link(self) -> Link:
        return self.links[-1]

    async def connected(self, count: int = 1, timeout: float = 5.0) -> Link:  # noqa: ASYNC109
        """The count-th connection."""
        async with asyncio.timeout(timeout):
            while len(self.links) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.links[count - 1]

    async def __aenter__(self) -> Self:
        self._changed = asyncio.Event()
        await self.up()
        return self

    async def up(self) -> None:
        """Listen (again)."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.small_buffers:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", self.port))
        self._server = await serve(
            self._handle,
            sock=listener,
            process_request=self._request,
            process_response=self._response,
            select_subprotocol=lambda connection, offered: None,
            compression=None,
            ping_interval=None,
            open_timeout=5,
            close_timeout=1,
            max_queue=None,
        )
        self.url = _address(self._server)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """As if the process were killed: nobody listens, and connections end without a close frame."""
        self._server.server.close()
        self.drop_all()
        self._server.close()
        await asyncio.wait_for(self._server.wait_closed(), 5)

    def drop_all(self) -> None:
        for link in self.links:
            if not link.closed.is_set():
                link.drop()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for link in self.links:
            if not link.closed.is_set():
                with suppress(Exception):
                    link.resume()
        self._server.close()
        await asyncio.wait_for(self._server.wait_closed(), 5)
        if error is None and self.errors:
            raise self.errors[0]

    async def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.attempts.append(asyncio.get_running_loop().time())
        if self.handshake_delay:
            await asyncio.sleep(self.handshake_delay)
        if self.refusals:
            return connection.respond(HTTPStatus(self.refusals.pop(0)), "not now\n")
        return None

    def _response(self, connection: ServerConnection, request: Request, response: Response) -> Response:
        offered = [part.strip() for line in request.headers.get_all("Sec-WebSocket-Protocol") for part in line.split(",")]
        chosen = self.subprotocol(offered) if callable(self.subprotocol) else self.subprotocol
        if response.status_code == 101:
            connection.chosen = chosen  # type: ignore[attr-defined]
            if chosen is not None:
                response.headers["Sec-WebSocket-Protocol"] = chosen
            if offered != self.offers:
                self.ledger.add(f"handshake: offered {offered}, not {self.offers}")
            if "Sec-WebSocket-Extensions" in request.headers:
                self.ledger.add("handshake: an extension offered")
        return response

    async def _handle(self, ws: ServerConnection) -> None:
        assert ws.request
        headers = {name.lower(): value for name, value in ws.request.headers.raw_items()}
        link = Link(ws, getattr(ws, "chosen", None), headers, ws.request.path, self.ledger)
        self.links.append(link)
        self._changed.set()
        async with asyncio.TaskGroup() as group:
            scripted = group.create_task(self._run(link)) if self.script else None
            try:
                async for frame in ws:
                    payload = self._read(link, frame)
                    link.messages.append(Message(link.now(), payload))
                    if link.subprotocol == FRAMED:
                        await self._remember(link, payload)
                    link._changed.set()
            except ConnectionClosed:
                pass
            finally:
                link.close_code = ws.close_code
                self._judge_end(link)
                link.closed.set()
                link._changed.set()
                if scripted:
                    await asyncio.wait([scripted], timeout=1)
                    scripted.cancel()

    async def _remember(self, link: Link, payload: Any) -> None:
        """Be a service in framed mode."""
        if isinstance(payload, Frame):
            link.memory.take(payload)
            link._unacked += 1
            if self.ack_frames and link._unacked >= self.ack_frames:
                link._unacked = 0
                with suppress(ConnectionClosed):  # what came before the close is read all the same
                    await link.send(type="ack", seq=payload.seq)
        elif isinstance(payload, dict) and payload.get("type") == "start":
            link.memory = self.memories.setdefault(payload["session"], Memory())
            if self.answer == "silent":
                return
            ready: dict[str, Any] = {"type": "ready"}
            if self.answer != "oldest":
                ready["next"] = link.memory.next if self.answer == "next" else self.answer
            if isinstance(ready.get("next"), int):
                link._expected = (ready["next"], -1)
            link.ready = True
            await link.send(**ready)
        elif isinstance(payload, dict):
            link.memory.read(payload)

    async def _run(self, link: Link) -> None:
        assert self.script
        try:
            await self.script(link)
        except ConnectionClosed:
            pass
        except Exception as error:  # noqa: BLE001, RUF100 - raised again when the service is left
            self.errors.append(error)

    # Judgement of the gateway by the service protocol.

    def _read(self, link: Link, frame: str | bytes) -> Any:
        wrong = self.ledger.add
        told = link.texts()
        if any(t.get("type") == "stop" for t in told):
            wrong("something after stop", frame)
        if isinstance(frame, bytes):
            if not told:
                wrong("audio before start")
            elif not frame:
                wrong("audio: empty")
            elif link.subprotocol == FRAMED:
                if frame[0] != 0x11 or len(frame) <= 16:
                    wrong("audio: no header of version 1", frame[:16])
                else:
                    return self._frame(link, frame)
            elif (media := told[0].get("media_format")) is None:
                wrong("audio on a stream of text")
            elif len(frame) % WIDTHS.get(media.get("encoding"), 1):
                wrong("audio: half a sample")
            return frame
        try:
            value = parse(frame)
        except NotJson as error:
            wrong(f"text: {error}", frame)
            return frame
        kind = value.get("type")
        fields = TELLS.get(kind) if isinstance(kind, str) else None
        if fields is None:
            wrong(f"unknown type {kind!r}", frame)
            return value
        if (kind == "start") != (not told):
            wrong("start: not first" if told else f"{kind} before start", frame)
        framed = link.subprotocol == FRAMED and kind not in ("start", "ack")
        for name in value.keys() - fields.keys() - {"type"} - ({"n", "replayed"} if framed else set()):
            wrong(f"{kind}: unexpected field {name!r}", frame)
        numbered = is_kind(value.get("n"), "integer") or (kind == "gap" and "n" not in value)
        if framed and (not numbered or value.get("replayed") not in (None, True)):
            wrong(f"{kind}: no number", frame)
        if kind == "start" and (resume := value.get("resume")) is not None:
            if resume.keys() != RESUME.keys() or any(wrong_field(resume[name], rule) for name, rule in RESUME.items()):
                wrong("start.resume", frame)
            elif link.subprotocol != FRAMED:
                wrong("start.resume in raw mode", frame)
        for name, rule in fields.items():
            if name not in value:
                if (kind, name) not in MAY_MISS:
                    wrong(f"{kind}: field {name!r} is missing", frame)
            elif wrong_field(value[name], rule):
                wrong(f"{kind}.{name}: not {rule}", frame)
        if kind == "start" and isinstance(media := value.get("media_format"), dict):
            good = media.keys() == {"encoding", "sample_rate", "channels"} and media["encoding"] in WIDTHS
            if not good or not is_kind(media["sample_rate"], "integer") or media["channels"] != 1:
                wrong("start.media_format", frame)
        if kind == "stop" and isinstance(account := value.get("account"), dict):
            for name in ACCOUNT:
                if not is_kind(account.get(name), "integer"):
                    wrong(f"stop.account.{name}: not an integer", frame)
            for name in account.keys() - set(ACCOUNT):
                wrong(f"stop.account: unexpected field {name!r}", frame)
        return value

    def _frame(self, link: Link, message: bytes) -> Frame:
        frame = Frame(*HEADER.unpack_from(message)[1:], message[16:], link.now())
        wrong = self.ledger.add
        media = link.start.get("media_format") or {}
        width = WIDTHS.get(media.get("encoding", ""), 1)
        if not link.ready and self.answer != "silent":
            wrong("audio before ready")
        if frame.track != ("inbound", "outbound").index(link.start["track"]):
            wrong("audio: of another track")
        if frame.flags & ~15:
            wrong("audio: unknown flags", message[:16])
        if len(frame.samples) % width:
            wrong("audio: half a sample", message[:16])
        if (expected := link._expected) is not None and not frame.flags & DISCONTINUITY:
            if frame.seq != expected[0]:
                wrong("audio: a number was left out", message[:16])
            elif expected[1] not in (-1, frame.pos):
                wrong("audio: a position was left out", message[:16])
        link._expected = (frame.seq + 1, frame.pos + len(frame.samples) // width)
        return frame

    def _judge_end(self, link: Link) -> None:
        closed = link.ws.protocol
        if closed.close_rcvd_then_sent and closed.close_rcvd:
            stopped = bool(link.texts("stop"))
            if closed.close_rcvd.code == 1000 and not stopped:
                self.ledger.add("closed 1000 without stop")
            elif stopped and closed.close_rcvd.code != 1000:
                self.ledger.add(f"stop, then closed with {closed.close_rcvd.code} and not 1000")


@asynccontextmanager
async def scripted(*steps: dict[str, Any] | bytes | float, **options: Any) -> AsyncIterator[RecordingService]:
    """A service that after `start` takes these steps in order: a dict is sent, bytes are played, a number waits seconds."""

    async def run(link: Link) -> None:
        await link.wait_for("start")
        for step in steps:
            if isinstance(step, dict):
                await link.send(**step)
            elif isinstance(step, bytes):
                await link.send_audio(step)
            else:
                await asyncio.sleep(step)

    async with RecordingService(script=run, **options) as service:
        yield service
