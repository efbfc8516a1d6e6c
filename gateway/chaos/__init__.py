"""A TCP proxy that does what networks do at their worst, on purpose: late, slow, in crumbs, cut off, and with WebSocket messages
lost, doubled, out of order or damaged. For tests, ours and anybody's. Seeded: the same bytes meet the same accidents.

`up` is from whoever connects to the target, `down` comes back.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from random import Random
from time import monotonic
from typing import Any, Literal

import msgspec
from msgspec import Struct

Direction = Literal["up", "down"]
Deed = Literal["stall", "resume", "half_open", "reset"]

READ_BYTES = 64 * 1024
MOST_QUEUED_BYTES = 1024 * 1024
"""Of one direction of one connection; whoever sends more waits, as on a real line."""
LONGEST_MESSAGE = 64 * 1024 * 1024
"""Longer ones are no WebSocket messages, and pass as they are."""
REORDER_WINDOW = 3
"""A message that is held back comes at most so many messages later."""
PRINTABLE = bytes(range(0x20, 0x7F))


class Faults(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens in one direction. Shares are of 1 and of data messages, each message meets one accident at most.

    `latency_ms` ± `jitter_ms`, order kept; `rate` in bit/s (0: no limit); `slice` — bytes in one write (0: as they come).
    `match` — only messages that contain this text meet accidents; control frames never do.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    rate: float = 0.0
    slice: int = 0
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    match: str = ""

    def __post_init__(self) -> None:
        shares = (self.drop, self.duplicate, self.reorder, self.corrupt)
        if min(self.latency_ms, self.jitter_ms, self.rate, self.slice, *shares) < 0 or sum(shares) > 1:
            raise ValueError("nothing is below 0, and drop, duplicate, reorder and corrupt are at most 1 together")

    @property
    def accidents(self) -> bool:
        return bool(self.drop or self.duplicate or self.reorder or self.corrupt)


class Step(Struct, frozen=True, forbid_unknown_fields=True):
    """`at` seconds after a connection began: other faults from now on (fields not named stay as they are), or a deed.

    `stall` — nothing is read any more, until `resume`; `half_open` — everything vanishes and neither end is told, for good;
    `reset` — both connections end by RST. A stall is of one `direction` if that is given.
    """

    at: float
    up: dict[str, Any] = {}
    down: dict[str, Any] = {}
    do: Deed | None = None
    direction: Direction | None = None


class Plan(Struct, frozen=True):
    """What a proxy does to every connection. `reset_after` — bytes forwarded in one direction, then RST (0: never)."""

    up: Faults = Faults()
    down: Faults = Faults()
    steps: tuple[Step, ...] = ()
    reset_after: int = 0
    seed: int = 0

    @classmethod
    def read(cls, steps: object, **options: Any) -> Plan:
        """With a script: a list of steps as in YAML or JSON. Raises ValueError."""
        try:
            read = msgspec.convert(steps, tuple[Step, ...], str_keys=True)
            plan = cls(steps=tuple(sorted(read, key=lambda step: step.at)), **options)
            for step in plan.steps:
                _changed(plan.up, step.up)
                _changed(plan.down, step.down)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None
        return plan


Tell = Callable[[dict[str, Any]], None]
"""Called with each thing the proxy did: `at` (seconds since it started), `connection`, `did`, and what more there is."""


class Message(Struct):
    """One WebSocket message, in the frames it came in; `raw` is what goes over the wire."""

    raw: bytes
    opcode: int
    frames: list[tuple[int, int, bytes]] = []  # of each: where its payload begins and ends, and its mask

    @property
    def control(self) -> bool:
        return self.opcode >= 8

    def payload(self) -> bytes:
        return b"".join(_unmasked(self.raw[begin:end], mask) for begin, end, mask in self.frames)

    def corrupted(self, random: Random) -> bytes:
        """The same with one byte changed; text stays text, so that it is not the WebSocket layer that refuses it."""
        begin, end, mask = max(self.frames, key=lambda frame: frame[1] - frame[0])
        if begin == end:
            return self.raw
        at = random.randrange(begin, end)
        key = mask[(at - begin) % 4] if mask else 0
        old = self.raw[at] ^ key
        if self.opcode == 1:
            if old >= 0x80:  # in the middle of a character
                return self.raw
            new = random.choice([each for each in PRINTABLE if each != old])
        else:
            new = old ^ random.randrange(1, 256)
        return self.raw[:at] + bytes([new ^ key]) + self.raw[at + 1 :]


class Frames:
    """Cuts a byte stream into WebSocket messages (RFC 6455, section 5). Pure."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._message = Message(b"", 0, [])

    def feed(self, data: bytes) -> Iterator[Message]:
        """Whole messages, oldest first. Raises ValueError for what can't be one; `rest` then has the bytes."""
        self._buffer += data
        while (message := self._next()) is not None:
            yield message

    @property
    def rest(self) -> bytes:
        """Bytes of a message that is not whole yet."""
        return self._message.raw + bytes(self._buffer)

    def _next(self) -> Message | None:
        while True:
            buffer = self._buffer
            if len(buffer) < 2:
                return None
            opcode, length, at = buffer[0] & 0x0F, buffer[1] & 0x7F, 2
            if length == 126:
                length, at = int.from_bytes(buffer[2:4]), 4
            elif length == 127:
                length, at = int.from_bytes(buffer[2:10]), 10
            mask = b""
            if buffer[1] & 0x80:
                mask, at = bytes(buffer[at : at + 4]), at + 4
            if length > LONGEST_MESSAGE:
                raise ValueError("no WebSocket message")
            if len(buffer) < at + length:
                return None
            raw, final = bytes(buffer[: at + length]), buffer[0] & 0x80
            del buffer[: at + length]
            if opcode >= 8:
                return Message(raw, opcode, [(at, at + length, mask)])
            message = self._message
            message.opcode = opcode or message.opcode
            before = len(message.raw)
            message.raw += raw
            message.frames.append((before + at, before + at + length, mask))
            if final:
                self._message = Message(b"", 0, [])
                return message


