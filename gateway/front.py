"""The operators' listener of a supervisor: what its workers know, as if they were one process."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from gateway import __version__
from gateway.admin import Operators, Trouble, redacted
from gateway.errors import ConfigError
from gateway.metrics import Merged, Sums, join_processes, process_figures
from gateway.settings import Settings
from gateway.supervisor import UNREACHABLE, Hand, Supervisor

FORWARD_SECS = 30.0
"""What a worker may take to answer: a carrier's API is asked meanwhile, or a file taken."""

PASSED_ON = ("Content-Type", "Accept")


class Front(Operators):
    """A supervisor's."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor.settings.admin or "127.0.0.1:0")
        self._supervisor = supervisor

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._supervisor.settings

    def count_refusal(self) -> None:
        """See `Operators`."""
        self._supervisor.departed.count("telephony_auth_failures", "admin", "token")

    def _routes(self, app: web.Application) -> None:
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/version", self._version)
        app.router.add_get("/config", self._config)
        app.router.add_get("/calls", self._calls)
        app.router.add_post("/calls", self._place)
        app.router.add_route("*", "/calls/{session}", self._call)
        app.router.add_route("*", "/calls/{session}/{rest:.+}", self._call)
        app.router.add_post("/drain", self._drain)
        app.router.add_post("/reload", self._reload)
        app.router.add_post("/replace", self._replace)

    # --- health ---

    async def _ready(self, _: web.Request) -> web.Response:
        """Ready if one worker is; why the others are not is told in any case."""
        if self._supervisor.draining:
            detail = "the gateway is ending its calls and takes no new ones"
            return _json({"ready": False, "reasons": [{"reason": "draining", "detail": detail}]}, 503)
        hands = self._supervisor.ready
        answers = await asyncio.gather(*(self._ask(hand, "/readyz") for hand in hands))
        reasons = [{"worker": hand.slot, **each} for hand, answer in answers_of(hands, answers) for each in answer["reasons"]]
        ready = any(answer is not None and answer["ready"] for answer in answers)
        for slot in self._supervisor.slots:
            if slot.hand is None or not slot.hand.ready:
                reasons.append({"worker": slot.number, "reason": "starting", "detail": "a worker is on its way"})
        return _json({"ready": ready, "reasons": reasons}, 200 if ready else 503)

    async def _version(self, _: web.Request) -> web.Response:
        uptime = asyncio.get_running_loop().time() - self._began
        workers = [{"slot": hand.slot, "pid": hand.pid, "leaving": hand.leaving} for hand in self._supervisor.hands]
        about = {"version": __version__, "python": platform.python_version(), "uptime_secs": round(uptime, 1)}
        return _json({**about, "pid": os.getpid(), "workers": workers})

    async def _scrape(self, request: web.Request) -> web.Response:
        """The sum of all workers, and of those that have died what they had counted when they were asked last."""
        supervisor = self._supervisor
        hands = supervisor.hands
        answered = await asyncio.gather(*(hand.look() for hand in hands))
        # Whoever died meanwhile is among the departed; nothing is awaited from here on.
        sums = Sums()
        sums.merge(supervisor.departed, gauges=False)
        process = process_figures()
        join_processes(process, supervisor.departed_process)
        for hand, fresh in zip(hands, answered, strict=True):
            if hand.seen is not None and not hand.gone.is_set():
                sums.merge(Sums.unpack(hand.seen), gauges=fresh)
                join_processes(process, hand.seen.process)
        for hand in supervisor.hands:
            sums.raise_("telephony_workers", "leaving" if hand.leaving else "live" if hand.ready else "starting", by=1)
        sums.gauges["telephony_draining"][()] = float(supervisor.draining)
        body, content_type = Merged(sums, process).text(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _config(self, _: web.Request) -> web.Response:
        return _json(redacted(self.settings))

    # --- calls ---

    async def _calls(self, _: web.Request) -> web.Response:
        hands = self._supervisor.hands
        answers = await asyncio.gather(*(self._ask(hand, "/calls") for hand in hands))
        calls = [{**call, "worker": hand.slot} for hand, answer in answers_of(hands, answers) for call in answer["calls"]]
        return _json({"count": len(calls), "calls": calls})

    async def _place(self, request: web.Request) -> web.StreamResponse:
        hands = self._supervisor.ready
        if self._supervisor.draining or not hands:
            raise Trouble(503, "no new calls at the moment: the gateway is draining, or its workers are not ready")
        return await self._forward(request, hands[0])

    async def _call(self, request: web.Request) -> web.StreamResponse:
        """The worker that has the call answers."""
        hands = self._supervisor.hands
        path = f"/calls/{request.match_info['session']}"
        answers = await asyncio.gather(*(self._ask(hand, path) for hand in hands))
        for hand, answer in answers_of(hands, answers):
            if "error" not in answer:
                return await self._forward(request, hand)
        raise Trouble(404, "no live call has such a session id; GET /calls lists them")

    async def _ask(self, hand: Hand, path: str) -> Any:
        try:
            return await hand.ask(path)
        except UNREACHABLE:
            return None

    async def _forward(self, request: web.Request, hand: Hand) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        if "Content-Length" in request.headers:
            headers["Content-Length"] = request.headers["Content-Length"]
        body = request.content if request.body_exists else None
        try:
            async with (
                asyncio.timeout(FORWARD_SECS),
                hand.session() as http,
                http.request(request.method, f"http://worker{request.rel_url.raw_path}", headers=headers, data=body) as response,
            ):
                answer = await response.read()
                kept = {name: response.headers[name] for name in ("Content-Type", "Allow") if name in response.headers}
                return web.Response(body=answer, status=response.status, headers=kept)
        except (aiohttp.ClientError, OSError):
            raise Trouble(502, "the worker that has this call does not answer; it may have ended just now") from None
        except TimeoutError:
            raise Trouble(504, "the worker that has this call did not answer in time") from None

    # --- the processes ---

    async def _drain(self, _: web.Request) -> web.Response:
        self._log.info("operator_command", action="drain")
        self._supervisor.drain()
        return _json({"asked": "drain"}, 202)

    async def _reload(self, _: web.Request) -> web.Response:
        self._log.info("operator_command", action="reload")
        try:
            result = await self._supervisor.reload()
        except ConfigError as error:
            raise Trouble(422, str(error)) from None
        return _json({"asked": "reload", "result": result}, 202)

    async def _replace(self, _: web.Request) -> web.Response:
        """Answers once every worker has a successor; what the old ones have goes on."""
        self._log.info("operator_command", action="replace")
        try:
            replaced = await self._supervisor.replace()
        except ConfigError as error:
            raise Trouble(422, str(error)) from None
        if not replaced:
            raise Trouble(503, "not all workers could be replaced; the log says why, and the old ones go on")
        return _json({"asked": "replace"}, 202)


def answers_of(hands: list[Hand], answers: list[Any]) -> list[tuple[Hand, Mapping[str, Any]]]:
    """Those that have answered, with what."""
    return [(hand, answer) for hand, answer in zip(hands, answers, strict=True) if answer is not None]


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value) + b"\n", status=status, content_type="application/json")
