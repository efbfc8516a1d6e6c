"""What systemd is told: by a socket of ours in its place."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.systemd import Systemd
from tests.test_reload import OPEN


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket and what NOTIFY_SOCKET says of it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@telephony-gateway-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address.replace("@", "\0"))
        listening.setblocking(False)
        yield listening, address


async def told(listening: socket.socket) -> str:
    async with asyncio.timeout(20):
        return (await asyncio.get_running_loop().sock_recv(listening, 1000)).decode()


async def test_systemd_is_told_of_the_life_of_a_process(supervisor: tuple[socket.socket, str]) -> None:
    listening, address = supervisor
    systemd = Systemd({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000"})
    systemd.ready()
    assert "READY=1" == await told(listening)
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(systemd.watch(lambda: "all well"))
        began = asyncio.get_running_loop().time()
        for _ in range(4):
            assert "WATCHDOG=1\nSTATUS=all well" == await told(listening)
        assert 0.05 < asyncio.get_running_loop().time() - began < 0.6
        watching.cancel()
    systemd.stopping()
    assert "STOPPING=1" == await told(listening)
    systemd.stopping(2.5)
    assert "STOPPING=1\nEXTEND_TIMEOUT_USEC=2500000" == await told(listening)


@pytest.mark.parametrize(
    ("environ", "secs"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "30000000"}, 30),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
    ],
)
def test_the_watchdogs_patience_is_read_where_it_is_meant_for_us(environ: dict[str, str], secs: float) -> None:
    assert secs == Systemd(environ).watchdog_secs


async def test_elsewhere_nothing_is_told_and_nothing_fails(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": str(tmp_path / "nobody")}, {"NOTIFY_SOCKET": "@nobody-listens-here"}):
        systemd = Systemd(environ)
        systemd.ready()
        systemd.stopping()
    await Systemd({}).watch(lambda: "never asked")


@pytest.mark.parametrize(("workers", "status"), [("1", "0 live calls"), ("2", "2 of 2 workers, 0 live calls")])
async def test_serve_tells_when_it_is_ready_and_when_it_stops(
    supervisor: tuple[socket.socket, str], tmp_path: Path, workers: str, status: str
) -> None:
    listening, address = supervisor
    path = tmp_path / "gateway.yaml"
    path.write_text(OPEN + "listen: 127.0.0.1:0\n")
    environ = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"}
    environ.pop("WATCHDOG_PID", None)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "serve", "--workers", workers, "--config", str(path)),
        stderr=asyncio.subprocess.DEVNULL,
        env=environ,
    )
    try:
        assert "READY=1" == await told(listening)
        assert f"WATCHDOG=1\nSTATUS={status}" == await told(listening)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
    secs = 40 if workers == "1" else 50
    assert f"STOPPING=1\nEXTEND_TIMEOUT_USEC={secs}000000" == await told(listening), "drain_secs, and time to end"
