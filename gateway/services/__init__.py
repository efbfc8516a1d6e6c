"""Links to internal services, one module per kind. A link takes one stream's events and gives back its service's commands."""

from __future__ import annotations

from typing import Protocol

from structlog.typing import FilteringBoundLogger

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


class Link(Protocol):
    """One stream's connection to one service."""

    @property
    def forwarded_bytes(self) -> int:
        """Caller audio that reached the service, in bytes of the carrier's format."""
        ...

    async def run(self) -> None:
        """Serve until the stream's `Stop` was delivered, or the service said it is done. Raises ServiceLost."""
        ...