class Accidents:
    """What becomes of messages. Pure but for its dice."""

    def __init__(self, random: Random, did: Callable[[str], None]) -> None:
        self._random = random
        self._did = did
        self._held: list[tuple[int, bytes]] = []  # how many messages go before it

    def meet(self, message: Message, faults: Faults) -> Iterable[bytes]:
        """What goes on in place of a message, in order."""
        if message.control or (faults.match and faults.match.encode() not in message.payload()):
            return [*self.flush(), message.raw]  # nothing is overtaken by the end
        dice, out = self._random.random(), [message.raw]
        for share, what in (
            (faults.drop, "dropped"),
            (faults.duplicate, "duplicated"),
            (faults.corrupt, "corrupted"),
            (faults.reorder, "reordered"),
        ):
            if dice >= share:
                dice -= share
                continue
            if what == "dropped":
                out = []
            elif what == "duplicated":
                out *= 2
            elif what == "corrupted":
                out = [message.corrupted(self._random)]
            else:
                self._held.append((self._random.randint(1, REORDER_WINDOW), message.raw))
                self._did(what)
                return []
            self._did(what)
            break
        due = [(left - 1, raw) for left, raw in self._held]
        self._held = [(left, raw) for left, raw in due if left > 0]
        return [*out, *(raw for left, raw in due if left <= 0)]

    def flush(self) -> list[bytes]:
        """What was held back."""
        held, self._held = [raw for _, raw in self._held], []
        return held


