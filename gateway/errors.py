"""The tree of errors. An error says whose fault it is, in a sentence with the offending value.

GatewayError
├── ConfigError            start-up only: file:line:column and what to write instead
├── RemoteError            a peer broke its protocol: count it, answer as the protocol says
│   ├── MalformedFrame     skip the frame, keep the call
│   └── SignatureMismatch  403, nothing else said
└── LocalError             we were asked for the impossible: a Fault to the service, the call goes on
    ├── NotStarted
    └── UnsupportedCommand
"""

from __future__ import annotations

from collections.abc import Callable


def untrace(error: BaseException | None) -> None:
    """Drop where an error was raised, and what it was raised because of, once all has been said about it.

    Tracebacks hold frames, and frames the error: a cycle, with all that the frames were about, until garbage is collected.
    """
    while error is not None:
        cause, error.__traceback__, error.__cause__, error.__context__ = error.__context__, None, None, None
        error = cause


class GatewayError(Exception):
    """Root of everything this project raises on purpose."""


class ConfigError(GatewayError):
    """The configuration can't be used. `str(error)` is ready to print: one line per finding, `file:line:column: key: …`."""


class RemoteError(GatewayError):
    """A peer broke its protocol."""


class MalformedFrame(RemoteError):
    """A frame that can't be read. `reason` is one short constant word: a metric label, a log key."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class SignatureMismatch(RemoteError):
    """The request was not signed with the account's secret. `tried` are the URL forms it was checked against, fit for a log."""

    def __init__(self, why: str, tried: Callable[[], tuple[str, ...]] = tuple) -> None:
        """`tried` is asked only when somebody wants to know: refusals are many and log lines few."""
        super().__init__(why)
        self._tried = tried

    @property
    def tried(self) -> tuple[str, ...]:
        return self._tried()


class LocalError(GatewayError):
    """We were asked for something that can't be done. `code` goes into the Fault that the service gets."""

    code = "local_error"


class NotStarted(LocalError):
    """The stream has not started, so the carrier's stream id is unknown and nothing can be sent."""

    code = "not_started"


class UnsupportedCommand(LocalError):
    """This stream's wire can't express the command, or not with these values."""

    code = "unsupported_command"
