"""Both ends of ours against the Autobahn test suite, the reference of what a WebSocket must do.

The suite needs Python 2.7, so this runs where it is at hand: AUTOBAHN_PYTHON names one that has it
(`virtualenv -p python2.7 …; pip install autobahntestsuite`). The real listener takes the suite's client, the real dialler its
server; both echo. Left out: 9.x (speed), 12.x and 13.x (compression, which is never agreed to).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest

from gateway import config, direct
from gateway import server as server_module
from gateway.cli import make_server
from gateway.services.dialler import Dialler, Offer, Unreachable
from gateway.settings import WebsocketService
from tests.conftest import Launch
from tests.results import store

PYTHON = os.environ.get("AUTOBAHN_PYTHON", "")
WSTEST = Path(PYTHON).parent / "wstest"
EXCLUDED = ["9.*", "12.*", "13.*"]

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="AUTOBAHN_PYTHON names no Python 2.7 that has autobahntestsuite"),
    pytest.mark.timeout(300),
]

OF_AIOHTTP = {
    **dict.fromkeys(
        ("6.4.1", "6.4.2", "6.4.3", "6.4.4"), "NON-STRICT, close OK"
    ),  # bad UTF-8 is seen at a message's end, no sooner
    "7.9.5": "FAILED, close WRONG CODE",  # 1006, which nobody may send, is answered with 1000
}
TOO_LARGE = dict.fromkeys(("1.1.7", "1.1.8", "1.2.7", "1.2.8", "10.1.1"), "FAILED, close FAILED")
"""Messages of 65,536 bytes: carriers send none, and the listener closes 1009."""

EXPECTED_OF_THE_LISTENER = {**OF_AIOHTTP, **TOO_LARGE}
EXPECTED_OF_THE_DIALLER = OF_AIOHTTP


class Echo:
    """In the place of a stream: whatever comes on the real listener's socket goes back."""

    def __init__(
        self, house: Any, name: str, codec: Any, socket: Any, transport: asyncio.Transport, admitted: Any, log: Any
    ) -> None:
        self.house, self.socket, self.admitted = house, socket, admitted

    async def run(self) -> None:
        try:
            await echo(self.socket)
        finally:
            self.house.door.leave(self.admitted)

    def release(self) -> None:
        direct.release(self.socket)


async def echo(socket: Any) -> None:
    put = direct.outlet(socket)  # as frames are written
    async for message in socket:
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            put(message.data)


async def wstest(mode: str, spec: dict[str, Any], directory: Path) -> asyncio.subprocess.Process:
    path = directory / f"{mode}.json"
    path.write_text(json.dumps({"outdir": str(directory), "cases": ["*"], "exclude-cases": EXCLUDED, **spec}))
    with (directory / "wstest.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(WSTEST, "-m", mode, "-s", path, stdout=log, stderr=log, cwd=directory)


def results(directory: Path) -> dict[str, Any]:
    (cases,) = json.loads((directory / "index.json").read_text()).values()
    assert len(cases) >= 240
    return dict(cases)


def judged(cases: dict[str, Any]) -> dict[str, str]:
    """By case, how it went where that is not OK or INFORMATIONAL."""
    return {
        case: f"{result['behavior']}, close {result['behaviorClose']}"
        for case, result in cases.items()
        if not {result["behavior"], result["behaviorClose"]} <= {"OK", "INFORMATIONAL"}
    }


async def listener(port: int, directory: Path) -> dict[str, Any]:
    """The suite's client against the carriers' listener, where `Echo` stands for `Stream`."""
    url = f"ws://127.0.0.1:{port}/twilio/stream"
    process = await wstest("fuzzingclient", {"servers": [{"agent": "gateway", "url": url}]}, directory)
    assert await process.wait() == 0, (directory / "wstest.log").read_text()[-2000:]
    return results(directory)


async def client(directory: Path) -> dict[str, Any]:
    """The suite's server, dialled as a service is."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    process = await wstest("fuzzingserver", {"url": f"ws://127.0.0.1:{port}"}, directory)
    dialler, offer = Dialler("gateway"), Offer(subprotocols=())

    async def dial(path: str) -> Any:
        return await dialler.dial_as("autobahn", WebsocketService(url=f"ws://127.0.0.1:{port}/{path}"), offer)

    try:
        async with asyncio.timeout(20):
            while (asking := await dialled(dial)) is None:  # noqa: ASYNC110 - another process gets up
                await asyncio.sleep(0.5)
        count = int(await asking.receive_str())
        await asking.close()
        for case in range(1, count + 1):
            async with asyncio.timeout(30):
                tested = await dial(f"runCase?case={case}&agent=gateway")
                await echo(tested)
                await tested.close()
        await (await dial("updateReports?agent=gateway")).receive()
    finally:
        await dialler.close()
        process.send_signal(signal.SIGINT)
        await process.wait()
    return results(directory)


async def dialled(dial: Any) -> Any:
    with suppress(Unreachable):
        return await dial("getCaseCount")


async def test_the_carrier_listener(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "Stream", Echo)
    server = await launch()
    assert EXPECTED_OF_THE_LISTENER == judged(await listener(server.port, tmp_path))
    for case in TOO_LARGE:
        report = json.loads((tmp_path / f"gateway_case_{case.replace('.', '_')}.json").read_text())
        assert 1009 == report["remoteCloseCode"]


async def test_the_service_client(tmp_path: Path) -> None:
    assert EXPECTED_OF_THE_DIALLER == judged(await client(tmp_path))


async def main() -> bool:
    server_module.Stream = Echo  # type: ignore[misc, assignment]
    document = {
        "listen": "127.0.0.1:0",
        "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
        "services": {"echo": {"kind": "echo"}},
        "routes": [{"service": "echo"}],
    }
    server = make_server(config.parse(json.dumps(document)))
    await server.start()
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        of_listener, of_client = await listener(server.port, Path(one)), await client(Path(other))
    await server.stop()
    passed = (judged(of_listener), judged(of_client)) == (EXPECTED_OF_THE_LISTENER, EXPECTED_OF_THE_DIALLER)
    figures = {
        name: {"cases": len(cases), "not_ok": judged(cases)}
        for name, cases in {"listener": of_listener, "client": of_client}.items()
    }
    store("autobahn", figures, passed=passed, module="tests.test_autobahn")
    print(json.dumps(figures))
    return passed


if __name__ == "__main__":
    sys.exit(not asyncio.run(main()))
