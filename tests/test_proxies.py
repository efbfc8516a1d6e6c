"""The example files for HAProxy and nginx, run by the real programs: a signed call passes, the doctor is content."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from gateway.ledger import Ledger
from gateway.server import Server
from tests.conftest import Launch
from tests.doubles import Refused, TwilioMedia
from tests.test_doctor import SECRET, TOKEN, bad, document, examine, free_port
from tests.test_drain import Gateway
from tests.test_end_to_end import MULAW, played
from tests.test_security import answer_twilio, until
from tests.test_tls import Files
from tests.test_workers import Held, Traffic, has_calls, wait_for

CONFIG = Path(__file__).parent.parent / "config"
PROXIES = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
    for name in ("haproxy", "nginx")
]


def put_in(text: str, **changes: str) -> str:
    """`text` with each of these once, servers twice, and nothing that is not there."""
    for old, new in changes.items():
        assert (2 if re.search(r":8080\b", old) else 1) == text.count(old), f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def command(name: str, files: Files, directory: Path, outer: int, inner: int, admin: int) -> list[str]:
    """The example with this machine's addresses and files in it, and how to run it."""
    pair = {"127.0.0.1:8080": f"127.0.0.1:{inner}"}
    path = directory / f"{name}.conf"
    if name == "haproxy":
        both = directory / "both.pem"
        both.write_bytes(Path(files.tls.certificate).read_bytes() + Path(files.tls.key).read_bytes())
        text = (CONFIG / "haproxy.cfg").read_text()
        pair |= {f"127.0.0.1:{inner} port 9090": f"127.0.0.1:{inner} port {admin}"}
        pair |= {"maxconn 20000": "maxconn 500", ":443": f"127.0.0.1:{outer}", "/etc/haproxy/voice.example.com.pem": str(both)}
        path.write_text(put_in(text, **pair))
        return ["haproxy", "-db", "-f", str(path)]
    (directory / "temporary").mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {directory}/temporary/{kind}; " for kind in kinds)
    pair |= {
        "listen 443": f"listen 127.0.0.1:{outer}",
        "voice.example.com;\n        server_tokens": "localhost;\n        server_tokens",
        "/etc/nginx/voice.example.com/fullchain.pem": files.tls.certificate,
        "/etc/nginx/voice.example.com/privkey.pem": files.tls.key,
        "/var/log/nginx/carriers.log": str(directory / "carriers.log"),
        "worker_rlimit_nofile 40000;": "",
        "worker_connections 20000;": "worker_connections 500;",
        "http {\n": f"http {{ {places}\n",
    }
    path.write_text(put_in((CONFIG / "nginx.conf").read_text(), **pair))
    user = "user root; " if os.geteuid() == 0 else ""
    run = f"{user}daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log;"
    return ["nginx", "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(path), "-g", run]


def rewrite(path: Path, changes: dict[str, str]) -> None:
    path.write_text(put_in(path.read_text(), **changes))


async def run(arguments: list[str], output: Path) -> asyncio.subprocess.Process:
    with output.open("wb") as file:
        return await asyncio.create_subprocess_exec(*arguments, stdout=file, stderr=subprocess.STDOUT)


def told(output: Path) -> str:
    return output.read_text()


@asynccontextmanager
async def proxied(launch: Launch, name: str, files: Files, directory: Path) -> AsyncIterator[tuple[Server, str]]:
    """A gateway behind a proxy, and its public URL."""
    inner, outer, admin = free_port(), free_port(), free_port()
    public = f"https://localhost:{outer}"
    server = await launch(**document(inner, admin=f"127.0.0.1:{admin}", public_url=public, trusted_proxies=["127.0.0.1", "::1"]))
    output = directory / "output"
    process = await run(command(name, files, directory, outer, inner, admin), output)
    try:
        for _ in range(100):
            assert process.returncode is None, told(output)
            try:
                async with aiohttp.ClientSession() as http, http.get(f"{public}/twilio/stream", ssl=files.trust) as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"{name} does not serve: {told(output)}")
        yield server, public
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    found = Files(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(found.trusted))
    return found


