"""Links to internal services, one module per kind. A link takes one stream's events and gives back its service's commands."""

from __future__ import annotations

from typing import Protocol

import aiohttp
from structlog.typing import FilteringBoundLogger

from gateway.bus import Subscription
from gateway.errors import RemoteError
from gateway.events import Command, Start


class ServiceLost(RemoteError):
    """The service can't be reached, or went away in mid-call. The text says what to look at."""


class Line(Protocol):
    """What a link sees of the stream it serves."""

    session_id: str
    provider: str
    kind: str
    start: Start
    subscription: Subscription
    http: aiohttp.ClientSession
    log: FilteringBoundLogger

    def perform(self, command: Command) -> None:
        """Carry out a command; refusals come back as `Fault` events."""
        ...

    def fault(self, code: str, message: str, ref: str | int | None) -> None:
        """Have the service told that its message was refused."""
        ...


class Link(Protocol):
    """One stream's connection to one service."""

    forwarded_bytes: int
    """Caller audio that reached the service, in bytes of the carrier's format."""

    async def run(self) -> None:
        """Serve until the stream's `Stop` was delivered, or the service said it is done. Raises ServiceLost."""
        ...
