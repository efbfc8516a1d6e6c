"""The operators' listener: health, metrics, live calls and their control. Carriers never reach it; errors are JSON sentences."""

from __future__ import annotations

import asyncio
import hmac
import os
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import isawaitable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from gateway import __version__, logs, wav
from gateway.audio import convert_whole
from gateway.callcontrol import ApiFailed, Placement, Transfer
from gateway.door import Remarks
from gateway.errors import ConfigError, LocalError, UnsupportedCommand
from gateway.events import COMMAND_NAMES, Audio, Clear, Command, Dtmf, Message, Stop, StopReason
from gateway.media import MediaFormat
from gateway.metrics import Metrics
from gateway.settings import MASKED, Settings, host_port, is_loopback
from gateway.stream import House, Stream
from gateway.watchdog import Watchdog
from gateway.wav import WavError

LARGEST_BODY = 4 * 1024
ACTIONS = ("hangup", "clear", "dtmf", "transfer", "play")
SOUND_TYPES = frozenset({"audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"})
JSON_TYPES = frozenset({"application/json", "application/x-www-form-urlencoded"})
"""The second is what `curl -d` says of whatever it sends."""

LARGEST_SOUND = 16 * 2**20
"""Bytes of a WAV file that is played into a call: some 87 seconds of CD quality, or 17 minutes at a call's own."""

OPEN = frozenset({"/livez", "/readyz"})
"""Asked by orchestrators that know no token; they tell nothing of calls."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_DIGITS = re.compile("[0-9*#A-Dw]{1,64}")
_SECRET_KEY = re.compile(r"(?i)(secret|token|password|authorization|credential|(api|signing)_?key)s?$")
_PRIVATE_KEY = frozenset({"parameters", "extra_headers"})

T = TypeVar("T")
Hook = Callable[[], object]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Sound(Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be played: a WAV file's path inside `sounds`."""

    file: str


class Attachment(Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the configured services is to listen."""

    service: str


@dataclass
class Hooks:
    """What operators can ask of the process, given by whoever runs it; None: it can't be asked for. May be coroutines."""

    drain: Hook | None = None
    reload: Hook | None = None
    draining: bool = False
    """Set by whoever drains."""
    reloads: Mapping[str, int] = field(default_factory=dict)
    """How often each outcome a reload had."""


class Trouble(Exception):
    """Answer with `status` and this sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Operators(ABC):
    """An operators' listener, whatever is served there: who may ask, and how an answer looks. `start`, then `stop`."""

    def __init__(self, address: str) -> None:
        """`address` is host and port."""
        self.port = 0
        self._log: FilteringBoundLogger = structlog.get_logger("gateway.admin")
        self._remarks = Remarks(self._log.warning)
        self._runner: web.AppRunner | None = None
        self._began = asyncio.get_running_loop().time()
        self._address = host_port(address)
        self._private = False

    @property
    @abstractmethod
    def settings(self) -> Settings:
        """Those in force."""

    @abstractmethod
    def count_refusal(self) -> None:
        """Somebody came without the token."""

    @abstractmethod
    def _routes(self, app: web.Application) -> None: ...

    async def start(self, path: str | None = None) -> int:
        """Listen. Returns the port. Raises OSError for an address that can't be used; its `filename` is the address.

        With `path`, listen on that Unix socket, for our own processes: nobody has to show anything.
        """
        self._private = path is not None
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[self._guard])
        app.router.add_get("/", self._index)
        app.router.add_get("/livez", self._live)
        self._routes(app)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=15.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, *self._address) if path is None else web.UnixSite(self._runner, path)
        try:
            await site.start()
        except OSError as error:
            await self.stop()
            raise OSError(error.errno, error.strerror, path or self.settings.admin) from None
        if path is None:
            self.port = int(self._runner.addresses[0][1])
            self._log.info(
                "admin_listening", address=f"{self._address[0]}:{self.port}", bearer=self.settings.admin_token is not None
            )
        return self.port

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets in whom it should, and has every answer, refusals too, in JSON."""
        try:
            self._admit(request)
            response = await handler(request)
        except Trouble as trouble:
            response = _json({"error": str(trouble)}, trouble.status)
            if trouble.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except web.HTTPException as error:
            sentence = {
                404: "nothing is served here; GET / tells what is",
                405: f"not with this method; with {error.headers.get('Allow', 'another')}",
                413: f"too large: send at most {LARGEST_BODY} bytes",
            }.get(error.status, error.reason)
            response = _json({"error": sentence}, error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:
            self._log.exception("admin_request_failed")
            response = _json({"error": "the gateway failed to answer this; its log says why"}, 500)
        response.headers.update(HEADERS)
        return response

    def _admit(self, request: web.Request) -> None:
        """Raises Trouble. A browser's request is let in only from a page of this very listener."""
        if self._private:
            return
        token = self.settings.admin_token
        host = request.headers.get("Host", "")
        if token is None and not self._is_ours(host):
            # A name that some page has made to point here (DNS rebinding): without a token, that page would be let in.
            raise Trouble(403, "the Host header is not this listener's; call it by its address")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Trouble(403, "pages of other sites may not ask here (Origin)")
        if token is not None and request.path not in OPEN:
            kind, _, given = request.headers.get("Authorization", "").partition(" ")
            matches = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
            if kind.lower() != "bearer" or not matches:
                self.count_refusal()
                self._remarks.tell("admin_refused", asyncio.get_running_loop().time(), peer=request.remote)
                raise Trouble(401, "show the configuration's admin_token: Authorization: Bearer …")

    def _is_ours(self, host: str) -> bool:
        try:
            name = host_port(host if ":" in host.rpartition("]")[2] else f"{host}:80")[0]
        except ValueError:
            return False
        return is_loopback(name) or name == self._address[0]

    async def _index(self, request: web.Request) -> web.Response:
        routes = {f"{route.method} {route.resource.canonical}" for route in request.app.router.routes() if route.resource}
        return _json({"endpoints": sorted(route for route in routes if not route.startswith("HEAD"))})

    async def _live(self, _: web.Request) -> web.Response:
        return _json({"alive": True})


