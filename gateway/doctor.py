"""Is this gateway reachable as carriers reach it, and by nobody else? Asked from outside, through whatever proxies there are.

Every question has a deadline. A live gateway is not disturbed: a made-up call keeps one slot per provider for 15 seconds, its
stream is closed before it starts, and no service hears of it.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
from msgspec import Struct
from yarl import URL

from gateway.errors import ConfigError, MalformedFrame
from gateway.provider import Call, Dial, HttpRequest, Provider
from gateway.settings import Settings, host_port, is_loopback
from gateway.signing import UPGRADE, Signing, websocket_url
from gateway.tls import SOON_DAYS, load
from gateway.tokens import LEEWAY_SECS, LIFETIME_SECS, Ticket, TokenError, Tokens

ANSWER_SECS = 5.0
"""For each single question."""

WHOLE_SECS = 60.0

DESCRIPTORS_PER_CALL = 4
"""A carrier's socket and a service's, and as many again while calls come and go."""

_DAY_SECS = 86_400
_LARGEST_ANSWER = 256 * 1024
_STRONG_LENGTH, _STRONG_VARIETY = 32, 10

Level = Literal["ok", "warning", "error"]


class Finding(Struct, frozen=True):
    """What was looked at, how it is, and the sentence that mends it (empty where all is well)."""

    check: str
    level: Level
    text: str
    fix: str = ""


async def examine(settings: Settings, providers: Mapping[str, Provider]) -> AsyncIterator[Finding]:
    """Findings, as they are made. Never raises for what it finds, never takes longer than WHOLE_SECS."""
    for finding in (*_secret(settings), *_auth(settings), *_descriptors(settings), *_admin(settings), *_proxies(settings)):
        yield finding
    for finding in _certificate(settings):
        yield finding
    visit = _Visit(settings, providers)
    try:
        async with asyncio.timeout(WHOLE_SECS):
            async for finding in visit.findings():
                yield finding
    except TimeoutError:
        yield _error("deadline", f"not everything was looked at within {WHOLE_SECS:g} s", "See which answers above took so long.")


def _ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def _warning(check: str, text: str, fix: str) -> Finding:
    return Finding(check, "warning", text, fix)


def _error(check: str, text: str, fix: str) -> Finding:
    return Finding(check, "error", text, fix)


# --- what the configuration and this machine tell ------------------------------------------------------------------------


def _secret(settings: Settings) -> list[Finding]:
    secret = settings.secret
    fix = "Make one with `openssl rand -hex 32` and write secret: ${GATEWAY_SECRET}, the same on every instance."
    if secret is None:
        return [_warning("secret", "there is none: each process makes its own, and no second one can read its stream URLs", fix)]
    if not _is_strong(secret):
        return [_warning("secret", f"{len(secret)} characters, {len(set(secret))} different ones: it could be guessed", fix)]
    return [_ok("secret", f"{len(secret)} characters")]


def _is_strong(secret: str) -> bool:
    return len(secret) >= _STRONG_LENGTH and len(set(secret)) >= _STRONG_VARIETY


def _auth(settings: Settings) -> list[Finding]:
    findings = []
    for name, entry in settings.providers.items():
        if entry.auth is None:
            findings.append(_ok(f"{name}: auth", "signatures are required"))
        elif settings.public_url is not None and not is_loopback(urlsplit(settings.public_url).hostname or ""):
            text = f"`auth: none`, and {settings.public_url} leads here: whoever finds it can place calls"
            findings.append(_error(f"{name}: auth", text, f"Give providers.{name} the account's auth_token."))
        else:
            fix = "Give it the account's auth_token before a tunnel or a proxy leads here."
            findings.append(_warning(f"{name}: auth", "`auth: none`: for development on this machine only", fix))
    return findings


def _descriptors(settings: Settings) -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DESCRIPTORS_PER_CALL * settings.max_calls + 100
    text = f"{soft} in this shell, {needed} for max_calls: {settings.max_calls}"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return [_ok("file descriptors", text)]
    fix = f"Raise the limit where the gateway is started (LimitNOFILE={needed}, `ulimit -n {needed}`), or lower max_calls."
    enough = soft >= 2 * settings.max_calls + 50
    if hard != resource.RLIM_INFINITY and hard < needed:
        fix += f" The hard limit is {hard}."
    return [(_warning if enough else _error)("file descriptors", text, fix)]


def _admin(settings: Settings) -> list[Finding]:
    if settings.admin is None or is_loopback(host_port(settings.admin)[0]):
        return [_ok("admin", settings.admin or "no operators' listener")]
    if settings.admin_token is not None and _is_strong(settings.admin_token):
        return [_ok("admin", f"{settings.admin} is no loopback address; a token guards it")]
    fix = "Write admin: 127.0.0.1:9090 and reach it through a tunnel, or make a better admin_token with `openssl rand -hex 32`."
    return [_warning("admin", f"{settings.admin} is no loopback address, and its token could be guessed", fix)]


def _proxies(settings: Settings) -> list[Finding]:
    behind = settings.tls is None and (settings.public_url or "").startswith("https:")
    if behind and not settings.trusted_proxies:
        text = (
            "a proxy speaks TLS for us and none is trusted: all connections seem to come from it, and together may have "
            f"max_pending_per_address: {settings.max_pending_per_address} that have not started"
        )
        return [_warning("trusted_proxies", text, "Write the proxy's address, such as trusted_proxies: [127.0.0.1].")]
    if not behind and settings.trusted_proxies and settings.tls is not None:
        text = "the gateway speaks TLS itself and yet believes X-Forwarded-For of some"
        return [_warning("trusted_proxies", text, "Leave trusted_proxies out, unless a proxy speaks TLS to the gateway.")]
    return [_ok("trusted_proxies", ", ".join(settings.trusted_proxies) or "none, and none is needed")]


def _certificate(settings: Settings) -> list[Finding]:
    if settings.tls is None:
        return []
    try:
        return [_expiry("tls files", (load(settings.tls)[1] - time.time()) / _DAY_SECS)]
    except ConfigError as error:
        return [_error("tls files", str(error), "Write the paths of a PEM chain and of its unencrypted key.")]


def _expiry(check: str, days: float) -> Finding:
    if days < 0:
        return _error(check, f"expired {-days:.0f} days ago", "Renew the certificate; no carrier connects with this one.")
    if days < SOON_DAYS:
        return _warning(
            check, f"expires in {days:.0f} days", "Renew the certificate, and see why that does not happen by itself."
        )
    return _ok(check, f"{days:.0f} days left")


# --- what can be seen from outside ---------------------------------------------------------------------------------------


class _Visit:
    """One look at the public URL."""

    def __init__(self, settings: Settings, providers: Mapping[str, Provider]) -> None:
        self._settings = settings
        self._providers = providers
        self._public = settings.base_url()
        self._tokens = Tokens(settings.secret) if settings.secret is not None else None

    async def findings(self) -> AsyncIterator[Finding]:
        reachable = True
        async for finding in self._reach():
            reachable &= finding.level != "error"
            yield finding
        if not reachable:
            return
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_stay)
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECS)
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context())
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, trace_configs=[trace]) as http:
            for name, provider in self._providers.items():
                async for finding in self._account(http, name, provider):
                    yield finding

    async def _reach(self) -> AsyncIterator[Finding]:
        """DNS, TCP, TLS, in the order in which a carrier needs them."""
        parts = urlsplit(self._public)
        host, secure = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        if self._settings.public_url is None:
            fix = "Write public_url: https://…, exactly what carriers dial."
            yield _warning("public_url", f"there is none; {self._public} is looked at instead", fix)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_SECS):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            text = f"{host} has no address here: {_short(error)}"
            yield _error("dns", text, "Correct public_url, or make the name known: carriers resolve it in public DNS.")
            return
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        yield _ok("dns", f"{host} is {', '.join(addresses)}")
        dead = [(address, why) for address in addresses if (why := await self._dial(address, port))]
        if len(dead) == len(addresses):
            text = f"{dead[0][0]} port {port}: {dead[0][1]}"
            yield _error(
                "tcp", text, "Start the proxy or the gateway there, open the port in the firewall, or correct public_url."
            )
            return
        if dead:
            text = f"{dead[0][0]} port {port}: {dead[0][1]}; other addresses answer"
            yield _warning("tcp", text, "Take that address out of DNS: a carrier may dial it first.")
        else:
            yield _ok("tcp", f"port {port} answers")
        if secure:
            yield await self._tls(host, port)

    async def _dial(self, address: str, port: int) -> str:
        """Why not; empty if so."""
        try:
            async with asyncio.timeout(ANSWER_SECS):
                _, writer = await asyncio.open_connection(address, port)
        except (OSError, TimeoutError) as error:
            return _short(error)
        writer.transport.abort()
        return ""

    async def _tls(self, host: str, port: int) -> Finding:
        try:
            async with asyncio.timeout(ANSWER_SECS):
                _, writer = await asyncio.open_connection(host, port, ssl=ssl.create_default_context())
        except ssl.SSLCertVerificationError as error:
            fix = f"Serve a certificate for {host} with its whole chain, from an authority that carriers know."
            return _error("tls", f"no carrier would trust this certificate: {error.verify_message}", fix)
        except (OSError, TimeoutError) as error:
            return _error(
                "tls", f"no TLS is spoken there: {_short(error)}", "Let the proxy, or the option `tls`, serve https there."
            )
        certificate = writer.get_extra_info("peercert") or {}
        writer.transport.abort()
        return _expiry("tls", (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / _DAY_SECS)

    # -- one account

    async def _account(self, http: aiohttp.ClientSession, name: str, provider: Provider) -> AsyncIterator[Finding]:
        """What this provider's carrier would meet, from the webhook to the stream."""
        url = f"{self._public}/{name}/answer"
        sign = Signing(provider, self._public)
        call = Call(f"CA{uuid4().hex}", "+15550100001", "+15550100002", account_id=f"AC{uuid4().hex}")
        request = type(provider).webhook(call, url)
        signed = self._settings.providers[name].auth is None
        if signed:
            status, _, _ = await _ask(http, _elsewhere(sign, request))
            finding = _refusal(f"{name}: wrong signature", status, "webhook")
            yield finding
            if finding.level == "error" and not isinstance(status, int):
                return  # nobody is there
        status, answer, headers = await _ask(http, sign(request))
        if status != 200:
            yield self._unanswered(f"{name}: webhook", status, url)
            return
        yield _ok(f"{name}: webhook", "a signed request is answered" if signed else "a request is answered")
        if (skew := _skew(headers)) is not None:
            yield skew
        try:
            dial = type(provider).dial(answer)
        except MalformedFrame:
            text = "the answer names no stream: the gateway is full, or something else answers"
            yield _warning(f"{name}: stream", text, "See whether it logs call_refused; look again when there is room.")
            return
        finding, ticket = self._instance(name, dial, call)
        yield finding
        if finding.level == "error":
            return
        if ticket is not None and abs(behind := time.time() - (ticket.expires - LIFETIME_SECS)) > LEEWAY_SECS:
            yield _clock(behind)
        if signed:
            upgrade = HttpRequest("GET", dial.url, UPGRADE)
            yield _refusal(f"{name}: wrong upgrade", await _connect(http, _elsewhere(sign, upgrade)), "upgrade")
        yield self._upgraded(f"{name}: upgrade", await _connect(http, sign(HttpRequest("GET", dial.url, UPGRADE))))

    def _unanswered(self, check: str, status: int | str, url: str) -> Finding:
        match status:
            case 403:
                text = "a rightly signed webhook is refused: what arrives is not what was signed, or another token is configured"
                fix = (
                    "Compare auth_token and public_url with the running gateway's; its log line signature_refused tells what it "
                    "`tried`. A proxy must pass on query and body unchanged, and the path but for a prefix in public_url."
                )
            case 404:
                text, fix = f"{url} is not found", "Let the proxy pass this path on to the gateway, or correct public_url."
            case 301 | 302 | 303 | 307 | 308:
                text, fix = f"HTTP {status}, a redirect", "Write its target into public_url: a signature covers the URL dialled."
            case 502 | 503 | 504:
                text, fix = (
                    f"HTTP {status}: the proxy has no gateway behind it",
                    "Start the gateway, or correct the proxy's backend.",
                )
            case int():
                text, fix = f"HTTP {status}", "Something else than this gateway answers there; see the proxy's configuration."
            case _:
                text, fix = status, "See the proxy's and the gateway's logs."
        return _error(check, text, fix)

    def _instance(self, name: str, dial: Dial, call: Call) -> tuple[Finding, Ticket | None]:
        """Whether the gateway that answered is one of ours."""
        check = f"{name}: instance"
        base = f"{websocket_url(self._public)}/{name}/stream/"
        if not dial.url.startswith(base):
            where = str(URL(dial.url).origin())
            fix = "Give all instances the same public_url."
            return _error(check, f"the answer sends the stream to {where}, not below {websocket_url(self._public)}", fix), None
        if self._tokens is None:
            return _ok(check, "a gateway answers; without a secret it can't be told whether it is ours"), None
        try:
            ticket = self._tokens.read(dial.url.removeprefix(base), name, now=time.time())
        except TokenError as error:
            fix = "Give all instances the same secret, then restart those that have another one."
            if error.reason == "expired":
                fix = "Set the clocks, here and there: run chrony or systemd-timesyncd."
            return _error(check, f"another gateway answers: its stream token is {error.reason} to our secret", fix), None
        if ticket.call_id != call.call_id:
            return _error(check, "the answer is of another call", "Let no cache answer: it must not keep what it was told."), None
        return _ok(check, "a gateway with our secret answers"), ticket

    def _upgraded(self, check: str, status: int | str) -> Finding:
        match status:
            case 101:
                return _ok(check, "a signed WebSocket is let in, and closes in order")
            case 403:
                text = "a rightly signed WebSocket is refused: its URL or its signature did not arrive as sent"
                fix = (
                    "Let the proxy pass on path and headers unchanged; token_refused or signature_refused in the log tells which."
                )
            case 200 | 400 | 426:
                text = f"HTTP {status}: the proxy does not pass WebSockets on"
                fix = "Pass on `Upgrade` and `Connection: upgrade`, as config/nginx.conf and config/haproxy.cfg do."
            case 503:
                text, fix = (
                    "HTTP 503: no room, or no gateway",
                    "See whether it logs connection_refused; raise max_pending_per_address.",
                )
            case int():
                text, fix = f"HTTP {status} in place of 101", "See the proxy's configuration for this path."
            case _:
                text, fix = status, "See the proxy's and the gateway's logs."
        return _error(check, text, fix)


