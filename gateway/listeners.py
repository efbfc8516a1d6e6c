"""Further services that hear a stream. Each has its own queue, link and patience, and none of them can touch the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from structlog.typing import FilteringBoundLogger

from gateway.bus import Channel, Subscription
from gateway.events import Audio, Command, Event, Fault, Flow, Start, Stop
from gateway.media import MediaFormat, Track
from gateway.services import Line, Link, ServiceLost
from gateway.services.dialler import Dialler
from gateway.services.retry import Limiter
from gateway.settings import RecorderService, Service, WebsocketService

FAULTS_PER_SEC = 20.0
"""Refusals that a listener is told each second."""

MOST_LISTENERS = 16
"""Of one stream, those of its route and those that operators attach."""


@dataclass(frozen=True, slots=True)
class ListenerFigures:
    """How one listener fares."""

    name: str
    """Its service's."""
    track: str
    """`inbound`, `outbound` or `both`."""
    state: Literal["dialling", "serving", "away", "lost", "done"]
    """`lost`: it was given up; `done`: it has taken the end, or was taken off the call."""
    lag_ms: float
    """Audio that waits for it."""
    dropped_ms: float
    """Audio of its track that it did not get and will not get."""


class Overheard(Subscription):
    """What a listener is told: everything but what is between the gateway and the service that speaks."""

    def __init__(self, media_format: MediaFormat | None, *, capacity_ms: int, track: Track, everything: bool) -> None:
        super().__init__(media_format, capacity_ms=capacity_ms, track=track)
        self._everything = everything

    def offer(self, event: Event) -> None:
        if self._everything or not isinstance(event, (Flow, Fault)):
            super().offer(event)

    def tell(self, event: Event) -> None:
        """Tell this listener alone."""
        super().offer(event)


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


@dataclass(eq=False, slots=True)
class _Hearer:
    name: str
    overheard: Overheard
    link: Link
    task: asyncio.Task[None] | None = None
    state: Literal["lost", "done"] | None = None
    """None while it listens."""
    dropped_before: int = 0
    """Bytes, by its predecessors of the same name."""


class Listeners:
    """The listeners of one stream. `add` each, once the stream has started; `finish` when it is over."""

    def __init__(self, line: Line, channel: Channel, dialler: Dialler, *, capacity_ms: int) -> None:
        self._line = line
        self._channel = channel
        self._dialler = dialler
        self._capacity_ms = capacity_ms
        self._hearers: dict[str, _Hearer] = {}

    def refuses(self, name: str) -> str | None:
        """Why no service of this name can be added now, as a sentence; None: it can."""
        if self._listening(name) is not None:
            return f"{name} listens already"
        if sum(hearer.state is None for hearer in self._hearers.values()) >= MOST_LISTENERS:
            return f"{MOST_LISTENERS} services listen already"
        return None

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
        made, earlier = link(line), self._hearers.get(name)
        hearer = self._hearers[name] = _Hearer(name, overheard, made)
        if earlier is not None:
            hearer.dropped_before = earlier.dropped_before + self._dropped(earlier)
        hearer.task = tasks.create_task(self._attend(line, hearer))

    async def remove(self, name: str, stop: Stop, timeout_secs: float) -> bool:
        """Take it off the call, which goes on: it is told `stop` and may take what it was told before. False: it isn't there."""
        hearer = self._listening(name)
        if hearer is None:
            return False
        self._channel.unsubscribe(hearer.overheard)
        hearer.overheard.tell(stop)
        await self._finish([hearer], timeout_secs)
        return True

    async def finish(self, timeout_secs: float) -> tuple[list[ListenerFigures], list[ListenerFigures]]:
        """They have been told the end: let them take it, but not for ever. Returns how they fared before and after that."""
        before = self.figures()
        await self._finish([*self._hearers.values()], timeout_secs)
        return before, self.figures()

    def figures(self) -> list[ListenerFigures]:
        """How they fare, those that have gone included; one for each name."""
        return [self._measure(hearer) for hearer in self._hearers.values()]

    def _listening(self, name: str) -> _Hearer | None:
        hearer = self._hearers.get(name)
        return hearer if hearer is not None and hearer.state is None else None

    def _measure(self, hearer: _Hearer) -> ListenerFigures:
        media_format, fared, overheard = self._line.start.media_format, hearer.link.figures(), hearer.overheard
        lag_ms = dropped_ms = 0.0
        if media_format is not None:
            if hearer.state is None:
                lag_ms = fared.lag_ms + media_format.duration_ms(overheard.audio_bytes)
            dropped_ms = media_format.duration_ms(hearer.dropped_before + self._dropped(hearer))
        track = "both" if overheard.both else str(overheard.track)
        return ListenerFigures(hearer.name, track, hearer.state or fared.state, lag_ms, dropped_ms)

    def _dropped(self, hearer: _Hearer) -> int:
        """Bytes that have come its way and neither reached it nor wait for it."""
        offered, link = hearer.overheard.offered_bytes, hearer.link
        held = hearer.overheard.audio_bytes + link.figures().unsent_bytes if hearer.state is None else 0
        return max(0, offered - link.forwarded_bytes - held)

    async def _finish(self, hearers: list[_Hearer], timeout_secs: float) -> None:
        tasks = [hearer.task for hearer in hearers if hearer.task is not None]
        for hearer in hearers:
            if hearer.task is not None and not hearer.task.done() and hearer.link.figures().state == "dialling":
                hearer.task.cancel()  # it has heard nothing, and won't
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_secs)
            for task in late:
                task.cancel()
        for hearer in hearers:
            hearer.state = hearer.state or "done"

    async def _attend(self, line: ListenerLine, hearer: _Hearer) -> None:
        state: Literal["lost", "done"] = "lost"
        try:
            await hearer.link.run()
            state = "done"
        except ServiceLost as lost:
            line.log.warning("listener_lost", error=str(lost))
        except Exception:  # whatever it is, it is not the call's
            line.log.exception("listener_failed")
        finally:
            self._channel.unsubscribe(hearer.overheard)
            hearer.state = state
            if line.refusals:
                line.log.info("listener_refused", commands=line.refusals)