@pytest.mark.parametrize("name", PROXIES)
async def test_a_signed_call_passes_and_the_doctor_is_content(launch: Launch, files: Files, tmp_path: Path, name: str) -> None:
    async with proxied(launch, name, files, tmp_path) as (server, public):
        url = await answer_twilio(public, "CA1", ssl_context=files.trust)
        assert url.startswith(f"wss://localhost:{public.rpartition(':')[2]}/twilio/stream/")
        async with TwilioMedia(url, auth_token=TOKEN, call_sid="CA1") as call:
            await call.speak(MULAW[:8000])
            await asyncio.sleep(0.3)
            await call.hangup()
        assert MULAW[:8000] == played(call)
        assert [] == call.violations
        assert [] == bad(await examine(server.settings))


@pytest.mark.parametrize("name", PROXIES)
async def test_t10_the_proxy_tells_the_caller_from_its_own_address(
    launch: Launch, files: Files, tmp_path: Path, name: str
) -> None:
    """Whatever somebody claims: only what the proxy itself has seen counts."""
    async with proxied(launch, name, files, tmp_path) as (server, public):
        seen: list[str] = []
        door = server.house.door
        connect = door.admission.connect
        door.admission.connect = lambda address, now: (seen.append(address), connect(address, now))[1]  # type: ignore[method-assign]
        url = await answer_twilio(public, "CA2", ssl_context=files.trust)
        lies = {"X-Forwarded-For": "203.0.113.7, 127.0.0.1"}
        async with TwilioMedia(url, auth_token=TOKEN, call_sid="CA2", headers=lies) as call:
            await call.hangup()
    assert ["127.0.0.1"] == seen