def _refusal(check: str, status: int | str, what: str) -> Finding:
    match status:
        case 403:
            return _ok(check, "is refused")
        case 200 | 101 | 204:
            text = f"a wrongly signed {what} is let in: what answers there does not check signatures"
            return _error(
                check, text, "Give the running gateway this configuration, without `auth: none`; stop whatever else answers."
            )
        case int():
            text = f"HTTP {status} in place of 403"
            return _warning(check, text, "Something before the gateway answers; see the proxy's configuration.")
        case _:
            return _error(check, status, "Start the gateway, or correct the proxy's backend.")


def _skew(headers: Mapping[str, str]) -> Finding | None:
    """By the Date header, which is cut to the second."""
    try:
        there = parsedate_to_datetime(headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None
    skew = time.time() - there - 0.5
    return _clock(skew) if abs(skew) > 2 else _ok("clock", f"the same as there, to {abs(skew) + 0.5:.0f} s")


def _clock(behind: float) -> Finding:
    text = f"the clock there is {abs(behind):.0f} s {'behind' if behind > 0 else 'ahead of'} this one"
    fix = f"Run chrony or systemd-timesyncd on every instance: tokens bear {LEEWAY_SECS} s between two of them."
    return (_error if abs(behind) > LEEWAY_SECS else _warning)("clock", text, fix)


def _elsewhere(sign: Callable[[HttpRequest], HttpRequest], request: HttpRequest) -> HttpRequest:
    """The request with the signature of another one."""
    other = sign(HttpRequest(request.method, f"{request.url}-", request.headers, request.form))
    return HttpRequest(request.method, request.url, other.headers, request.form)


async def _ask(http: aiohttp.ClientSession, request: HttpRequest) -> tuple[int | str, str, Mapping[str, str]]:
    """(status, or why there is none; the answer; its headers)."""
    try:
        async with http.request(
            request.method,
            URL(request.url, encoded=True),
            headers=request.headers,
            data=dict(request.form),
            allow_redirects=False,
        ) as response:
            body = await response.content.read(_LARGEST_ANSWER)
            return response.status, body.decode(errors="replace"), response.headers
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        return _short(error), "", {}


async def _connect(http: aiohttp.ClientSession, request: HttpRequest) -> int | str:
    """101 for a WebSocket that was let in and is closed again, else the status or why there is none."""
    headers = {name: value for name, value in request.headers.items() if name not in UPGRADE}
    try:
        async with asyncio.timeout(ANSWER_SECS):
            socket_ = await http.ws_connect(URL(request.url, encoded=True), headers=headers)
            await socket_.close()
            return 101 if socket_.close_code != aiohttp.WSCloseCode.ABNORMAL_CLOSURE else "the WebSocket broke off at its end"
    except aiohttp.WSServerHandshakeError as error:
        return error.status
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        return _short(error)


async def _stay(_session: object, _context: object, params: aiohttp.TraceRequestRedirectParams) -> None:
    raise aiohttp.ClientError(f"HTTP {params.response.status}, a redirect")


def _short(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_SECS:g} s"
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
