"""Further services that hear a stream. Each has its own queue, link and patience, and none of them can touch the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from gateway.bus import Channel, Subscription
from gateway.events import Audio, Command, Event, Fault, Flow, Start
from gateway.media import MediaFormat, Track
from gateway.services import Line, Link, ServiceLost
from gateway.services.dialler import Dialler
from gateway.services.retry import Limiter
from gateway.settings import RecorderService, Service, WebsocketService

FAULTS_PER_SEC = 20.0
"""Refusals that a listener is told each second."""


class Overheard(Subscription):
    """What a listener is told: everything but what is between the gateway and the service that speaks."""

    def __init__(self, media_format: MediaFormat | None, *, capacity_ms: int, track: Track, everything: bool) -> None:
        super().__init__(media_format, capacity_ms=capacity_ms, track=track)
        self._everything = everything

    def offer(self, event: Event) -> None:
        if self._everything or not isinstance(event, (Flow, Fault)):
            super().offer(event)

    def tell(self, fault: Fault) -> None:
        """Tell this listener alone."""
        super().offer(fault)


class ListenerLine:
    """The line as a listener has it: it hears, and whatever it asks for is refused."""

    def __init__(self, line: Line, name: str, subscription: Overheard, dialler: Dialler) -> None:
        self.session_id: str = line.session_id
        self.provider: str = line.provider
        self.kind: str = line.kind
        self.start: Start = line.start
        self.subscription: Subscription = subscription
        self.dialler: Dialler = dialler
        self.log: FilteringBoundLogger = line.log.bind(listener=name)
        self._line = line
        self._overheard = subscription
        self._limiter = Limiter(FAULTS_PER_SEC, FAULTS_PER_SEC)
        self._refused_audio = False
        self.refusals = 0

    def perform(self, command: Command) -> None:
        """Refuse it; audio is refused once, the rest each time, unless that is more than anybody reads."""
        self.refusals += 1
        audio = isinstance(command, Audio)
        if audio and self._refused_audio:
            return
        self._refused_audio |= audio
        if self._limiter.take(asyncio.get_running_loop().time()):
            ref = None if isinstance(command, Audio) else command.ref
            self.fault("not_speaker", "this connection only listens; another service speaks on the call", ref)

    def pending(self) -> tuple[int, tuple[str, ...]]:
        return 0, ()

    def fault(self, code: str, message: str, ref: str | int | None) -> None:
        self._overheard.tell(Fault(code, message, ref))

    def report(self, code: str, message: str) -> None:
        self._line.report(code, message)


class Listeners:
    """The listeners of one stream. `add` each, once the stream has started; `finish` when it is over."""

    def __init__(self, line: Line, channel: Channel, dialler: Dialler, *, capacity_ms: int) -> None:
        self._line = line
        self._channel = channel
        self._dialler = dialler
        self._capacity_ms = capacity_ms
        self._links: dict[asyncio.Task[None], Link] = {}

    def add(self, tasks: asyncio.TaskGroup, name: str, service: Service, link: Callable[[Line], Link]) -> None:
        """Have it listen from now on, with what `link` makes."""
        overheard = Overheard(
            self._line.start.media_format,
            capacity_ms=self._capacity_ms,
            track=service.track if isinstance(service, WebsocketService) else Track.INBOUND,
            everything=isinstance(service, RecorderService),
        )
        line = ListenerLine(self._line, name, overheard, self._dialler)
        self._channel.subscribe(overheard)
        made = link(line)
        self._links[tasks.create_task(self._attend(line, overheard, made))] = made

    async def finish(self, timeout_secs: float) -> None:
        """They have been told the end: let them take it, but not for ever."""
        for task, link in self._links.items():
            if not task.done() and link.figures().state == "dialling":
                task.cancel()  # it has heard nothing, and won't
        if self._links:
            _, late = await asyncio.wait(self._links, timeout=timeout_secs)
            for task in late:
                task.cancel()

    async def _attend(self, line: ListenerLine, overheard: Overheard, link: Link) -> None:
        try:
            await link.run()
        except ServiceLost as lost:
            line.log.warning("listener_lost", error=str(lost))
        except Exception:  # whatever it is, it is not the call's
            line.log.exception("listener_failed")
        finally:
            self._channel.unsubscribe(overheard)
            if line.refusals:
                line.log.info("listener_refused", commands=line.refusals)
