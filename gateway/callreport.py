"""How a simulated call went: the report, and the sentences for what went wrong."""

from __future__ import annotations

from typing import Literal

import aiohttp
import msgspec
from msgspec import Struct, field
from yarl import URL

from gateway.alignment import Echo
from gateway.ear import Cut, Mark


class Refusal(Struct):
    """Something the gateway sent that a real carrier would not have taken, and how often."""

    reason: str
    message: str
    count: int = 1


class Recording(Struct, frozen=True):
    """Mono PCM16 of what the caller heard and said. Each begins with its first sample; `heard_from_ms` after `said` begins."""

    sample_rate: int
    heard: bytes = b""
    said: bytes = b""
    heard_from_ms: float = 0.0


class StreamReport(Struct, kw_only=True):
    """One stream of a call; times since the call began. `gap_ms`: from the end of the last stream there was to this one's start.

    `attached_ms` is None where it never came to be. `problem` is what went wrong with it, empty where nothing did.
    """

    stream_id: str
    attached_ms: int | None = None
    ended_ms: int | None = None
    gap_ms: int | None = None
    frames_out: int = 0
    frames_in: int = 0
    ended_by: Literal["caller", "gateway", "nobody"] = "nobody"
    close_code: int | None = None
    problem: str = ""


class CallReport(Struct, kw_only=True):
    """How one simulated call went, as the carrier and the caller saw it. `frames_out` went to the gateway, `frames_in` came back.

    `streams` has each stream of the call: when one ends a carrier asks what comes next, and that may be another. So much of the
    caller's audio as `lost_in_gaps_ms` found no stream. `ended_with` is the XML that ended the call, None where the caller hung
    up or nobody was asked; `stream_id` and `close_code` are the first stream's and the last's.
    `checkpoints` hold the truth about each checkpoint and whether the carrier echoed it; `clears` what each clear cut;
    `errors` are what went wrong, `remarks` what may well be meant so. `latency_*` are None unless the caller heard an echo.
    """

    kind: str
    url: str
    call_id: str
    stream_id: str
    connected: bool = False
    streams: list[StreamReport] = field(default_factory=list)
    lost_in_gaps_ms: int = 0
    ended_with: str | None = None
    duration_ms: int = 0
    frames_out: int = 0
    frames_in: int = 0
    audio_sent_ms: int = 0
    heard_ms: int = 0
    underruns: int = 0
    underrun_ms: float = 0.0
    max_buffered_ms: float = 0.0
    first_heard_ms: int | None = None
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    echo: Echo | None = None
    checkpoints: list[Mark] = field(default_factory=list)
    clears: list[Cut] = field(default_factory=list)
    dtmf_sent: str = ""
    dtmf_heard: str = ""
    said: list[str] = field(default_factory=list)
    spoken: str = ""
    media_played: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    ended_by: Literal["caller", "gateway", "nobody"] = "nobody"
    close_code: int | None = None
    errors: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    recording: Recording | None = None

    @property
    def gaps_ms(self) -> list[int]:
        """For each time the call was attached again: how long it had no stream."""
        return [stream.gap_ms for stream in self.streams if stream.gap_ms is not None]

    @property
    def ok(self) -> bool:
        """The call connected, ended in an orderly way, and nothing went wrong or would have been refused."""
        return self.connected and not self.errors and not self.refusals

    def to_json(self) -> bytes:
        """The report on one line, without the recording."""
        fields = {name: value for name, value in msgspec.structs.asdict(self).items() if name != "recording"}
        return msgspec.json.encode(fields | {"ok": self.ok})


def origin(url: str) -> str:
    """Scheme, host and port: paths hold tokens."""
    try:
        return str(URL(url).origin())
    except ValueError:
        return repr(url)


def explain(error: Exception, url: str, timeout_secs: float) -> str:
    place = origin(url)
    match error:
        case TimeoutError():
            return (
                f"{place} did not answer within {timeout_secs:g} s. Is the gateway running there, and not blocked by a firewall?"
            )
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
            return f"{place} has no certificate that a carrier would trust: {error}"
        case aiohttp.ClientConnectorDNSError():
            return f"{place}: this host name is unknown. Correct the URL."
        case aiohttp.ClientConnectorError(os_error=ConnectionRefusedError()):
            return f"{place} refused the connection: nothing listens there. Start the gateway, or correct the URL."
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError() | ValueError():
            return f"{url!r} is no URL to call: write http(s)://host:port/provider/answer or ws(s)://host:port/provider/stream."
        case _:
            return f"{place}: {error or type(error).__name__}"


def explain_status(status: int, url: str, what: Literal["webhook", "stream"]) -> str:
    place = origin(url)
    if status in (401, 403):
        if what == "webhook":
            return (
                f"{place} answered the webhook with HTTP {status}: the request is not signed with the account's secret. "
                "Sign it with --config FILE --provider NAME, or simulate against a provider with `auth: none`."
            )
        return (
            f"{place} refused the stream with HTTP {status}: its URL holds no token that is still good, or it is not signed. "
            "Call the answer URL (http://…/provider/answer), which names a fresh stream URL, with --config FILE --provider NAME."
        )
    if status == 404:
        return f"{place} answered HTTP 404: no such path. The first part of it must be a provider's name in the configuration."
    if status == 503:
        return f"{place} answered HTTP 503: the gateway is draining or full."
    if what == "stream":
        return f"{place} answered the stream's handshake with HTTP {status} in place of 101; a real carrier drops the stream."
    return f"{place} answered the webhook with HTTP {status}; a real carrier would end the call."


def explain_close(code: int | None) -> str:
    """What a close of the gateway's means for the caller; empty where that is proper, or no close at all."""
    match code:
        case 1000 | 1006 | None:
            return ""
        case 1001:
            return "The gateway ended the call because it is stopping (1001)."
        case 1008:
            return "The gateway turned the stream away (1008): too many bad frames, no start, or one that its token does not fit."
        case 1009:
            return "A frame was larger than the gateway takes (1009)."
        case 1011:
            return (
                "The gateway ended the call (1011): it has no service for it any more. Is the service up? See the gateway's log."
            )
        case _:
            return f"The gateway closed the stream with code {code}."