class Admin(Operators):
    """One process's operators' listener."""

    def __init__(
        self,
        house: Callable[[], House],
        metrics: Metrics,
        watchdog: Watchdog,
        hooks: Hooks,
        *,
        listening: Callable[[], bool],
        base_url: Callable[[], str],
    ) -> None:
        self._house_now = house
        super().__init__(house().settings.admin or "127.0.0.1:0")
        self._metrics = metrics
        self._watchdog = watchdog
        self._hooks = hooks
        self._listening = listening
        self._base_url = base_url

    @property
    def _house(self) -> House:
        """A reload puts another one in its place."""
        return self._house_now()

    @property
    def _settings(self) -> Settings:
        return self._house.settings

    def _routes(self, app: web.Application) -> None:
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._scrape)
        if self._private:
            app.router.add_get("/sums", self._sums)
        app.router.add_get("/version", self._version)
        app.router.add_get("/config", self._config)
        app.router.add_get("/calls", self._calls)
        app.router.add_post("/calls", self._place)
        app.router.add_get("/calls/{session}", self._call)
        app.router.add_post("/calls/{session}/listeners", self._attach)
        app.router.add_delete("/calls/{session}/listeners/{service}", self._detach)
        app.router.add_post("/calls/{session}/play", self._play)
        app.router.add_post("/calls/{session}/{action}", self._control)
        app.router.add_post("/drain", self._drain)
        app.router.add_post("/reload", self._reload)

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._settings

    def count_refusal(self) -> None:
        """See `Operators`."""
        self._house.totals.refuse("admin", "token")

    def reasons(self) -> list[dict[str, str]]:
        """Why this process should get no new calls; none if it should."""
        admission, limit = self._house.door.admission, self._settings.max_calls
        found = []
        if not self._listening():
            found.append(("not_listening", "carriers can't connect: the listener is not open"))
        if self._hooks.draining:
            found.append(("draining", "the process is ending its calls and takes no new ones"))
        if admission.calls >= limit:
            found.append(("full", f"{admission.calls} of {limit} calls (max_calls)"))
        if self._watchdog.overloaded():
            found.append(("loop_lag", f"the event loop is late, lately by up to {self._watchdog.worst() * 1000:.0f} ms"))
        found += self._watchdog.meter.over(self._settings)
        return [{"reason": reason, "detail": detail} for reason, detail in found]

    # --- health ---

    async def _ready(self, _: web.Request) -> web.Response:
        reasons = self.reasons()
        return _json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def _version(self, _: web.Request) -> web.Response:
        uptime = asyncio.get_running_loop().time() - self._began
        return _json({"version": __version__, "python": platform.python_version(), "uptime_secs": round(uptime, 1)})

    async def _scrape(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.text(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _sums(self, _: web.Request) -> web.Response:
        return _json(self._metrics.packed())

    async def _config(self, _: web.Request) -> web.Response:
        return _json(redacted(self._settings))

    # --- calls ---

    async def _calls(self, _: web.Request) -> web.Response:
        calls = [_brief(stream) for stream in self._house.streams.values()]
        return _json({"count": len(calls), "calls": calls})

    async def _call(self, request: web.Request) -> web.Response:
        return _json(_detail(self._stream(request)))

    async def _place(self, request: web.Request) -> web.Response:
        """Have a carrier call somebody; once they answer, the call comes in like any other."""
        house = self._house
        order = await _order(request)
        if order.provider not in house.providers:
            raise Trouble(400, f"provider: there is none of this name; there are: {', '.join(house.providers)}")
        if order.route is not None:
            route = house.settings.route(order.route)
            if route is None or route.provider not in (None, order.provider):
                raise Trouble(400, "route: there is none of this name for this provider")
        if reasons := self.reasons():
            raise Trouble(503, f"no new calls at the moment: {'; '.join(reason['detail'] for reason in reasons)}")
        with _told():
            call_id = await house.control.place(order.provider, house.providers[order.provider], order, self._base_url())
        return _json({"provider": order.provider, "call_id": call_id}, 202)

    async def _control(self, request: web.Request) -> web.Response:
        """Give a live call one command, as its service could; or have its carrier end it, or go on with something else."""
        action = request.match_info["action"]
        if action not in ACTIONS:
            raise Trouble(404, f"a call can't be told to {action[:40]!r} here; known: {', '.join(ACTIONS)}")
        stream = self._stream(request)
        if action in ("hangup", "transfer") and stream.session.start is not None and not stream.session.over:
            call_id, control = stream.session.start.call_id, self._house.control
            if action == "transfer":
                target = await _body(request, Transfer, 'send {"xml": "<Dial>…</Dial>"} or {"url": "https://…"}')
                self._log.info("operator_command", action=action, session=stream.session_id)
                base, door = f"{self._base_url()}/{stream.provider}/document", self._house.door
                with _told():
                    await control.transfer(
                        stream.provider, stream.account, call_id, target,
                        lambda document: f"{base}/{door.publish(stream.provider, document)}",
                    )  # fmt: skip
                return _json({"session": stream.session_id, "done": action}, 202)
            return await self._hang_up(stream, call_id)
        if action == "transfer":
            raise Trouble(409, "the stream is over" if stream.session.over else "the stream has not started")
        self._perform(stream, Dtmf(await _digits(request)) if action == "dtmf" else Clear() if action == "clear" else Stop())
        self._log.info("operator_command", action=action, session=stream.session_id)
        return _json({"session": stream.session_id, "done": action})

    async def _play(self, request: web.Request) -> web.Response:
        """Queue a WAV file behind whatever waits to be played; what the service says from now on is queued behind it."""
        stream = self._stream(request)
        self._admits(stream, Audio)
        file: bytes | Path
        if request.content_type in SOUND_TYPES:
            file = await _upload(request)
        elif request.content_type in JSON_TYPES:
            file = self._sound((await _body(request, Sound, 'send {"file": "notice.wav"}')).file)
        else:
            raise Trouble(415, 'send a WAV file as audio/wav, or {"file": "notice.wav"} as application/json')
        into = stream.start.media_format
        if into is None:
            raise Trouble(409, "the stream carries words, not sound")
        try:
            payload = await asyncio.to_thread(_sound, file, into)
        except FileNotFoundError:
            raise Trouble(404, "there is no such file in `sounds`") from None
        except (WavError, ConfigError) as error:
            raise Trouble(415 if isinstance(file, bytes) else 422, str(error)) from None
        self._admits(stream, Audio)  # it may have ended meanwhile
        length_ms, room_ms = into.duration_ms(len(payload)), self._settings.capacity_ms - stream.figures().queued_ms
        if length_ms > room_ms:
            raise Trouble(409, f"it lasts {length_ms / 1000:.1f} s, and the queue has room for {max(0, room_ms) / 1000:.1f} s")
        ahead_ms, queued = stream.pending()[0], stream.figures().queued
        self._perform(stream, Audio(payload))
        if stream.figures().queued == queued and payload:
            raise Trouble(409, "the stream refused it: it ends once what is queued has played")
        self._log.info("operator_command", action="play", session=stream.session_id, length_ms=round(length_ms))
        done = {"session": stream.session_id, "done": "play", "length_ms": round(length_ms), "ahead_ms": ahead_ms}
        return _json(done, 202)

    def _sound(self, name: str) -> Path:
        """The file of this name. Raises Trouble for what is outside the directory, wherever links lead."""
        if self._settings.sounds is None:
            raise Trouble(409, "no directory of sounds is configured; write `sounds`, or send the file itself as audio/wav")
        directory = Path(self._settings.sounds).resolve()
        try:
            path = (directory / name).resolve()
        except (OSError, ValueError, RuntimeError):
            raise Trouble(404, "there is no such file in `sounds`") from None
        if not path.is_relative_to(directory):
            raise Trouble(404, "there is no such file in `sounds`")
        return path

    async def _attach(self, request: web.Request) -> web.Response:
        """Have one more of the configured services listen to a live call."""
        stream, name = self._stream(request), (await _body(request, Attachment, 'send {"service": "monitor"}')).service
        service = self._settings.services.get(name)
        if service is None:
            raise Trouble(404, f"service: there is none of this name; there are: {', '.join(self._settings.services)}")
        try:
            stream.attach(name, service)
        except LocalError as error:
            raise Trouble(409, str(error)) from None
        self._log.info("operator_command", action="attach", session=stream.session_id, service=name)
        return _json({"session": stream.session_id, "listeners": stream.figures().line()["listeners"]}, 202)

    async def _detach(self, request: web.Request) -> web.Response:
        """Take a listener off a live call; answers once it is gone."""
        stream, name = self._stream(request), request.match_info["service"]
        if not await stream.detach(name):
            raise Trouble(404, "no listener of this name is on the call; GET /calls/SESSION lists them")
        self._log.info("operator_command", action="detach", session=stream.session_id, service=name)
        return _json({"session": stream.session_id, "listeners": stream.figures().line()["listeners"]})

    async def _hang_up(self, stream: Stream, call_id: str) -> web.Response:
        """End the call where its carrier can be asked to; in any case its stream, after which a call may go on with `after`."""
        self._log.info("operator_command", action="hangup", session=stream.session_id)
        ended, trouble = "stream", None
        try:
            await self._house.control.hang_up(stream.provider, stream.account, call_id)
            ended = "call"
        except UnsupportedCommand:
            pass  # no credentials: the stream is what there is
        except ApiFailed as failed:
            trouble = failed
        if not stream.session.over:  # the carrier may have been faster
            self._perform(stream, Stop())
        if trouble is not None:
            raise Trouble(502, _prose(f"its stream is ended, but the call may go on: {trouble}"))
        return _json({"session": stream.session_id, "done": "hangup", "ended": ended})

    def _admits(self, stream: Stream, command: type[Message]) -> None:
        """Raises Trouble unless the stream can be given such a command now."""
        session, word = stream.session, COMMAND_NAMES[command]
        if session.over:
            raise Trouble(409, "the stream is over")
        if session.start is None:
            raise Trouble(409, "the stream has not started: its start frame has not come")
        accepts = stream.start.accepts
        if word not in (*accepts, "stop"):
            raise Trouble(409, f"this stream can't carry out {word!r}; it accepts: {', '.join(accepts) or 'nothing'}")

    def _perform(self, stream: Stream, command: Command) -> None:
        session = stream.session
        if session.start is None and not session.over and isinstance(command, Stop):
            stream.end(StopReason.SERVICE_STOP)
            return
        self._admits(stream, type(command))
        faults = sum(session.faults.values())
        stream.perform(command)
        if sum(session.faults.values()) > faults:
            raise Trouble(409, "the stream refused it: it ends once what is queued has played")

    def _stream(self, request: web.Request) -> Stream:
        stream = self._house.streams.get(request.match_info["session"])
        if stream is None:
            raise Trouble(404, "no live call has such a session id; GET /calls lists them")
        return stream

    # --- the process ---

    async def _drain(self, _: web.Request) -> web.Response:
        return await self._ask("drain", self._hooks.drain)

    async def _reload(self, _: web.Request) -> web.Response:
        return await self._ask("reload", self._hooks.reload)

    async def _ask(self, what: str, hook: Hook | None) -> web.Response:
        if hook is None:
            raise Trouble(501, f"this process was started without a way to {what}")
        self._log.info("operator_command", action=what)
        try:
            result = hook()
            if isawaitable(result):
                result = await result
        except ConfigError as error:
            raise Trouble(422, str(error)) from None
        return _json({"asked": what} | ({} if result is None else {"result": result}), 202)


@contextmanager
def _told() -> Iterator[None]:
    """What can't be asked of a carrier, or was refused by it, becomes an answer."""
    try:
        yield
    except UnsupportedCommand as error:
        raise Trouble(409, str(error)) from None
    except ValueError as error:
        raise Trouble(400, str(error)) from None
    except ApiFailed as failed:
        raise Trouble(504 if failed.unknown else 502, _prose(str(failed))) from None


def _prose(text: str) -> str:
    """A sentence with a carrier's own words in it, without numbers."""
    return str(logs.redact(None, "", {"error": text})["error"])


async def _body(request: web.Request, want: type[T], example: str) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=want)
    except msgspec.ValidationError as error:
        raise Trouble(400, f"{error}; {example}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise Trouble(400, f"not a JSON object; {example}") from None


async def _upload(request: web.Request) -> bytes:
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > LARGEST_SOUND:
            raise Trouble(413, f"too large: send at most {LARGEST_SOUND} bytes, or put the file into `sounds`")
    return bytes(body)


def _sound(file: bytes | Path, into: MediaFormat) -> bytes:
    """A WAV file in a call's format. Raises FileNotFoundError, WavError and ConfigError."""
    if isinstance(file, bytes):
        read = wav.parse(file, "the body")
    elif not os.path.isfile(file):  # noqa: PTH113 — False also for names that no file can have
        raise FileNotFoundError(file)
    elif file.stat().st_size > LARGEST_SOUND:
        raise WavError(f"{file.name} has more than {LARGEST_SOUND} bytes")
    else:
        read = wav.read(file)
    return convert_whole(read.pcm, read.media_format, into)


async def _order(request: web.Request) -> Placement:
    example = 'send {"provider": "twilio", "to": "+14155550100", "from": "+14155550199"}, and perhaps "route"'
    return await _body(request, Placement, example)


async def _digits(request: web.Request) -> str:
    example = 'send {"digits": "12#"}: 1 to 64 of 0-9, *, #, A-D and w'
    try:
        body = msgspec.json.decode(await request.read(), type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Trouble(400, f"not a JSON object of texts; {example}") from None
    if body.keys() != {"digits"} or not _DIGITS.fullmatch(body["digits"]):
        raise Trouble(400, example)
    return body["digits"]


def redacted(settings: Settings) -> Any:
    """The configuration in force, as JSON knows it, without secrets, and phone numbers masked."""
    return _hidden("", msgspec.to_builtins(settings))


def _hidden(key: str, value: Any) -> Any:
    if value is not None and _SECRET_KEY.search(key):
        return MASKED
    if isinstance(value, Mapping):
        return {name: MASKED if key in _PRIVATE_KEY else _hidden(name, each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(key, each) for each in value]
    return logs.redact(None, "", {"value": value})["value"] if isinstance(value, str) else value


def _brief(stream: Stream) -> Mapping[str, Any]:
    return _masked(_view(stream))


def _detail(stream: Stream) -> Mapping[str, Any]:
    """Everything that is counted; what is only known at the end is not there yet."""
    figures, start = stream.figures(), stream.session.start
    line = {key: value for key, value in figures.line().items() if key not in ("reason", "lost_samples")}
    more = {
        "stream_id": start.stream_id if start is not None else None,
        "account_id": start.account_id if start is not None else None,
        "direction": start.direction if start is not None else None,
        "media_format": str(start.media_format) if start is not None and start.media_format is not None else None,
        "accepts": start.accepts if start is not None else (),
        "pending_checkpoints": figures.pending,
        "held_samples": figures.held,
        "service_losses": dict(figures.link.losses) if figures.link is not None else {},
    }
    return _masked({**_view(stream), **more, **line})


def _view(stream: Stream) -> dict[str, Any]:
    figures, session = stream.figures(), stream.session
    start, link = session.start, figures.link
    return {
        "session": stream.session_id,
        "provider": stream.provider,
        "kind": stream.kind,
        "state": "ending" if session.over else "live" if figures.entered else "starting",
        "call_id": start.call_id if start is not None else None,
        "caller": start.caller if start is not None else None,
        "called": start.called if start is not None else None,
        "route": stream.route,
        "service": link.service if link is not None else None,
        "link": link.state if link is not None else None,
        "lag_ms": round(link.lag_ms) if link is not None else 0,
        "duration_secs": round(figures.duration_secs, 1),
        "frames_in": figures.frames_in,
        "frames_out": figures.frames_out,
        "gap_ms": figures.gap_ms,
        "queued_ms": figures.queued_ms,
        "ahead_ms": round(figures.ahead_ms),
        "listeners": figures.line()["listeners"],
        "checkpoints": dict(figures.outcomes),
    }


def _masked(call: dict[str, Any]) -> Mapping[str, Any]:
    return logs.redact(None, "", call)


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value) + b"\n", status=status, content_type="application/json")
