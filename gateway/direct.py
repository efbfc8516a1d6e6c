"""WebSockets without a queue, a task's turn or a coroutine for each message. What leans on aiohttp's internals is here only.

aiohttp puts each message into a queue and wakes the task that waits in `receive`. Here messages go to a handler instead, from
within the loop's reading, while that task waits and nothing is queued before them. All else comes out of `receive` as ever:
control frames, the end, what the handler does not take, and of a burst all but the first few, so that no peer holds up the loop,
and aiohttp stops reading one that floods. Where aiohttp is not as expected, everything comes out of `receive`.

On the way out an `outlet` writes what aiohttp's writer would write, in a third of the steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiohttp import ClientConnectionResetError, ClientWebSocketResponse, WSMessage, WSMsgType, client, web, web_ws
from aiohttp.http import WebSocketReader, WebSocketWriter

from gateway.errors import untrace

try:
    from aiohttp._websocket.helpers import websocket_mask
except ImportError:
    websocket_mask = None  # type: ignore[assignment]

IN_A_ROW = 8
"""Messages of one peer that are handled in one lap of the event loop."""

Handler = Callable[[Any], bool]
"""Is given a message, text or bytes. Returns whether it has taken it."""

Outlet = Callable[[str | bytes], None]
"""Writes a message, text or bytes. See `outlet`."""

_SENDS = tuple(send for kind in (web.WebSocketResponse, ClientWebSocketResponse) for send in (kind.send_str, kind.send_bytes))

_TEXT, _BINARY = 0x81, 0x82
"""A frame's first byte: the whole message, and its kind."""

_QUEUE = "WebSocketDataQueue"

if TYPE_CHECKING:
    from aiohttp._websocket.reader import WebSocketDataQueue as _Plain
else:
    _Plain = getattr(web_ws, _QUEUE, object)


class HandlerFailed(Exception):
    """A handler raised `__cause__`, and gets nothing any more. Comes out of `receive` as the data of an ERROR message."""


class DirectQueue(_Plain):
    """aiohttp's queue, which offers messages to a handler first."""

    handler: Handler | None = None
    socket: Any = None
    left = IN_A_ROW

    def feed_data(self, data: Any, size: int) -> None:
        handler = self.handler
        kind = data[0]
        if (
            handler is None
            or not self.left
            or self._buffer
            or not self.socket._waiting
            or (kind is not WSMsgType.TEXT and kind is not WSMsgType.BINARY)
        ):
            super().feed_data(data, size)
            return
        self.left -= 1
        if not self.left:
            asyncio.get_running_loop().call_soon(self._refill)
        try:
            if handler(data[1]):
                return
        except Exception as error:
            self.handler = None
            failed = HandlerFailed(repr(error))
            failed.__cause__ = error
            data, size = WSMessage(WSMsgType.ERROR, failed, None), 0
        super().feed_data(data, size)

    def _refill(self) -> None:
        self.left = IN_A_ROW


def _note(taken: list[object], data: object) -> bool:
    taken.append(data)
    return True


def _works() -> bool:
    """Whether the installed aiohttp's reader asks our queue, and both its sides make theirs by the same name."""
    taken: list[object] = []
    try:
        queue = DirectQueue(SimpleNamespace(_reading_paused=False), 2**16, loop=None)  # type: ignore[arg-type]
        queue.handler, queue.socket = partial(_note, taken), SimpleNamespace(_waiting=True)
        reader = WebSocketReader(queue, 0, compress=False, decode_text=True)
        reader.feed_data(b"\x81\x02hi\x82\x01\x00\x89\x00")
        queue.socket._waiting = False
        reader.feed_data(b"\x81\x02no")
        alike = getattr(client, _QUEUE) is getattr(web_ws, _QUEUE)
    except Exception:
        return False
    return alike and taken == ["hi", b"\0"] and len(queue._buffer) == 2


def _heartbeat_works() -> bool:
    """Whether aiohttp's heartbeat goes by what our half of it sets."""
    try:
        return all(
            callable(kind._on_data_received)
            and "_heartbeat_when" in kind._send_heartbeat.__code__.co_names
            and "_pong_response_cb" in kind._cancel_pong_response_cb.__code__.co_names
            for kind in (web.WebSocketResponse, ClientWebSocketResponse)
        )
    except AttributeError:
        return False


WORKS = _works()
if WORKS:
    setattr(client, _QUEUE, DirectQueue)
    setattr(web_ws, _QUEUE, DirectQueue)


def hand_over(socket: web.WebSocketResponse | ClientWebSocketResponse, handler: Handler | None) -> bool:
    """Have a socket's messages offered to a handler from now on, or to none any more. False: `receive` will have them all.

    So it is also where aiohttp is not as expected, and with a socket that has a `receive` of its own.
    """
    queue = socket._reader
    if (
        not isinstance(queue, DirectQueue)
        or not isinstance(getattr(socket, "_waiting", None), bool)
        or type(socket).receive not in (web.WebSocketResponse.receive, ClientWebSocketResponse.receive)
    ):
        return False
    queue.handler, queue.socket = handler, socket if handler is not None else None
    return True


