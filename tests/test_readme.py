"""The README is true: its generated parts are current, its ten-line service works as printed."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from pathlib import Path

from gateway.cli import feature_matrix
from tests.conftest import Launch
from tests.doubles import TwilioMedia
from tests.test_end_to_end import MULAW, played, stream_url

README = Path(__file__).parent.parent / "README.md"


def block(marker: str) -> str:
    """The fenced block below a marker."""
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"no block {marker}"
    return found[1]


def test_the_feature_matrix_is_what_the_code_can_do() -> None:
    found = re.search(r"<!-- feature-matrix -->\n(.*?)\n?<!-- /feature-matrix -->", README.read_text(), re.DOTALL)
    assert found
    assert feature_matrix() == found[1], "run `telephony-gateway providers --markdown` and paste its output"


async def test_the_ten_line_service_carries_a_call(launch: Launch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = tmp_path / "service.py"
    script.write_text(block("service").replace("9000", str(port)))
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), stderr=asyncio.subprocess.PIPE)
    try:
        await _listening(port)
        server = await launch(services={"agent": {"kind": "websocket", "url": f"ws://127.0.0.1:{port}"}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await call.speak(MULAW[:3200])
            await call.digits("1")
            await asyncio.sleep(0.2)
            await call.hangup()
    finally:
        process.terminate()
        _, complaints = await process.communicate()
    assert b"" == complaints
    assert [] == call.violations
    assert 3200 == len(played(call)) or call.ear.clears
    assert 1 == len(call.ear.clears)


async def _listening(port: int) -> None:
    for _ in range(100):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            await writer.wait_closed()
            return
    raise AssertionError(f"nobody listens on {port}")
