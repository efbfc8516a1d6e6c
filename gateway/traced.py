"""A stream that is traced. What is not traced is a plain `Stream`, which knows nothing of this."""

from __future__ import annotations

from typing import Any

from gateway.events import Audio, BargeIn, Clear, Command, Event, Start, Stop, StopReason
from gateway.stream import House, Stream
from gateway.tracing import CURRENT, Tracer

FAILURES = frozenset({StopReason.SERVICE_LOST, StopReason.PROTOCOL_ERROR, StopReason.TIMEOUT})


class TracedStream(Stream):
    """Tells a trace of its start, the first audio each way, each time the caller cuts in, and its stop."""

    def __init__(self, tracer: Tracer, house: House, provider_name: str, *rest: Any) -> None:
        super().__init__(house, provider_name, *rest)
        self._trace = tracer.stream(provider=provider_name, kind=self.kind, session=self.session_id)

    async def run(self) -> None:
        token = CURRENT.set(self._trace)  # tasks of the stream inherit it
        try:
            await super().run()
        finally:
            CURRENT.reset(token)
            figures = self.figures()
            self._trace.end(
                failed=figures.reason in FAILURES,
                route=self.route,
                service=figures.link.service if figures.link is not None else None,
                result=figures.reason,
            )

    def _emit(self, event: Event) -> None:
        match event:
            case Audio():
                self._trace.first("first_audio_up")
            case Start():
                self._trace.event("start", media_format=str(event.media_format))
            case Clear():
                self._trace.event("barge_in", played_ms=event.played_ms, cleared_ms=event.cleared_ms)
            case BargeIn():
                self._trace.event("barge_in", after_ms=event.after_ms)
            case Stop():
                self._trace.event("stop", reason=event.reason)
            case _:
                pass
        super()._emit(event)

    def perform(self, command: Command) -> None:
        if type(command) is Audio:
            self._trace.first("first_audio_down")
        super().perform(command)
