"""Traces by OpenTelemetry, an extra: one span per stream, whose name the services that it dials are given."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextvars import ContextVar
from typing import TYPE_CHECKING

from gateway import __version__
from gateway.errors import ConfigError
from gateway.settings import Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

INSTALL = 'pip install "telephony-audio-gateway[tracing]"'
EXPORT_SECS = 3
"""How long one delivery may take, the last one when the process ends included. What waits is bounded; the rest is dropped."""

Value = str | int | float

CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)
"""The trace of the stream whose task this is."""


class Trace:
    """One stream's span. Nothing in it tells who calls whom, or what is said."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._seen: set[str] = set()
        self._connections: Counter[str] = Counter()
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        """The header that says whose work it is (W3C Trace Context)."""

    def event(self, name: str, **attributes: Value | None) -> None:
        """Something happened now. Attributes that are None are left out; past 128 events, the oldest are."""
        self._span.add_event(name, {key: value for key, value in attributes.items() if value is not None})

    def first(self, name: str) -> None:
        """The same, of things that happen often: the first time counts."""
        if name not in self._seen:
            self._seen.add(name)
            self.event(name)

    def connected(self, service: str) -> None:
        """A service was dialled, and answered."""
        self._connections[service] += 1
        self.event("service_connected" if self._connections[service] == 1 else "service_reconnected", service=service)

    def end(self, *, failed: bool = False, **attributes: Value | None) -> None:
        """The stream is over."""
        from opentelemetry.trace import StatusCode  # noqa: PLC0415 - an extra

        for key, value in attributes.items():
            if value is not None:
                self._span.set_attribute(f"telephony.{key}", value)
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Tracer:
    """One process's spans. `exporter` takes them, in a thread of its own. `close` it at the end."""

    def __init__(self, exporter: SpanExporter) -> None:
        """Raises ImportError where the extra is not installed."""
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        name = os.environ.get("OTEL_SERVICE_NAME") or "telephony-audio-gateway"
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": __version__}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("gateway", __version__)

    def stream(self, *, provider: str, kind: str, session: str) -> Trace:
        """A stream begins. The gateway's log has the same `session`."""
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - an extra

        attributes = {"telephony.provider": provider, "telephony.kind": kind, "telephony.session": session}
        return Trace(self._tracer.start_span("stream", kind=SpanKind.SERVER, attributes=attributes))

    async def close(self) -> None:
        """Deliver what waits, if that can be done quickly."""
        await asyncio.to_thread(self._provider.shutdown)


def open_tracer(tracing: Tracing | None) -> Tracer | None:
    """A tracer that sends to the configured endpoint; None where none is. Raises ConfigError where the extra is not installed."""
    if tracing is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra

        return Tracer(OTLPSpanExporter(endpoint=tracing.endpoint, timeout=EXPORT_SECS))
    except ImportError as error:
        raise ConfigError(f"tracing: needs an extra that is not installed ({error.name}); {INSTALL}") from None
