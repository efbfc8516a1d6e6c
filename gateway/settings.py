"""What an operator can set, as frozen structs with defaults. Nothing here reads a file: `gateway.config` does.

A field's `Meta(extra={"check": f})` names a function that raises ValueError("what is wrong; what to write"), which
`gateway.config` applies at the field's own place in the file; `extra={"file": True}` says that the file must be readable.
`extra_json_schema` says the same, more roughly, to an editor.
"""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct, structs

from gateway.media import Encoding, MediaFormat, Track

MASKED = "***"
_NAME_FIELDS = ("date", "time", "provider", "call_id", "session")


def host_port(address: str) -> tuple[str, int]:
    """`127.0.0.1:8080`, `localhost:0`, `[::1]:8080` → host without brackets, port. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError('not host:port; write for instance "127.0.0.1:8080" (port 0 picks a free one)')
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError('an IPv6 address needs brackets; write for instance "[::1]:8080"')
    if not host or not host.isprintable() or any(char in " /@[]" for char in host):
        raise ValueError('no host before the port; write for instance "127.0.0.1:8080"')
    return host, int(port)


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1 and localhost. A name that would have to be resolved is not."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _url(text: str, *schemes: str) -> None:
    """Raises ValueError unless `text` is an absolute URL of one of `schemes`, without credentials or fragment."""
    example = f"{schemes[-1]}://voice.example.com"
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"a URL is printable ASCII without spaces; write for instance {example}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"not a URL ({error}); write for instance {example}") from None
    if parts.scheme not in schemes:
        raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}; write for instance {example}")
    if not host:
        raise ValueError(f"names no host; write for instance {example}")
    if "@" in parts.netloc:
        raise ValueError("a URL with credentials ends up in logs; write it without `user:password@`")
    if "#" in text:
        raise ValueError("has a fragment; write it without `#…`")


def _public_url(text: str) -> None:
    _url(text, "http", "https")
    if "?" in text:
        raise ValueError("has a query; write only scheme, host and perhaps port and path")
    if text.endswith("/"):
        raise ValueError(f"ends in a slash; write {text.rstrip('/')}")
    if text.startswith("http:") and not is_loopback(urlsplit(text).hostname or ""):
        raise ValueError(f"not https; calls go over the Internet in TLS only, write https{text.removeprefix('http')}")


def _service_url(text: str) -> None:
    _url(text, "wss", "ws")


def _collector_url(text: str) -> None:
    _url(text, "http", "https")


def _address(text: str) -> None:
    host_port(text)


def _bearer(text: str) -> None:
    if text.lower().startswith("bearer "):
        raise ValueError('the word "Bearer" is added for you; write the token alone')
    if not text.isascii() or not text.isprintable() or " " in text or not text:
        raise ValueError("a bearer token is printable ASCII without spaces")


def _directory(text: str) -> None:
    if not text.strip() or not text.isprintable():
        raise ValueError("not a directory; write for instance /var/lib/gateway/recordings")
    if Path(text).exists() and not Path(text).is_dir():
        raise ValueError("a file, where a directory is wanted; write another name")


def _file_name(text: str) -> None:
    fields = re.findall(r"\{([^{}]*)\}", text)
    for field in fields:
        if field in ("caller", "called", "from", "to", "number"):
            raise ValueError("a phone number does not belong into a file's name; use {call_id} or {session}")
        if field not in _NAME_FIELDS:
            raise ValueError(f"knows no {{{field}}}; use {', '.join(f'{{{each}}}' for each in _NAME_FIELDS)}")
    if "session" not in fields:
        raise ValueError('does not tell streams apart; add {session}, for instance "{time}-{session}"')
    rest = re.sub(r"\{[^{}]*\}", "x", text)
    if not re.fullmatch(r"[A-Za-z0-9_-]+([/.][A-Za-z0-9_-]+)*", rest):
        raise ValueError("is not a name inside the directory; use letters, digits, - _ . and / between them")


def _pattern(text: str) -> None:
    if not text or not text.isprintable() or " " in text:
        raise ValueError('a pattern has no spaces; write for instance "+1415*" (`*` is any text, `?` one character)')


def _route_name(text: str) -> None:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,31}", text):
        raise ValueError("not a name; names are letters, digits, - and _, at most 32")
    if re.fullmatch("route-[0-9]+", text):
        raise ValueError("what routes without a name are called; choose another")


def _network(text: str) -> None:
    try:
        network = ip_network(text)
    except ValueError:
        try:
            hint = str(ip_network(text, strict=False))
        except ValueError:
            hint = 'for instance "10.0.0.0/8" or "::1"'
        raise ValueError(f"not an address or a network of addresses; write {hint}") from None
    if network.prefixlen == 0:
        raise ValueError("that is everybody, and anybody could claim any address; write your proxies' own network")


Address = Annotated[str, Meta(extra={"check": _address}, extra_json_schema={"pattern": "^[^ /@]+:[0-9]{1,5}$"})]
Pattern = Annotated[str, Meta(extra={"check": _pattern}, extra_json_schema={"pattern": "^[^ ]+$"})]
RouteName = Annotated[str, Meta(extra={"check": _route_name}, extra_json_schema={"pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"})]
Network = Annotated[str, Meta(extra={"check": _network})]
PublicUrl = Annotated[str, Meta(extra={"check": _public_url}, extra_json_schema={"pattern": "^https?://[^?#@]*[^/?#@]$"})]
FilePath = Annotated[str, Meta(extra={"file": True})]


class ProviderEntry(Struct, frozen=True):
    """One of `providers`: which carrier protocol, and that protocol's own options beside it.

    kind: the carrier protocol, one of `telephony-gateway providers`, or the dotted path of a module of your own; required.
    auth: `none` admits unsigned requests, on a loopback `listen` only; default: signatures are required.
    config: the protocol's own options, an instance of `providers.load(kind).Config`; in a file they stand beside `kind`.
    """

    kind: str
    config: Any
    auth: Literal["none"] | None = None

    def __repr__(self) -> str:
        return f"ProviderEntry(kind={self.kind!r}, auth={self.auth!r}, config={MASKED})"


class WebsocketService(Struct, frozen=True, tag_field="kind", tag="websocket"):
    """A service behind a WebSocket that the gateway dials once per call.

    url: where it listens, ws:// or wss://; required.
    media_format: encoding, sample_rate in Hz and channels (always 1) of the audio it gets and sends.
    frame_ms: audio in each binary message that it gets.
    authorization: bearer token that it is shown; default none.
    connect_timeout_secs: how long a connection may take to be made.
    track: what it hears: the caller (`inbound`) or what the caller hears (`outbound`).
    replay_ms: what it was sent and has not acknowledged, and what is said while it is away, is kept up to this.
    give_up_secs: how long a call waits for it, at the start and when it is lost.
    on_away: what the caller hears of what is still queued while it is away: all of it (`continue`), or nothing (`clear`).
    dialect: a carrier's protocol (a provider's `kind`), or `pipecat`, to speak to it; `media_format` is that one's; default ours.
    dialect_token: signs the handshake as that carrier does, over `url`; default none, it is not signed.
    """

    url: Annotated[str, Meta(extra={"check": _service_url}, extra_json_schema={"pattern": "^wss?://[^@#]+$"})]
    media_format: MediaFormat = MediaFormat(Encoding.PCM_S16LE, 16000)
    frame_ms: Literal[10, 20, 40, 60, 100] = 20
    authorization: Annotated[str, Meta(extra={"check": _bearer})] | None = None
    connect_timeout_secs: Annotated[float, Meta(gt=0, le=60)] = 2.0
    track: Track = Track.INBOUND
    replay_ms: Annotated[int, Meta(ge=100, le=300_000)] = 10_000
    give_up_secs: Annotated[float, Meta(gt=0, le=600)] = 10.0
    on_away: Literal["continue", "clear"] = "continue"
    dialect: str | None = None
    dialect_token: Annotated[str, Meta(min_length=1)] | None = None

    def __repr__(self) -> str:
        authorization = MASKED if self.authorization else None
        return f"WebsocketService(url={self.url!r}, media_format={self.media_format}, authorization={authorization}, …)"


class EchoService(Struct, frozen=True, tag_field="kind", tag="echo"):
    """The embedded service that sends the caller's audio back.

    delay_ms: how much later.
    """

    delay_ms: Annotated[int, Meta(ge=0, le=60_000)] = 0


class RecorderService(Struct, frozen=True, tag_field="kind", tag="recorder"):
    """The embedded recorder: a stereo WAV of each stream (left the caller, right what the caller heard) and a log of its events.

    directory: where the files go, made if it is not there, for this user's eyes only; required.
    format: how the audio is written, 16-bit stereo at the carrier's rate.
    name: what files are called, without their ending, of `{date}`, `{time}`, `{provider}`, `{call_id}` and `{session}`.
    transcripts: whether the log has the words that were recognized and spoken.
    """

    directory: Annotated[str, Meta(extra={"check": _directory})]
    format: Literal["wav"] = "wav"
    name: Annotated[str, Meta(extra={"check": _file_name})] = "{time}-{session}"
    transcripts: bool = False


Service = WebsocketService | EchoService | RecorderService


class Route(Struct, frozen=True):
    """Who takes the calls that fit everything given here; the first route that fits counts.

    service: name of one of `services`, or a list of names, tried in order; required.
    name: what the route is called in logs and stream tokens, at most 32 characters; default `route-` and its place.
    provider: name of one of `providers`; default any.
    called: pattern of the number or SIP URI that was called, `*` any text, `?` one character; default any.
    caller: pattern of the number or SIP URI that calls; default any.
    on_lost: what follows when a service that had the call stays away: end the call (`hangup`), or the list's `next` one.
    listeners: names of further services that hear the call and can't speak on it, slow it or break it, a list; default none.
    capture: directory that gets what passes on the carrier's socket, for `telephony-gateway replay`; default none.
    """

    service: tuple[str, ...]
    provider: str | None = None
    called: Pattern | None = None
    caller: Pattern | None = None
    name: RouteName | None = None
    on_lost: Literal["hangup", "next"] = "hangup"
    listeners: tuple[str, ...] = ()
    capture: Annotated[str, Meta(extra={"check": _directory})] | None = None

    @property
    def label(self) -> str:
        """The route's name; of those without one, `route-` and the place in `Settings.routes`, from 0."""
        return self.name or "route"


