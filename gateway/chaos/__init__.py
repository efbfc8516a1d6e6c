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
from typing import Any

from gateway.chaos.messages import Frames, Message
from gateway.chaos.plan import Deed, Direction, Faults, Plan, changed

READ_BYTES = 64 * 1024
MOST_QUEUED_BYTES = 1024 * 1024
"""Of one direction of one connection; whoever sends more waits, as on a real line."""
REORDER_WINDOW = 3
"""A message that is held back comes at most so many messages later."""


Tell = Callable[[dict[str, Any]], None]
"""Called with each thing the proxy did: `at` (seconds since it started), `connection`, `did`, and what more there is."""


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
                    pipe.faults = changed(pipe.faults, changes)
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


def _abort(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
