"""WebSockets without a queue and a task's turn for each message. What leans on aiohttp's internals is here, and nowhere else.

aiohttp puts each message into a queue and wakes the task that waits in `receive`. Here messages go to a handler instead, from
within the loop's reading, while that task waits and nothing is queued before them. All else comes out of `receive` as ever:
control frames, the end, what the handler does not take, and of a burst all but the first few, so that no peer holds up the loop,
and aiohttp stops reading one that floods. Where aiohttp is not as expected, everything comes out of `receive`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiohttp import ClientWebSocketResponse, WSMessage, WSMsgType, client, web, web_ws
from aiohttp.http import WebSocketReader

from gateway.errors import untrace

IN_A_ROW = 8
"""Messages of one peer that are handled in one lap of the event loop."""

Handler = Callable[[Any], bool]
"""Is given a message, text or bytes. Returns whether it has taken it."""

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


def send(sending: Coroutine[Any, Any, None]) -> None:
    """Have a message written at once. Raises ConnectionError.

    aiohttp writes first and then waits for the transport to drain if it is full; that is not waited for here.
    """
    try:
        sending.send(None)
    except StopIteration:
        return
    sending.close()


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
