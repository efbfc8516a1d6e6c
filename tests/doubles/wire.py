"""What every double needs: one strict WebSocket end that dials, writes down, and judges. No protocol's words here."""

import asyncio
import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Any, Literal, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
ODDITIES: tuple[Any, ...] = (None, 7, 1.5, "", "söme", True, [], [1, {"a": None}], {"deep": {"er": []}})


class Refused(Exception):
    """The handshake failed: `.code` is the carrier's number for it, `.status` the HTTP status if there was one."""

    def __init__(self, code: str, why: str, status: int | None = None, body: bytes = b"") -> None:
        super().__init__(f"{code} {why}")
        self.code, self.status, self.body = code, status, body


class Violations:
    """Each kind once, in order of first appearance, with a count and the first frame that showed it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.samples: dict[str, str] = {}

    def add(self, kind: str, frame: object = "") -> None:
        self.counts[kind] += 1
        self.samples.setdefault(kind, repr(frame)[:300])

    def lines(self) -> list[str]:
        return [kind if n == 1 else f"{kind} (x{n})" for kind, n in self.counts.items()]


class NotJson(ValueError):
    """The text is not one JSON object as RFC 8259 has it."""


def parse(text: str) -> dict[str, Any]:
    """One JSON object: duplicate members and NaN refused."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in items}) != len(items):
            raise NotJson("a member appears twice")
        return dict(items)

    def constant(name: str) -> None:
        raise NotJson(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except NotJson:
        raise
    except ValueError as error:
        raise NotJson("not JSON") from error
    if not isinstance(value, dict):
        raise NotJson("not a JSON object")
    return value


Kind = Literal["string", "number", "integer", "boolean", "object", "array", "any"]


def is_kind(value: object, kind: Kind) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case _:
            return True


def misshapen(value: object, where: str, required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> str | None:
    """The first thing wrong with the members of an object, or None."""
    if not isinstance(value, dict):
        return f"{where}: not an object"
    allowed = {**required, **(optional or {})}
    for name in value:
        if name not in allowed:
            return f"{where}: unexpected member {name!r}"
    for name, kind in allowed.items():
        if name not in value:
            if name in required:
                return f"{where}: member {name!r} is missing"
        elif not is_kind(value[name], kind):
            return f"{where}.{name}: not a {kind}"
    return None


def standard_base64(text: str) -> bytes | None:
    """RFC 4648 section 4, padded and canonical; None for anything else."""
    if len(text) % 4 or not BASE64.fullmatch(text):
        return None
    data = base64.b64decode(text)
    return data if base64.b64encode(data).decode() == text else None


class _Dial(connect):
    """A dialler that follows no redirect."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class Peer:
    """A carrier's end of the socket. Subclasses say what to send first, how to judge a frame, how to hang up."""

    refused_code = "refused"
    protocol_code = "protocol error"
    max_message: int = 2**20

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        user_agent: str | None = None,
        subprotocols: Iterable[str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        open_timeout: float = 5.0,
        close_timeout: float = 2.0,
    ) -> None:
        self.url = url
        self.headers = dict(headers or {})
        self.user_agent = user_agent
        self.subprotocols = [Subprotocol(p) for p in subprotocols] if subprotocols else None
        self.shuffle = shuffle
        self.random = Random(seed)
        self.open_timeout, self.close_timeout = open_timeout, close_timeout
        self.ledger = Violations()
        self.received: list[Any] = []
        """Every message from the gateway in order: an object, or the text or bytes that were none."""
        self.received_at: list[float] = []
        self.frame_bytes = 0
        self.close_code: int | None = None
        self.close_reason = ""
        self.closed = asyncio.Event()
        self._changed = asyncio.Event()
        self._watchers: list[Callable[[], None]] = []
        self._sending = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._group = asyncio.TaskGroup()
        self._leaving = False

    # What a subclass writes.

    async def _begin(self) -> None:
        """Called once the socket is open, before anything else."""

    async def _judge(self, frame: dict[str, Any]) -> None:
        """Called with each JSON object the gateway sent."""

    async def _not_json(self, frame: str | bytes, why: str) -> None:
        """Called with anything else the gateway sent."""

    async def hangup(self) -> None:
        """End as the carrier does when the caller hangs up."""
        await self.close()

    # Life.

    @property
    def ws(self) -> ClientConnection:
        return self._ws

    async def __aenter__(self) -> Self:
        try:
            self._ws = await _Dial(
                self.url,
                additional_headers=self.headers,
                user_agent_header=self.user_agent,
                subprotocols=self.subprotocols,
                compression=None,
                proxy=None,
                ping_interval=None,
                open_timeout=self.open_timeout,
                close_timeout=self.close_timeout,
                max_size=self.max_message,
                max_queue=None,
                write_limit=2**20,
            )
        except InvalidStatus as error:
            response = error.response
            raise Refused(
                self.refused_code, f"HTTP {response.status_code}", response.status_code, bytes(response.body)
            ) from error
        except (InvalidHandshake, OSError, TimeoutError, EOFError) as error:
            raise Refused(self.refused_code, f"{type(error).__name__}: {error}") from error
        self.opened_at = self.now()
        await self._group.__aenter__()
        self._spawn(self._read())
        try:
            with suppress(ConnectionClosed):
                await self._begin()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                with suppress(ConnectionClosed):
                    await self.hangup()
            else:
                self.drop()
        finally:
            self.drop()
            for task in self._tasks:
                task.cancel()
            if isinstance(error, asyncio.CancelledError):
                await self._group.__aexit__(kind, error, trace)
            else:
                await self._group.__aexit__(None, None, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(self._group.create_task(work))

    def now(self) -> float:
        """Seconds on the clock all times of this double are told by (the event loop's)."""
        return asyncio.get_running_loop().time()

    async def _read(self) -> None:
        try:
            while True:
                frame = await self.ws.recv()
                self.received_at.append(self.now())
                self.frame_bytes = len(frame)
                try:
                    if isinstance(frame, bytes):
                        raise NotJson("a binary frame")
                    value = parse(frame)
                except NotJson as error:
                    self.received.append(frame)
                    await self._not_json(frame, str(error))
                else:
                    self.received.append(value)
                    await self._judge(value)
                self.changed()
        except ConnectionClosed as end:
            sent, got = end.sent, end.rcvd
            self.close_code = got.code if got else 1006
            self.close_reason = got.reason if got else ""
            if sent and not end.rcvd_then_sent and not self._leaving and sent.code in (1002, 1007, 1009):
                self.violate(f"{self.protocol_code} {sent.code} {sent.reason}".strip())
        finally:
            self.closed.set()
            self.changed()

    # Judgement.

    def violate(self, kind: str, frame: object = "") -> None:
        self.ledger.add(kind, frame)

    @property
    def violations(self) -> list[str]:
        """Kinds of wrong frames, each once, with ` (xN)` when seen more than once. `[]` is a pass."""
        return self.ledger.lines()

    # Waiting.

    def changed(self) -> None:
        for look in self._watchers:
            with suppress(Exception):
                look()
        self._changed.set()

    async def until(self, condition: Callable[[], object], timeout: float = 5.0) -> None:  # noqa: ASYNC109 - a deadline with a message
        """Wait until the condition held, if only for a moment; AssertionError with the state so far when it does not in time."""
        held = asyncio.Event()

        def look() -> None:
            if condition():
                held.set()

        deadline = self.now() + timeout
        self._watchers.append(look)
        try:
            look()
            while not held.is_set():
                left = deadline - self.now()
                if left <= 0:
                    raise AssertionError(f"not in {timeout} s; violations {self.violations}, received {self.received[-5:]!r}")
                self._changed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(left, 0.02))
                look()
        finally:
            self._watchers.remove(look)

    async def wait_closed(self, timeout: float = 5.0) -> int:  # noqa: ASYNC109
        """The close code the gateway gave (1006: none)."""
        await self.until(self.closed.is_set, timeout)
        assert self.close_code is not None
        return self.close_code

    # Sending.

    async def raw(self, frame: Any, *, text: bool | None = None) -> None:
        """Send as it is: str as text, bytes as binary, bytes with text=True as unchecked text, an iterable in fragments."""
        async with self._sending:
            await self.ws.send(frame, text=text)

    async def _put(self, frame: dict[str, Any]) -> None:
        await self.ws.send(json.dumps(self.dress(frame), separators=(",", ":"), ensure_ascii=self.shuffle))

    def dress(self, frame: dict[str, Any], *, keep: tuple[str, ...] = ("customParameters",)) -> dict[str, Any]:
        """With shuffle: the same object in another key order with members nobody knows."""
        if not self.shuffle:
            return frame
        items = [
            (name, self.dress(value) if isinstance(value, dict) and name not in keep else value) for name, value in frame.items()
        ]
        if self.random.random() < 0.4:
            items.append((f"xFuture{self.random.randrange(100)}", self.random.choice(ODDITIES)))
        self.random.shuffle(items)
        return dict(items)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self._leaving = True
        await self.ws.close(code, reason)
        await self.closed.wait()

    def drop(self) -> None:
        """Cut the TCP connection without a close frame."""
        self._leaving = True
        self.ws.transport.abort()