class Tls(Struct, frozen=True):
    """Where `listen` serves https and wss itself, without a proxy before it.

    certificate: path of the certificate and its chain, PEM; required.
    key: path of its private key, PEM without a passphrase; required.
    """

    certificate: FilePath
    key: FilePath


class Tracing(Struct, frozen=True):
    """Where spans go, one per stream, by OTLP over HTTP. Takes the extra `tracing`; OTEL_* variables set the rest.

    endpoint: URL of a collector, up to and with its path, such as `http://127.0.0.1:4318/v1/traces`; required.
    """

    endpoint: Annotated[str, Meta(extra={"check": _collector_url}, extra_json_schema={"pattern": "^https?://[^@#]+$"})]


class Settings(Struct, frozen=True):
    """The whole configuration.

    providers: who may call us: names (they are part of the webhook's URL) and their options; required.
    services: who listens and speaks: names and their options; required.
    routes: which service takes which call, a list; required.
    listen: address and port that carriers reach; port 0 picks a free one.
    admin: address and port that operators reach, for health, metrics and live calls; default none.
    admin_token: bearer token that operators show, at least 16 characters; required unless `admin` is a loopback address.
    sounds: directory of WAV files that operators can have played into calls (`POST /calls/SESSION/play`); default none.
    public_url: what carriers dial, https, up to but without the provider's name; required unless each provider has `auth: none`.
    secret: signs stream URLs, the same on all instances (`openssl rand -hex 32`); required unless each provider has `auth: none`.
    tls: certificate and key, and `listen` serves https and wss; default none, a proxy does that.
    tracing: where traces of streams go, by OpenTelemetry; default none, nothing is traced.
    trusted_proxies: networks of the proxies whose X-Forwarded-For is believed, a list such as `10.0.0.0/8`.
    max_calls: calls at once, in all workers together; further ones are refused.
    max_calls_per_second: new calls a second, as many at once; each worker takes its share.
    max_pending_per_address: connections of one address that have not sent their start frame.
    max_cpu_percent: of one processor that this process may use, in the mean of 5 s, before new calls are refused; 100: all.
    max_host_cpu_percent: the same of all processors, or of the control group's quota, whoever uses them; 100: all.
    max_memory_percent: of the control group's memory limit, else of the host's memory, likewise; 100: all.
    max_egress_mbit: megabits a second that may leave the host before new calls are refused; default none, any number.
    start_timeout_secs: how long a stream may take to send its start frame.
    stall_timeout_secs: how long a carrier of audio may send nothing, though it is connected, before its stream ends; 0: for ever.
    reattach_secs: how long a call whose carrier's connection was lost may take to come back and go on; 0: it ends at once.
    capacity_ms: audio that may wait to be played to one caller.
    hold_ms: the caller's first words that are kept while the service is being dialled.
    drain_secs: how long calls may go on once the process, or one of its workers, is told to end.
    log_level: the least severe events that are logged.
    """

    providers: dict[str, ProviderEntry]
    services: dict[str, Service]
    routes: tuple[Route, ...]
    listen: Address = "127.0.0.1:8080"
    admin: Address | None = None
    admin_token: Annotated[str, Meta(min_length=16, extra={"check": _bearer})] | None = None
    sounds: Annotated[str, Meta(extra={"check": _directory})] | None = None
    public_url: PublicUrl | None = None
    secret: Annotated[str, Meta(min_length=16)] | None = None
    tls: Tls | None = None
    tracing: Tracing | None = None
    trusted_proxies: tuple[Network, ...] = ()
    max_calls: Annotated[int, Meta(ge=1, le=100_000)] = 500
    max_calls_per_second: Annotated[float, Meta(gt=0, le=100_000)] = 50.0
    max_pending_per_address: Annotated[int, Meta(ge=1, le=100_000)] = 50
    max_cpu_percent: Annotated[int, Meta(ge=1, le=100)] = 95
    max_host_cpu_percent: Annotated[int, Meta(ge=1, le=100)] = 100
    max_memory_percent: Annotated[int, Meta(ge=1, le=100)] = 85
    max_egress_mbit: Annotated[float, Meta(gt=0)] | None = None
    start_timeout_secs: Annotated[float, Meta(gt=0, le=60)] = 5.0
    stall_timeout_secs: Annotated[float, Meta(ge=0, le=86_400)] = 60.0
    reattach_secs: Annotated[float, Meta(ge=0, le=60)] = 5.0
    capacity_ms: Annotated[int, Meta(ge=1_000, le=3_600_000)] = 120_000
    hold_ms: Annotated[int, Meta(ge=0, le=60_000)] = 5_000
    drain_secs: Annotated[float, Meta(ge=0, le=86_400)] = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        named = (route if route.name else structs.replace(route, name=f"route-{at}") for at, route in enumerate(self.routes))
        structs.force_setattr(self, "routes", tuple(named))
        if self.admin is not None and self.admin_token is None and not is_loopback(host_port(self.admin)[0]):
            raise ValueError(f"admin: anybody could reach {self.admin}; write 127.0.0.1:9090, or an admin_token")

    def route(self, label: str) -> Route | None:
        """The route with this label, or None: the configuration of whoever told the label is another one."""
        return next((route for route in self.routes if route.label == label), None)

    def base_url(self, port: int | None = None) -> str:
        """What carriers dial: `public_url`, else http(s) on `listen` (`port` is the one really bound where `listen` says 0)."""
        if self.public_url is not None:
            return self.public_url
        host, configured = host_port(self.listen)
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port or configured}"

    def __repr__(self) -> str:
        return f"Settings(listen={self.listen!r}, providers={[*self.providers]}, services={[*self.services]}, …)"
