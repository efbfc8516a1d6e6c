"""O6: the limit of file descriptors, and what happens at it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from gateway import config, host
from gateway.host import Meter
from gateway.settings import Settings
from tests.conftest import Launch
from tests.doubles import Refused, TwilioMedia
from tests.test_end_to_end import MULAW, played
from tests.test_metrics import scrape


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, *, refuse: bool = False) -> list[tuple[int, int]]:
    done: list[tuple[int, int]] = []

    def raise_it(_: int, to: tuple[int, int]) -> None:
        if refuse:
            raise OSError(22, "Invalid argument")
        done.append(to)

    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", raise_it)
    return done


def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    done = limits(monkeypatch, 1024, 65536)
    assert 65536 == host.raise_fd_limit(500, structlog.get_logger())
    assert [(65536, 65536)] == done
    assert [] == log


def test_a_limit_that_is_too_low_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    limits(monkeypatch, 1024, 1024)
    assert 1024 == host.raise_fd_limit(500, structlog.get_logger())
    (warning,) = log
    assert ("fd_limit_low", 1024, 1750) == (warning["event"], warning["limit"], warning["needed"])
    assert "max_calls to 280" in warning["hint"]
    log.clear()
    host.raise_fd_limit(280, structlog.get_logger())
    assert [] == log


def test_a_system_that_does_not_let_it_be_raised(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    limits(monkeypatch, 256, 65536, refuse=True)
    assert 256 == host.raise_fd_limit(10, structlog.get_logger())
    assert ["fd_limit_not_raised"] == [entry["event"] for entry in log]


async def test_o6_calls_go_on_when_descriptors_run_out(tmp_path: Path) -> None:
    config, errors = tmp_path / "gateway.yaml", tmp_path / "log"
    config.write_text(
        'listen: "127.0.0.1:0"\nmax_calls: 40\nmax_pending_per_address: 1000\n'
        "providers: {twilio: {kind: twilio_media_streams, auth: none}}\n"
        "services: {echo: {kind: echo}}\nroutes: [{service: echo}]\n"
    )
    script = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); from gateway.cli import main; main()"
    with errors.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, "serve", "--config", config), stderr=file, env={**os.environ, "NO_COLOR": "1"}
        )
    try:
        while (port := listening(errors)) is None:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)
        idle: list[socket.socket] = []
        async with TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream") as call:
            await call.speak(MULAW[:800])
            for _ in range(300):
                one = socket.socket()
                one.setblocking(False)
                with suppress(BlockingIOError):
                    one.connect(("127.0.0.1", port))
                idle.append(one)
            await call.speak(MULAW[800:8000])
            await asyncio.sleep(0.3)
            assert MULAW[:8000] == played(call)
            for one in idle:
                one.close()
            async with asyncio.timeout(4):
                while True:  # those before it in the queue have to be found gone first
                    with suppress(Refused):
                        async with TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream", seed=2) as next_call:
                            await next_call.speak(MULAW[:800])
                            await next_call.hangup()
                        break
                    await asyncio.sleep(0.1)
            await call.hangup()
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
    assert 0 == process.returncode
    lines = errors.read_text().splitlines()
    assert len(lines) < 100
    assert "Traceback" not in "".join(lines)


def listening(errors: Path) -> int | None:
    """The port, once the log tells it."""
    entries = [json.loads(line) for line in errors.read_text().splitlines()]
    return next((int(entry["address"].rpartition(":")[2]) for entry in entries if entry["event"] == "listening"), None)


# --- O1, O11: what is used of the host ---


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Meter]:
    """`tree(path=text, …)` writes files as the kernel shows them; the meter reads those."""

    def write(**files: str) -> Meter:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Meter(tmp_path)

    return write


def limits_of(**options: Any) -> Settings:
    document = {"providers": {"t": {"kind": "twilio_media_streams", "auth": "none"}}, "services": {"echo": {"kind": "echo"}}}
    return config.parse(json.dumps(document | {"routes": [{"service": "echo"}], **options}))


def reasons(meter: Meter, **options: Any) -> dict[str, str]:
    return dict(meter.over(limits_of(**options)))


MEMINFO = "MemTotal:       1000 kB\nMemFree:         50 kB\nMemAvailable:    200 kB\n"
GROUP = "sys/fs/cgroup/pod/box/memory"


def test_memory_is_that_of_the_tightest_limit_without_what_the_kernel_can_take_back(tree: Callable[..., Meter]) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/pod/box\n", f"{GROUP}.max": "max\n"}
    files |= {f"{GROUP}.current": "900\n", f"{GROUP}.stat": "anon 700\nactive_file 60\ninactive_file 40\n"}
    meter = tree(**files)
    meter.look(0, 0)
    assert {"memory": 0.8} == meter.used, "no limit: the host's"
    meter = tree(**{f"{GROUP}.max": "1000\n"})
    meter.look(0, 0)
    assert {"memory": 0.8} == meter.used
    assert {} == reasons(meter)
    assert {"memory": "memory: 80% used (max_memory_percent: 80)"} == reasons(meter, max_memory_percent=80)
    parent = "sys/fs/cgroup/pod/memory"
    meter = tree(**{f"{parent}.max": "1000\n", f"{parent}.current": "960\n"})
    meter.look(0, 0)
    assert {"memory": "memory: 96% used (max_memory_percent: 85)"} == reasons(meter)
    assert {} == reasons(meter, max_memory_percent=100)


def test_memory_in_a_container_and_of_the_old_kind_of_groups(tree: Callable[..., Meter]) -> None:
    meter = tree(**{"proc/self/cgroup": "0::/../../elsewhere\n", "sys/fs/cgroup/memory.max": "200"})
    meter = tree(**{"sys/fs/cgroup/memory.current": "100"})
    meter.look(0, 0)
    assert {"memory": 0.5} == meter.used
    old = "sys/fs/cgroup/memory/memory"
    meter = tree(**{"proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n9:memory:/docker/1\n", f"{old}.limit_in_bytes": "400"})
    meter = tree(**{f"{old}.usage_in_bytes": "400", f"{old}.stat": "total_inactive_file 100\n"})
    meter.look(0, 0)
    assert {"memory": 0.75} == meter.used
    meter = tree(**{f"{old}.limit_in_bytes": "9223372036854771712", "proc/meminfo": MEMINFO})
    meter.look(0, 0)
    assert {"memory": 0.8} == meter.used


def test_processors_and_bandwidth_are_means_of_five_seconds(tree: Callable[..., Meter]) -> None:
    net = "Inter-| Receive\n face |bytes\n    lo: 9 9 9 9 9 9 9 9 {lo} 9\n  eth0: 9 9 9 9 9 9 9 9 {eth} 9\n"
    kept = tree()
    for at in range(12):
        tree(**{"proc/stat": f"cpu {100 * at} {50 * at} {20 * at} {100 * at} {10 * at} 0 10 0 0 0\ncpu0 1 1\n"})
        tree(**{"proc/net/dev": net.format(lo=10**9 * at, eth=1_250_000 * at)})
        kept.look(at, 0.97 * at)
        if at < 5:
            assert {} == kept.used, "not known yet"
    assert pytest.approx({"cpu": 0.97, "host_cpu": 120 / 280}) == kept.used, "low priority and waiting are not busy"
    assert 10.0 == kept.egress_mbit
    assert {"cpu": "this process's processor: 97% used (max_cpu_percent: 95)"} == reasons(kept)
    assert {"cpu", "host_cpu"} == {*reasons(kept, max_host_cpu_percent=42)}
    assert {"egress": "10.0 Mbit/s leave this host (max_egress_mbit: 10)"} == reasons(
        kept, max_cpu_percent=98, max_egress_mbit=10
    )
    for at in range(12, 20):  # it is quiet again
        kept.look(at, 11.0)
    assert 0.0 == kept.used["cpu"]
    assert {} == reasons(kept, max_egress_mbit=1)


def test_a_quota_is_what_there_is_of_processors(tree: Callable[..., Meter]) -> None:
    files = {"proc/self/cgroup": "0::/box\n", "proc/stat": "cpu 1 1 1 1 1 1 1 1\n", "sys/fs/cgroup/box/cpu.max": "50000 100000\n"}
    kept = tree(**files)
    for at in range(7):
        tree(**{"sys/fs/cgroup/box/cpu.stat": f"usage_usec {400_000 * at}\nnr_periods 0\n"})
        kept.look(at, 0)
    assert pytest.approx(0.8) == kept.used["host_cpu"]


@pytest.mark.parametrize("rubbish", ["", "x", "0::", "::::\n\0", "cpu\ncpu x", "max 0", "1 0", "MemTotal: x kB", "-1"])
def test_what_cannot_be_known_refuses_nobody(tree: Callable[..., Meter], rubbish: str) -> None:
    names = ("proc/meminfo", "proc/stat", "proc/self/cgroup", "proc/net/dev")
    names += tuple(f"sys/fs/cgroup/{name}" for name in ("memory.max", "memory.current", "memory.stat", "cpu.max", "cpu.stat"))
    meter = tree(**dict.fromkeys(names, rubbish))
    for at in range(8):
        meter.look(at, 0)
    assert {} == reasons(meter, max_host_cpu_percent=1, max_memory_percent=1, max_egress_mbit=0.001)
    nowhere = Meter(Path("/nowhere"))
    for at in range(8):
        nowhere.look(at, 8 * at)
    assert {"cpu": 8.0} == nowhere.used


def test_this_machine_is_read() -> None:
    meter = Meter()
    for at in range(6):
        meter.look(at, at * 0.5)
    assert 0.5 == meter.used["cpu"]
    if Path("/proc/meminfo").exists():
        assert 0 < meter.used["memory"] < 1


async def test_o1_new_calls_hear_overflow_while_something_is_short(launch: Launch) -> None:
    server = await launch(admin="127.0.0.1:0", max_memory_percent=90)
    assert server.admin is not None
    async with aiohttp.ClientSession() as http:

        async def asks(call_id: str) -> bool:
            answer = await http.post(f"http://127.0.0.1:{server.port}/twilio/answer", data={"CallSid": call_id})
            return "<Stream" in await answer.text()

        async def ready() -> list[dict[str, str]]:
            assert server.admin is not None
            answer = await http.get(f"http://127.0.0.1:{server.admin.port}/readyz")
            found: list[dict[str, str]] = (await answer.json())["reasons"]
            assert answer.status == (503 if found else 200)
            return found

        async with TwilioMedia(f"ws://127.0.0.1:{server.port}/twilio/stream") as call:
            await call.speak(MULAW[:800])
            assert await asks("CA" + "1" * 32)
            server.watchdog.meter.look = lambda *_: None  # type: ignore[method-assign]
            server.watchdog.meter.used = {"cpu": 0.5, "memory": 0.91}
            assert not await asks("CA" + "2" * 32)
            assert await asks(call.call_sid), "a call that it has may have another stream"
            assert [{"reason": "memory", "detail": "memory: 91% used (max_memory_percent: 90)"}] == await ready()
            now = await scrape(server)
            assert 1 == now["telephony_refusals_total", "twilio", "memory"]
            assert 0.91 == now["telephony_load_ratio", "memory"]
            server.watchdog.meter.used = {"memory": 0.8}
            assert await asks("CA" + "3" * 32)
            assert [] == await ready()
            await call.hangup()


async def test_the_watchdog_looks_by_itself(launch: Launch) -> None:
    server = await launch(admin="127.0.0.1:0")
    async with asyncio.timeout(5):
        while not server.watchdog.meter._looks:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)
    assert server.watchdog.meter._looks[0].spent > 0