def release(socket: web.WebSocketResponse | ClientWebSocketResponse) -> None:
    """After its end: let go of cycles. The connection that it holds would call it back, and its error came out of it."""
    connection = getattr(socket._reader, "_protocol", None)
    if connection is not None and hasattr(connection, "_data_received_cb"):
        connection._data_received_cb = None
    untrace(socket.exception())


def ended_unwaited(error: object) -> bool:
    """Whether an error is aiohttp's own at a shutdown: a request ended in the lap in which it was no longer waited for."""
    trace = error.__traceback__ if isinstance(error, asyncio.InvalidStateError) else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ending = getattr(web.RequestHandler, "_handle_request", None)
    return trace is not None and ending is not None and trace.tb_frame.f_code is ending.__code__


def outlet(socket: web.WebSocketResponse | ClientWebSocketResponse) -> Outlet:
    """How to write to a socket that is connected: at once, without waiting for its transport to drain.

    What it returns is given a message, text or bytes, and raises ConnectionError once nothing can be written any more. With a
    socket that has a `send_str` or `send_bytes` of its own, it goes by these.
    """
    writer: Any = socket._writer
    own = type(socket)
    inherited = own.send_str in _SENDS and own.send_bytes in _SENDS
    if not OUTLETS_WORK or not inherited or type(writer) is not WebSocketWriter or writer.compress:
        return partial(_send, socket)
    return _outlet(writer)


def _outlet(writer: Any) -> Outlet:
    transport, masks, random_bits = writer.transport, writer.use_mask, writer.get_random_bits
    write, is_closing = transport.write, transport.is_closing
    first = size = -1
    head = b""  # of the last message; the next is most likely as long

    def put(message: str | bytes) -> None:
        nonlocal first, size, head
        if writer._closing or is_closing():
            raise ClientConnectionResetError("Cannot write to closing transport")
        if type(message) is str:
            data, kind = message.encode(), _TEXT
        else:
            data, kind = message, _BINARY  # type: ignore[assignment]
        if len(data) != size or kind != first:
            first, size = kind, len(data)
            head = _head(kind, size, masks)
        writer._output_size += size  # by which a send of aiohttp's knows that it must wait
        if masks:
            mask, body = random_bits().to_bytes(4, "big"), bytearray(data)
            websocket_mask(mask, body)
            write(b"".join((head, mask, body)))
        else:
            write(head + data)

    return put


def _head(first: int, size: int, masked: bool) -> bytes:
    """A frame's first bytes, RFC 6455 section 5.2."""
    bit = 0x80 if masked else 0
    if size < 126:
        return bytes((first, bit | size))
    if size < 2**16:
        return bytes((first, bit | 126)) + size.to_bytes(2, "big")
    return bytes((first, bit | 127)) + size.to_bytes(8, "big")


def _send(socket: web.WebSocketResponse | ClientWebSocketResponse, message: str | bytes) -> None:
    """By aiohttp's own coroutine, which writes first and then waits for the transport to drain; that is not waited for here."""
    sending = socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message)
    try:
        sending.send(None)
    except StopIteration:
        return
    sending.close()


def _outlets_work() -> bool:
    """Whether the installed aiohttp's writer writes what an outlet does, to the bit."""
    messages: list[str | bytes] = ["text", "ä" * 100, b"", bytes(126), bytes(2**16)]
    try:
        for masks in (False, True):
            theirs, ours = bytearray(), bytearray()
            for wire in (theirs, ours):
                transport: Any = SimpleNamespace(write=wire.extend, is_closing=lambda: False)
                writer = WebSocketWriter(SimpleNamespace(_paused=False), transport, use_mask=masks, limit=2**20)  # type: ignore[arg-type]
                bits = iter(range(10**9, 2 * 10**9, 10**8))
                writer.get_random_bits = partial(next, bits)
                put = _outlet(writer)
                for message in messages:
                    if wire is ours:
                        put(message)
                        continue
                    text = isinstance(message, str)
                    data = message.encode() if isinstance(message, str) else message
                    with suppress(StopIteration):
                        writer.send_frame(data, WSMsgType.TEXT if text else WSMsgType.BINARY).send(None)
                written = writer._output_size
            if ours != theirs or written < sum(map(len, messages)) or writer._closing:
                return False
    except Exception:
        return False
    return True


OUTLETS_WORK = _outlets_work()


class Heartbeat:
    """Mixed into one of aiohttp's sockets: what arrives puts the next ping off, without a turn of the loop for every chunk."""

    _heartbeat: float | None
    _heartbeat_when: float
    _pong_response_cb: asyncio.TimerHandle | None
    _closed: bool
    _loop: Any

    def _on_data_received(self) -> None:
        if self._pong_response_cb is None and self._heartbeat is not None:
            self._heartbeat_when = self._loop.time() + self._heartbeat  # its timer, once it rings, looks at that
        elif not self._closed:  # or it would arm a timer for the answer to our close frame, and keep a dead socket for 30 s
            super()._on_data_received()  # type: ignore[misc]


class CarrierSocket(Heartbeat, web.WebSocketResponse):
    """A server's socket."""


HEARTBEAT_WORKS = _heartbeat_works()
if not HEARTBEAT_WORKS:
    del Heartbeat._on_data_received
