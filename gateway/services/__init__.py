"""Links to internal services, one module per kind. A link takes one stream's events and gives back its service's commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from structlog.typing import FilteringBoundLogger

from gateway.buckets import Buckets
from gateway.bus import Subscription
from gateway.errors import RemoteError
from gateway.events import Command, Start
from gateway.services.dialler import Dialler


class ServiceLost(RemoteError):
    """The service can't be reached, or went away in mid-call and did not come back. The text says what to look at.

    `begun`: it had taken the call, and what it knows of it is gone.
    """

    def __init__(self, text: str, *, begun: bool = False) -> None:
        super().__init__(text)
        self.begun = begun


class Line(Protocol):
    """What a link sees of the stream it serves."""

    session_id: str
    provider: str
    kind: str
    start: Start
    subscription: Subscription
    dialler: Dialler
    log: FilteringBoundLogger

    def perform(self, command: Command) -> None:
        """Carry out a command; refusals come back as `Fault` events."""
        ...

    def pending(self) -> tuple[int, tuple[str, ...]]:
        """Milliseconds of audio that the caller has yet to hear, and the names of the checkpoints not yet resolved."""
        ...

    def fault(self, code: str, message: str, ref: str | int | None) -> None:
        """Have the service told that its message was refused."""
        ...

    def report(self, code: str, message: str) -> None:
        """Have everybody who follows the stream told that something of the gateway's own has failed."""
        ...


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """How a link fares. `service` has the call, or is tried for it."""

    service: str
    state: Literal["dialling", "serving", "away"]
    took_at: float | None = None
    """The event loop's time when a service first took the call."""
    unsent_bytes: int = 0
    """Caller audio, in bytes of the carrier's format, that was taken and has never been sent."""
    lag_ms: float = 0.0
    """Caller audio that the service is behind."""
    losses: Mapping[str, int] = field(default_factory=dict)
    """How often each service went away in mid-call."""
    outages: Mapping[str, Buckets] = field(default_factory=dict)
    """How long each service was away, in seconds, when it came back."""


class Link(Protocol):
    """One stream's connection to one service."""

    @property
    def forwarded_bytes(self) -> int:
        """Caller audio that reached the service, in bytes of the carrier's format."""
        ...

    @property
    def held_bytes(self) -> int:
        """Caller audio that was taken from the subscription and has not left yet, likewise; quickly answered."""
        ...

    @property
    def unknown(self) -> bool:
        """No service knows of the call: one is still being dialled, and need not be told of the end."""
        ...

    def figures(self) -> LinkFigures:
        """How it fares, for the operator."""
        ...

    async def run(self) -> None:
        """Serve until the stream's `Stop` was delivered, or the service said it is done. Raises ServiceLost."""
        ...