@pytest.mark.parametrize("name", PROXIES)
async def test_s2_of_two_hosts_the_one_that_has_seen_a_token_gets_it_again(
    launch: Launch, files: Files, tmp_path: Path, name: str
) -> None:
    """A captured upgrade, signature and all, opens nothing where hosts don't know of each other; and both hosts get calls."""
    first, second, outer = free_port(), free_port(), free_port()
    admins = {first: free_port(), second: free_port()}
    public = f"https://localhost:{outer}"
    servers = [
        await launch(**document(port, admin=f"127.0.0.1:{admin}", public_url=public, trusted_proxies=["127.0.0.1"]))
        for port, admin in admins.items()
    ]
    served = [0, 0]
    for number, server in enumerate(servers):
        server.house.door._ledger = Ledger("one host's", directory=tmp_path / f"host{number}")
    arguments = command(name, files, tmp_path, outer, first, admins[first])
    path = next(Path(each) for each in arguments if each.endswith(f"{name}.conf"))
    extra = "server gateway2 10.0.0.12:8080" if name == "haproxy" else "server 10.0.0.12:8080"
    rewrite(path, {f"# {extra}": extra.replace("10.0.0.12:8080", f"127.0.0.1:{second}")})
    if name == "haproxy":
        rewrite(path, {f"127.0.0.1:{second} port 9090": f"127.0.0.1:{second} port {admins[second]}"})
    process = await run(arguments, tmp_path / "output")
    try:
        await listening(outer)
        for number in range(20):
            url = await answer_twilio(public, f"CA{number}", ssl_context=files.trust)
            async with TwilioMedia(url, auth_token=TOKEN, call_sid=f"CA{number}") as call:
                await until(lambda: any(server.streams for server in servers))
                served[0 if servers[0].streams else 1] += 1
                await call.hangup()
            for again in (url, url, f"{url}/", f"{url}?x", url.replace("/stream/", "//stream/")):
                with pytest.raises(Refused):
                    async with TwilioMedia(again, auth_token=TOKEN, public_url=url, call_sid=f"CA{number}"):
                        pass
        assert all(served), served
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
async def test_a_dead_gateway_gets_no_calls(launch: Launch, files: Files, tmp_path: Path) -> None:
    """Two gateways with one secret: the webhook on one, the stream on the other; one of them gone, all on the other."""
    first, second, outer = free_port(), free_port(), free_port()
    admins = [free_port(), free_port()]
    public = f"https://localhost:{outer}"
    servers = [
        await launch(**document(port, admin=f"127.0.0.1:{admin}", public_url=public, trusted_proxies=["127.0.0.1"]))
        for port, admin in zip((first, second), admins, strict=True)
    ]
    arguments = command("haproxy", files, tmp_path, outer, first, admins[0])
    rewrite(
        Path(arguments[-1]),
        {
            "# server gateway2 10.0.0.12:8080": f"server gateway2 127.0.0.1:{second}",
            f"127.0.0.1:{second} port 9090": f"127.0.0.1:{second} port {admins[1]}",
            "inter 1s": "inter 100ms",
        },
    )
    process = await run(arguments, tmp_path / "output")
    try:
        await listening(outer)
        for number in range(4):
            url = await answer_twilio(public, f"CA{number}", ssl_context=files.trust)
            async with TwilioMedia(url, auth_token=TOKEN, call_sid=f"CA{number}") as call:
                await call.speak(MULAW[:320])
                await call.hangup()
            assert 1000 == call.close_code
        await servers[0].stop()
        await asyncio.sleep(0.5)
        for number in range(4, 8):
            url = await answer_twilio(public, f"CA{number}", ssl_context=files.trust)
            async with TwilioMedia(url, auth_token=TOKEN, call_sid=f"CA{number}") as call:
                await call.hangup()
            assert 1000 == call.close_code
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
async def test_a_gateway_is_drained_and_replaced_in_mid_traffic(files: Files, tmp_path: Path) -> None:
    """Not ready, it gets no new calls; its own go on through the proxy, and it ends with them. Its successor gets calls again.

    A call that comes in the moment before the proxy has seen it hears `overflow`: that is counted, and refuses no handshake.
    """
    outer = free_port()
    common = {
        "public_url": f"https://localhost:{outer}", "secret": SECRET, "trusted_proxies": ["127.0.0.1"], "drain_secs": 3600,
        "max_pending_per_address": 1000,
    }  # fmt: skip
    gateways = [Gateway(tmp_path / f"gateway{number}.json", ("--workers", "1"), **common) for number in (1, 2)]
    for gateway in gateways:
        await gateway.start()
    arguments = command("haproxy", files, tmp_path, outer, gateways[0].port, gateways[0].admin)
    second = f"127.0.0.1:{gateways[1].port}"
    changes = {"# server gateway2 10.0.0.12:8080": f"server gateway2 {second}", "inter 1s": "inter 300ms"}
    rewrite(Path(arguments[-1]), changes | {f"{second} port 9090": f"{second} port {gateways[1].admin}"})
    process = await run(arguments, tmp_path / "output")
    try:
        await listening(outer)
        async with asyncio.TaskGroup() as tasks:
            held = [Held(outer, number, ssl=files.trust) for number in range(6)]
            for call in held:
                await call.place(tasks)
            await wait_for(lambda: has_calls(gateways[0], 3))  # the fewest connections: in turns
            assert await has_calls(gateways[1], 3)
            traffic = Traffic(outer, at_once=4, ssl=files.trust)
            passing = tasks.create_task(traffic.run(1))
            await asyncio.sleep(0.5)
            gateways[0].process.send_signal(signal.SIGTERM)
            await asyncio.sleep(2.0)
            before = traffic.calls
            await asyncio.sleep(1.0)
            assert traffic.calls > before, "the other one takes them"
            assert gateways[0].process.returncode is None, "its calls go on"
            assert [False] * 6 == [call.dropped for call in held]
            mine = {each["call_id"] for each in (await gateways[0].ask("/calls"))[1]["calls"]}
            assert 3 == len(mine), f"no new ones: {mine}"
            for call in held:
                if call.call_sid in mine:
                    call.hang_up()
            assert 0 == await gateways[0].ended()
            assert 3 == sum(call.dropped is False for call in held if call.call_sid not in mine)
            await gateways[0].start()
            await asyncio.sleep(2.0)
            for call in held:
                if call.call_sid not in mine:
                    call.hang_up()
            traffic.enough()
            await passing
        answered = [entry for entry in gateways[0].events() if entry["event"] in ("listening", "call_answered")]
        again = len(answered) - 1 - [entry["event"] for entry in answered][::-1].index("listening")
        assert len(answered) > again + 1, "the successor gets calls"
        assert {} == traffic.wrong
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        for gateway in gateways:
            with suppress(ProcessLookupError):
                gateway.process.kill()
            await gateway.process.wait()


async def listening(port: int) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        await asyncio.sleep(0.05)
    raise AssertionError(f"nobody listens on {port}")
