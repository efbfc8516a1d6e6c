"""A service behind a WebSocket that we dial, one connection per stream. Audio is converted here, and only here."""

from __future__ import annotations

import asyncio

import aiohttp

from gateway.audio import Converter, Reframer
from gateway.errors import MalformedFrame
from gateway.events import Account, After, Audio, Checkpoint, Clear, Command, Event, Gap, GapReason, Stop
from gateway.services import Line, ServiceLost
from gateway.services.native import SUBPROTOCOL_RAW, Malformed, NativeCarrier
from gateway.settings import WebsocketService

LARGEST_MESSAGE = 16 * 2**20
"""Bytes of one message from a service: more than two minutes of 24 kHz PCM in one go."""

LARGEST_FILL_MS = 10_000
"""A hole in the caller's audio is filled with silence up to this."""

HEARTBEAT_SECS = 20.0

CLOSE_SECS = 2.0
"""A service that does not answer our close frame in this time is left."""


class WebsocketLink:
    """One stream's connection to one service in raw mode: text messages are control, binary messages bare samples."""

    def __init__(self, service: WebsocketService, line: Line) -> None:
        self._service = service
        self._line = line
        self._carrier_format = carrier_format = line.start.media_format
        self._upward = Converter(carrier_format or service.media_format, service.media_format)
        self._downward = Converter(service.media_format, carrier_format or service.media_format)
        self._reframer = Reframer(service.media_format.bytes_for(service.frame_ms))
        self._protocol = NativeCarrier(
            session=line.session_id,
            provider=line.provider,
            kind=line.kind,
            role="speaker",
            track=service.track,
            media_format=None if carrier_format is None else service.media_format,
            frame_ms=service.frame_ms,
        )
        self._stopped = False
        self.forwarded_bytes = 0

    async def run(self) -> None:
        """See `Link.run`. Events wait in the subscription until the service has accepted."""
        socket = await self._connect()
        try:
            async with asyncio.TaskGroup() as tasks:
                up = tasks.create_task(self._up(socket))
                await self._down(socket)
                up.cancel()
        except* ServiceLost as lost:
            raise lost.exceptions[0] from None
        finally:
            await socket.close()

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        service = self._service
        headers = {"Authorization": f"Bearer {service.authorization}"} if service.authorization else {}
        try:
            async with asyncio.timeout(service.connect_timeout_secs):
                return await self._line.http.ws_connect(
                    service.url,
                    protocols=(SUBPROTOCOL_RAW,),
                    headers=headers,
                    compress=0,
                    max_msg_size=LARGEST_MESSAGE,
                    heartbeat=HEARTBEAT_SECS,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECS),
                )
        except TimeoutError:
            raise ServiceLost(f"no connection to {service.url} within {service.connect_timeout_secs} s") from None
        except aiohttp.WSServerHandshakeError as error:
            raise ServiceLost(f"{service.url} refused the WebSocket handshake with HTTP {error.status}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServiceLost(f"can't connect to {service.url}: {error}") from None

    # --- caller to service ---

    async def _up(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            while not self._stopped:
                for event in await self._line.subscription.take():
                    if type(event) is Audio:
                        await self._send_audio(socket, self._upward.convert(event.payload))
                        self.forwarded_bytes += len(event.payload)
                    else:
                        await self._tell(socket, event)
            await socket.close()
        except (ConnectionError, aiohttp.ClientError) as error:
            raise ServiceLost(f"{self._service.url} went away: {error}") from None

    async def _send_audio(self, socket: aiohttp.ClientWebSocketResponse, samples: bytes) -> None:
        for frame in self._reframer.push(samples):
            await socket.send_bytes(frame)

    async def _tell(self, socket: aiohttp.ClientWebSocketResponse, event: Event) -> None:
        if isinstance(event, Stop):
            self._stopped = True
            await self._send_audio(socket, self._upward.flush())
            if rest := self._reframer.flush():
                await socket.send_bytes(rest)
            event = self._accounted(event)
        for message in self._protocol.encode(event):
            await socket.send_str(str(message))
        if isinstance(event, Gap) and event.reason is GapReason.CARRIER and self._carrier_format is not None:
            silence = self._carrier_format.silence(min(event.lost_ms, LARGEST_FILL_MS))
            await self._send_audio(socket, self._upward.convert(silence))

    def _accounted(self, stop: Stop) -> Stop:
        """The stream's account, completed by what only this link knows."""
        if stop.account is None or self._carrier_format is None:
            return stop
        received = round(self._carrier_format.duration_ms(self._line.subscription.offered_bytes))
        forwarded = round(self._carrier_format.duration_ms(self.forwarded_bytes))
        playout = stop.account
        return Stop(
            stop.reason,
            account=Account(
                received=received,
                forwarded=forwarded,
                dropped=received - forwarded,
                queued=playout.queued,
                played=playout.played,
                cleared=playout.cleared,
                lost=playout.lost,
            ),
        )

    # --- service to caller ---

    async def _down(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                if payload := self._downward.convert(message.data):
                    self._line.perform(Audio(payload))
            elif message.type is aiohttp.WSMsgType.TEXT:
                self._obey(message.data)
        if self._stopped:
            return
        if socket.close_code == aiohttp.WSCloseCode.OK:
            # A service that closes without a word is done: the same as `stop`.
            self._line.perform(Stop())
            return
        raise ServiceLost(f"{self._service.url} closed the connection in mid-call (code {socket.close_code})")

    def _obey(self, frame: str) -> None:
        try:
            commands = list(self._protocol.decode(frame))
        except MalformedFrame as error:
            ref = error.ref if isinstance(error, Malformed) else None
            self._line.fault(error.reason, str(error), ref)
            return
        for command in commands:
            self._settle(command)
            self._line.perform(command)

    def _settle(self, command: Command) -> None:
        """The converter's tail belongs to what was said before a checkpoint or the end; a clear throws it away."""
        match command:
            case Checkpoint() | Stop(after=After.PLAYED):
                if tail := self._downward.flush():
                    self._line.perform(Audio(tail))
            case Clear():
                self._downward.reset()
            case _:
                pass