class Chaos:
    """The proxy. `start`, then it serves until `stop`. `counts` is what it did, by `up.dropped` and the like."""

    def __init__(self, plan: Plan, host: str, port: int, *, tell: Tell | None = None) -> None:
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.connections: list[Connection] = []
        """Those that are open."""
        self._to = host, port
        self._tell = tell
        self._began = monotonic()
        self._server: asyncio.Server | None = None
        self._made = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listens. Returns the port. Raises OSError."""
        self._server = await asyncio.start_server(self._connected, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in [*self.connections]:
            connection.reset()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def do(self, deed: Deed, direction: Direction | None = None) -> None:
        """Do this to every connection that is open."""
        for connection in [*self.connections]:
            connection.do(deed, direction)

    def did(self, number: int, what: str, **more: Any) -> None:
        direction = more.get("direction")
        self.counts[f"{direction}.{what}" if direction else what] += 1
        if self._tell is not None:
            self._tell({"at": round(monotonic() - self._began, 3), "connection": number, "did": what, **more})

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._made += 1
        number = self._made
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            there, back = await asyncio.open_connection(*self._to)
        except OSError as error:
            self.did(number, "refused", why=str(error))
            _abort(writer)
            return
        self.did(number, "connected")
        connection = Connection(self, number, (reader, writer), (there, back))
        self.connections.append(connection)
        try:
            await connection.run()
        except asyncio.CancelledError:
            pass  # by `stop`; whoever made the task would only complain
        finally:
            self.connections.remove(connection)
            self.did(number, "ended", up_bytes=connection.up.forwarded, down_bytes=connection.down.forwarded)


class Connection:
    """One connection through the proxy."""

    def __init__(
        self,
        chaos: Chaos,
        number: int,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.chaos = chaos
        self.number = number
        self.upgraded = False
        self.gone = False  # half open
        self.writers = near[1], far[1]
        for writer in self.writers:
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.up = Pipe(self, "up", near[0], far[1], chaos.plan.up)
        self.down = Pipe(self, "down", far[0], near[1], chaos.plan.down)

    async def run(self) -> None:
        """Until both ends are done."""
        try:
            async with asyncio.TaskGroup() as group:
                stepping = group.create_task(self._step())
                pipes = (self.up, self.down)
                writing = [group.create_task(pipe.write()) for pipe in pipes]
                await asyncio.wait([group.create_task(pipe.read()) for pipe in pipes])
                for pipe in pipes:
                    pipe.over()
                await asyncio.wait(writing)
                stepping.cancel()
        finally:
            for writer in self.writers:
                writer.close()

    def do(self, deed: Deed, direction: Direction | None = None) -> None:
        pipes = [pipe for pipe in (self.up, self.down) if direction in (None, pipe.direction)]
        match deed:
            case "stall":
                for pipe in pipes:
                    pipe.flowing.clear()
            case "resume":
                for pipe in pipes:
                    pipe.flowing.set()
            case "half_open":
                self.gone = True
            case "reset":
                self.reset()
        self.chaos.did(self.number, deed, **({"direction": direction} if direction else {}))

    def reset(self) -> None:
        """RST to both ends."""
        for pipe in (self.up, self.down):
            pipe.over()
        for writer in self.writers:
            _abort(writer)

    async def _step(self) -> None:
        began = monotonic()
        for step in self.chaos.plan.steps:
            await asyncio.sleep(max(0.0, began + step.at - monotonic()))
            for pipe, changes in ((self.up, step.up), (self.down, step.down)):
                if changes:
                    pipe.faults = _changed(pipe.faults, changes)
                    self.chaos.did(self.number, "changed", direction=pipe.direction, faults=changes)
            if step.do is not None:
                self.do(step.do, step.direction)


class Pipe:
    """One direction: reads, has messages meet their accidents, and writes when it is time."""

    def __init__(
        self,
        connection: Connection,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        faults: Faults,
    ) -> None:
        self.direction: Direction = direction
        self.faults = faults
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.forwarded = 0
        self._connection = connection
        self._reader, self._writer = reader, writer
        self._random = Random(f"{connection.chaos.plan.seed}:{connection.number}:{direction}")  # noqa: S311 - not for secrets
        self._accidents = Accidents(self._random, lambda what: connection.chaos.did(connection.number, what, direction=direction))
        self._frames: Frames | None = Frames()
        self._head = b""
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued = 0
        self._moved = asyncio.Event()
        self._ended = False
        self._last_due = self._free_at = 0.0

    def over(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self.flowing.set()
        self._moved.set()

    async def read(self) -> None:
        try:
            while not self._ended:
                await self.flowing.wait()
                while self._queued > MOST_QUEUED_BYTES and not self._ended:
                    self._moved.clear()
                    await self._moved.wait()
                data = await self._reader.read(READ_BYTES)
                await self.flowing.wait()
                if self._connection.gone:
                    if not data:
                        return  # and nobody is told
                    continue
                for piece in self._pieces(data) if data else self._rest():
                    self._put(piece)
                if not data:
                    break
        except OSError:
            if not self._connection.gone:
                self._connection.reset()  # whoever breaks off is seen to break off
        finally:
            if not self._connection.gone:
                self.over()

    async def write(self) -> None:
        with suppress(OSError):
            while True:
                while not self._queue:
                    if self._ended:
                        if self._writer.can_write_eof():
                            self._writer.write_eof()
                        return
                    self._moved.clear()
                    await self._moved.wait()
                due, piece = self._queue[0]
                await asyncio.sleep(max(0.0, max(due, self._free_at) - monotonic()))
                self._queue.popleft()
                self._queued -= len(piece)
                self._moved.set()
                if self._connection.gone:
                    continue
                await self._write(piece)

    async def _write(self, piece: bytes) -> None:
        limit = self._connection.chaos.plan.reset_after
        if limit and self.forwarded + len(piece) >= limit:
            piece = piece[: limit - self.forwarded]
        size = self.faults.slice or len(piece) or 1
        for at in range(0, len(piece), size):
            self._writer.write(piece[at : at + size])
            await self._writer.drain()
            if self.faults.slice:
                await asyncio.sleep(0)  # or the event loop puts them together again
        self.forwarded += len(piece)
        if self.faults.rate:
            self._free_at = max(self._free_at, monotonic() - 0.05) + len(piece) * 8 / self.faults.rate
        if limit and self.forwarded >= limit:
            self._connection.do("reset")

    def _put(self, piece: bytes) -> None:
        faults = self.faults
        late = faults.latency_ms + self._random.uniform(-faults.jitter_ms, faults.jitter_ms)
        self._last_due = max(self._last_due, monotonic() + max(0.0, late) / 1000)
        self._queue.append((self._last_due, piece))
        self._queued += len(piece)
        self._moved.set()

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """What goes on of these bytes: as they are, or once this is a WebSocket, message by message."""
        connection = self._connection
        if not connection.upgraded:
            if self.direction == "up":
                yield data
                return
            self._head += data
            if not self._head.startswith(b"HTTP/1.1 101"[: len(self._head)]):
                yield self._head
                self._head = b""
                return
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            yield head + found
            self._head = b""
            connection.upgraded = True
        if self._frames is None:
            yield data
            return
        try:
            for message in self._frames.feed(data):
                yield from self._accidents.meet(message, self.faults)
        except ValueError:
            rest, self._frames = self._frames.rest, None
            yield rest

    def _rest(self) -> Iterator[bytes]:
        yield from self._accidents.flush()
        if rest := self._head + (self._frames.rest if self._frames is not None else b""):
            yield rest


def _changed(faults: Faults, changes: dict[str, Any]) -> Faults:
    return msgspec.convert(msgspec.structs.asdict(faults) | changes, Faults)


def _unmasked(payload: bytes, mask: bytes) -> bytes:
    if not mask or not payload:
        return payload
    key = int.from_bytes((mask * (len(payload) // 4 + 1))[: len(payload)])
    return (int.from_bytes(payload) ^ key).to_bytes(len(payload))


def _abort(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
