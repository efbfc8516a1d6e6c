"""Reloads under live calls: checked whole, taken whole for new calls, never felt by calls that were answered before."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from gateway import config
from gateway.cli import make_server
from gateway.errors import ConfigError
from gateway.reload import APPLIED, Reload, merge
from gateway.server import Server
from gateway.settings import Settings
from tests.doubles import RecordingService, TwilioMedia
from tests.doubles.service import Link
from tests.test_advice import LONG
from tests.test_config import TEXTS
from tests.test_end_to_end import MULAW, played
from tests.test_tls import Files

FIXED = {"listen", "admin", "admin_token", "public_url", "secret", "log_level", "tracing"}
MULAW_8K = {"encoding": "mulaw", "sample_rate": 8000}


class Gateway:
    """One that runs with a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
            "services": {"echo": {"kind": "echo"}},
            "routes": [{"service": "echo"}],
        }
        self.server: Server
        self.reload: Reload

    async def start(self, **changes: Any) -> None:
        self.write(**changes)
        self.server = make_server(config.load(self.path))
        await self.server.start()
        self.reload = Reload(self.path, self.server)

    def write(self, **changes: Any) -> None:
        self.document |= changes
        self.path.write_text(json.dumps({key: value for key, value in self.document.items() if value is not None}))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.port}{path}"

    async def answer(self, call_sid: str, provider: str = "twilio") -> str:
        """The URL of the stream that the webhook names, or "" if it names none."""
        form = {"CallSid": call_sid, "From": "+15550001", "To": "+15550002"}
        async with aiohttp.ClientSession() as http, http.post(self.url(f"/{provider}/answer"), data=form) as response:
            found = re.search(r'url="([^"]+)"', await response.text())
            return found[1] if found else ""

    async def ask(self, path: str, call_sid: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as http, http.post(self.url(path), data={"CallSid": call_sid}) as response:
            return response.status, await response.text()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    made = Gateway(tmp_path / "gateway.yaml")
    yield made
    await made.server.stop()


def agent(service: RecordingService) -> dict[str, Any]:
    return {"kind": "websocket", "url": service.url, "media_format": MULAW_8K}


def sid(number: int) -> str:
    return f"CA{number:032x}"


async def call_of(service: RecordingService, call_sid: str) -> Link:
    async with asyncio.timeout(3):
        while True:
            for link in service.links:
                if any(text.get("call_id") == call_sid for text in link.texts("start")):
                    return link
            await asyncio.sleep(0.005)


# --- under traffic --------------------------------------------------------------------------------------------------------


async def test_o13_fifty_reloads_under_traffic_and_a_live_call_goes_on_bit_exact(gateway: Gateway, log: list[Any]) -> None:
    """Each new call goes to the service of the newest good file; the live one never notices, not even that its route is gone."""
    async with RecordingService() as first, RecordingService() as second:
        services = [first, second]
        await gateway.start(services={"agent": agent(first)}, routes=[{"service": "agent"}])
        live = TwilioMedia(await gateway.answer(sid(1)), call_sid=sid(1))
        wrong = []
        async with live:
            link = await call_of(first, sid(1))

            async def reload() -> None:
                for number in range(50):
                    good = services[number % 2]
                    gateway.write(services={f"agent{number}": agent(good)}, routes=[{"service": f"agent{number}"}])
                    await gateway.reload()
                    gateway.path.write_text("routes: [" if number % 3 else gateway.path.read_text().replace("kind", "knid"))
                    with pytest.raises(ConfigError):
                        await gateway.reload()
                    call_sid = sid(100 + number)
                    async with TwilioMedia(await gateway.answer(call_sid), call_sid=call_sid) as call:
                        await call_of(good, call_sid)
                        await call.speak(MULAW[:320])
                        await call.hangup()
                    wrong.extend(call.violations)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(reload())
                tasks.create_task(live.speak(MULAW))
                tasks.create_task(link.send_audio(MULAW))
            await link.send(type="checkpoint", name="end")
            done = await link.wait_for("checkpoint")
            await live.hangup()
            await link.wait_for("stop")
    assert [] == wrong + live.violations + first.violations + second.violations
    assert MULAW == link.audio
    assert MULAW == played(live)
    assert "played" == done["outcome"]
    assert {"applied": 50, "refused": 50} == gateway.reload.outcomes
    assert 50 == sum(entry["event"] == "configuration_reloaded" for entry in log)


async def test_a_call_that_was_answered_goes_to_the_service_of_then(gateway: Gateway) -> None:
    """The routes have changed places meanwhile, so its route's label is another one's."""
    async with RecordingService() as first, RecordingService() as second:
        await gateway.start(services={"agent": agent(first)}, routes=[{"service": "agent"}])
        stream_url = await gateway.answer(sid(1))
        gateway.write(services={"agent": agent(second)})
        await gateway.reload()
        for call_sid, url, service in ((sid(1), stream_url, first), (sid(2), await gateway.answer(sid(2)), second)):
            async with TwilioMedia(url, call_sid=call_sid) as call:
                await call_of(service, call_sid)
                await call.hangup()


async def test_a_call_goes_by_what_its_webhook_was_answered_by(gateway: Gateway) -> None:
    """Its stream, and what its carrier asks at its end, although provider, route and service are gone by then."""
    async with RecordingService() as service:
        provider = {"kind": "twilio_media_streams", "auth": "none", "after": "<Say>bye</Say>"}
        await gateway.start(providers={"old": provider}, services={"agent": agent(service)}, routes=[{"service": "agent"}])
        stream_url = await gateway.answer(sid(1), "old")
        gateway.write(
            providers={"new": gateway.document["providers"]["old"]},
            services={"echo": {"kind": "echo"}},
            routes=[{"service": "echo"}],
        )
        await gateway.reload()
        async with TwilioMedia(stream_url, call_sid=sid(1)) as call:
            link = await call_of(service, sid(1))
            await call.speak(MULAW[:1600])
            await call.hangup()
            await link.wait_for("stop")
    assert MULAW[:1600] == link.audio
    assert [] == call.violations
    assert (200, True) == ((asked := await gateway.ask("/old/action", sid(1)))[0], "<Say>bye</Say>" in asked[1])
    assert "" == await gateway.answer(sid(2), "old")
    assert await gateway.answer(sid(2), "new")
    async with aiohttp.ClientSession() as http:
        for path in ("/old/answer", "/nobody/action"):
            async with http.post(gateway.url(path), data={"CallSid": sid(3)}) as response:
                assert 404 == response.status
        for path in ("/old/stream", "/nobody/stream"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await http.ws_connect(gateway.url(path))
            assert 404 == caught.value.status


async def test_a_file_that_is_written_while_it_is_read_is_taken_whole_or_not_at_all(gateway: Gateway) -> None:
    await gateway.start()
    states = [{"services": {name: {"kind": "echo"}}, "routes": [{"service": name}]} for name in ("one", "two")]

    async def write() -> None:
        for number in range(40):
            gateway.write(**states[number % 2])
            await asyncio.sleep(0.001)

    async def reload() -> None:
        for _ in range(20):
            try:
                await gateway.reload()
            except ConfigError:
                continue
            (name,) = gateway.server.settings.services
            assert [(name,)] == [route.service for route in gateway.server.settings.routes]

    async with asyncio.TaskGroup() as tasks:
        for task in (write, reload, reload):
            tasks.create_task(task())


async def test_limits_count_for_new_calls(gateway: Gateway) -> None:
    await gateway.start(max_calls=2)
    async with TwilioMedia(await gateway.answer(sid(1)), call_sid=sid(1)) as first:
        async with TwilioMedia(await gateway.answer(sid(2)), call_sid=sid(2)):
            gateway.write(max_calls=1)
            await gateway.reload()
            assert "" == await gateway.answer(sid(3))
            assert 2 == len(gateway.server.streams)
            gateway.write(max_calls=3)
            await gateway.reload()
            assert await gateway.answer(sid(3))
        await first.speak(MULAW[:800])
        await asyncio.sleep(0.1)
        await first.hangup()
    assert 800 == len(played(first))


# --- what is refused, what is kept ------------------------------------------------------------------------------------------


async def test_o13_a_broken_file_changes_nothing_and_every_finding_is_logged(gateway: Gateway, log: list[Any]) -> None:
    await gateway.start()
    settings, loaded, house = gateway.server.settings, gateway.server.providers, gateway.server.house
    assert len(TEXTS) > 100
    for text in TEXTS:
        log.clear()
        gateway.path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError) as caught:
            await gateway.reload()
        told = [entry["problem"] for entry in log if entry["event"] == "configuration_refused"]
        assert str(caught.value).splitlines() == told
        assert len(told) == len(log)
    gateway.path.unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        await gateway.reload()
    assert (settings, loaded, house) == (gateway.server.settings, gateway.server.providers, gateway.server.house)
    assert gateway.server.settings is settings
    assert gateway.server.providers is loaded
    assert gateway.server.house is house
    assert {"refused": len(TEXTS) + 1} == gateway.reload.outcomes


def damaged(text: str, random: Random) -> str:
    """One small accident of an editor's."""
    lines = text.splitlines()
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(6):
        case 0:
            lines[at], lines[other] = lines[other], lines[at]
        case 1:
            del lines[at : at + random.randrange(1, 4)]
        case 2:
            lines.insert(at, lines[other])
        case 3:
            lines[at] = random.choice(["  ", "\t", "- ", "? ", "&a ", "!x "]) + lines[at]
        case 4:
            place = random.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + random.choice([*":{}[]'\"#*&|>%@,-0x", "\0", "\u2028", "${"]) + lines[at][place:]
        case _:
            place = random.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + lines[at][place + random.randrange(1, 9) :]
    return "\n".join(lines)


async def test_o13_five_hundred_damaged_files_are_taken_whole_or_not_at_all(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    for name in ("GATEWAY_SECRET", "TWILIO_AUTH_TOKEN", "PLIVO_AUTH_TOKEN", "AGENT_TOKEN"):
        monkeypatch.setenv(name, LONG)
    text = (Path(__file__).parent.parent / "config" / "examples" / "plivo-and-twilio.yaml").read_text()
    text = text.replace("0.0.0.0:8080", "127.0.0.1:0")
    gateway.path.write_text(text)
    gateway.server = make_server(config.load(gateway.path))
    await gateway.server.start()
    gateway.reload = Reload(gateway.path, gateway.server)
    random = Random(13)
    server = gateway.server
    for _ in range(500):
        before = server.settings, server.providers, server.house
        gateway.path.write_text(damaged(text, random), encoding="utf-8")
        said = ""
        try:
            await gateway.reload()
        except ConfigError as error:
            said = str(error)
        if said:
            assert all(held is now for held, now in zip(before, (server.settings, server.providers, server.house), strict=True))
            assert LONG not in said
        else:
            new, _ = merge(before[0], config.load(gateway.path))
            assert (new, [*new.providers]) == (server.settings, [*server.providers])
            assert server.settings is server.house.settings
    assert 500 == sum(gateway.reload.outcomes.values())
    assert min(gateway.reload.outcomes.values()) > 100


def test_every_key_is_either_applied_or_takes_a_restart() -> None:
    assert {*Settings.__struct_fields__} == APPLIED | FIXED, "say in gateway/reload.py whether new calls go by the new key"
    assert not APPLIED & FIXED


async def test_what_takes_a_restart_is_kept_and_said(gateway: Gateway, log: list[Any]) -> None:
    await gateway.start(secret=LONG)
    gateway.write(
        listen="127.0.0.1:9",
        admin="127.0.0.1:9090",
        admin_token=LONG[::-1],
        log_level="debug",
        public_url="http://localhost:1",
        secret=LONG[::-1],
        tracing={"endpoint": "http://127.0.0.1:9/v1/traces"},
        hold_ms=7,
    )
    done = await gateway.reload()
    assert (sorted(FIXED), ["hold_ms"]) == (sorted(done.kept), done.changed)
    assert ("127.0.0.1:0", LONG, 7) == (
        gateway.server.settings.listen,
        gateway.server.settings.secret,
        gateway.server.settings.hold_ms,
    )
    (kept,) = [entry for entry in log if entry["event"] == "configuration_kept"]
    assert ("warning", sorted(FIXED)) == (kept["log_level"], sorted(kept["keys"]))
    assert LONG not in str(log)
    gateway.write(listen="127.0.0.1:0", admin=None, admin_token=None, log_level=None, public_url=None, secret=LONG, tracing=None)
    again = await gateway.reload()
    assert ([], []) == (again.changed, again.kept)


async def test_warnings_are_logged(gateway: Gateway, log: list[Any]) -> None:
    await gateway.start()
    gateway.write(routes=[{"service": "echo"}, {"service": "echo"}])
    done = await gateway.reload()
    (told,) = [entry["problem"] for entry in log if entry["event"] == "configuration_doubtful"]
    assert [told] == done.warnings
    assert "no call comes this far" in told


BASE = "services: {echo: {kind: echo}}\nroutes: [{service: echo}]\n"
SIGNED = f"providers: {{p: {{kind: twilio_media_streams, auth_token: {LONG}}}}}\n{BASE}"
OPEN = f"providers: {{p: {{kind: twilio_media_streams, auth: none}}}}\n{BASE}"
DOOR = f"secret: {LONG}\npublic_url: https://voice.example.com\n"


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        (SIGNED + DOOR + "listen: 0.0.0.0:80", OPEN, ["`auth: none` on 0.0.0.0:80, which only a restart can change"]),
        (OPEN, SIGNED + DOOR, ["needs `secret`, which only a restart can set", "needs `public_url`, which"]),
    ],
)
def test_new_providers_that_need_a_restart_are_refused(old: str, new: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(config.parse(old), config.parse(new))
    lines = str(caught.value).splitlines()
    assert len(fragments) == len(lines)
    assert all(fragment in line for fragment, line in zip(fragments, lines, strict=True))


# --- certificates -------------------------------------------------------------------------------------------------------------


async def test_other_certificate_files_count_for_new_connections(gateway: Gateway, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = Files(tmp_path / "one"), Files(tmp_path / "two")
    serial = two.renew()
    await gateway.start(tls=one.options)
    before = await one.serial(gateway.server.port)
    gateway.write(tls={"certificate": one.tls.certificate, "key": two.tls.key})
    with pytest.raises(ConfigError, match="does not belong"):
        await gateway.reload()
    assert before == await one.serial(gateway.server.port)
    gateway.write(tls=two.options)
    assert ["tls"] == (await gateway.reload()).changed
    assert serial == await two.serial(gateway.server.port)
    gateway.write(tls=None)
    assert ["tls"] == (await gateway.reload()).kept
    assert serial == await two.serial(gateway.server.port)


# --- by the operators' listener -------------------------------------------------------------------------------------------------


async def test_operators_reload_and_see_what_came_of_it(gateway: Gateway) -> None:
    await gateway.start(admin="127.0.0.1:0")
    gateway.server.hooks.reload, gateway.server.hooks.reloads = gateway.reload, gateway.reload.outcomes
    assert gateway.server.admin is not None
    admin = f"http://127.0.0.1:{gateway.server.admin.port}"
    providers = gateway.document["providers"] | {"second": {"kind": "twilio_media_streams", "auth": "none"}}
    async with aiohttp.ClientSession() as http:

        async def ask(method: str, path: str) -> tuple[int, str]:
            async with http.request(method, admin + path) as response:
                return response.status, await response.text()

        gateway.write(providers=providers)
        status, said = await ask("POST", "/reload")
        assert (202, {"changed": ["providers.second"], "kept": [], "warnings": []}) == (status, json.loads(said)["result"])
        assert "second" in json.loads((await ask("GET", "/config"))[1])["providers"]
        async with TwilioMedia(await gateway.answer(sid(1), "second"), call_sid=sid(1)) as call:
            await call.speak(MULAW[:320])
            assert 'telephony_calls_active{provider="second"} 1.0' in (await ask("GET", "/metrics"))[1]
            await call.hangup()
        gateway.write(hold_ms=-1)
        status, said = await ask("POST", "/reload")
        assert 422 == status
        assert f"{gateway.path}:1:" in said
        assert "hold_ms: out of range" in said


# --- the signal -----------------------------------------------------------------------------------------------------------------


async def test_sighup_reloads_and_a_bad_file_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(OPEN + "listen: 127.0.0.1:0\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "serve", "--workers", "1", "--config", str(path)),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ},
    )
    assert process.stderr is not None

    async def line() -> Any:
        assert process.stderr is not None
        return json.loads(await asyncio.wait_for(process.stderr.readline(), 20))

    try:
        assert "listening" == (await line())["event"]
        for number, (text, event) in enumerate(
            [("hold_ms: 7", "configuration_reloaded"), ("hold_ms: -7", "configuration_refused"), ("", "configuration_reloaded")]
        ):
            path.write_text(OPEN + f"listen: 127.0.0.1:0\n{text}\n")
            process.send_signal(signal.SIGHUP)
            told = await line()
            assert event == told["event"], number
        assert ["hold_ms"] == told["changed"]
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = await asyncio.wait_for(process.stderr.read(), 20), await process.wait()
    assert 0 == process.returncode
    assert ["draining", "stopping"] == [json.loads(each)["event"] for each in rest.splitlines()]
