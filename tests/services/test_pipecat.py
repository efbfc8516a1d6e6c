"""A real pipecat bot answers calls, unchanged. Takes pipecat itself, which is heavy, in any environment.

python -m venv pipecat && pipecat/bin/pip install "pipecat-ai[websocket]" uvicorn
PIPECAT_PYTHON=pipecat/bin/python pytest tests/services/test_pipecat.py
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gateway.alignment import align
from gateway.audio.g711 import decode_mulaw, encode_mulaw
from tests.conftest import Launch, bundled_speech
from tests.doubles import Plivo, TwilioMedia
from tests.test_end_to_end import played, stream_url

BOT = Path(__file__).parent.parent / "dialects" / "pipecat_bot.py"
PYTHON = os.environ.get("PIPECAT_PYTHON", "")


pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="PIPECAT_PYTHON names no interpreter that has pipecat-ai[websocket] and uvicorn"),
    pytest.mark.timeout(300),  # it imports a great deal
]

SPEECH = encode_mulaw(bundled_speech()[: 8000 * 3]).tobytes()
LOUD = encode_mulaw((20_000 * np.sin(np.arange(1600))).astype(np.int16)).tobytes()


@pytest.fixture(scope="module")
def bot() -> Iterator[str]:
    """Its URL without a path."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([PYTHON, str(BOT), str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(1000):
                assert process.poll() is None, f"{PYTHON} {BOT} can't run: are pipecat-ai[websocket] and uvicorn there?"
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"ws://127.0.0.1:{port}"
        finally:
            process.terminate()


def likeness(call: TwilioMedia | Plivo, said: bytes) -> float:
    """How much what the caller heard is what he said: 1 is all of it."""
    ours, theirs = (decode_mulaw(np.frombuffer(sound, np.uint8)).astype(np.float64) for sound in (said, played(call)))
    found = align(ours, theirs)
    return found[1] if found is not None else 0.0


@pytest.mark.parametrize("carrier", [TwilioMedia, Plivo])
@pytest.mark.parametrize("path", ["echo", "wav", "twilio"])
async def test_what_the_caller_says_comes_back_from_a_pipecat_pipeline(
    launch: Launch, bot: str, carrier: type[TwilioMedia | Plivo], path: str
) -> None:
    dialect = "twilio_media_streams" if path == "twilio" else "pipecat"
    server = await launch(services={"bot": {"kind": "websocket", "url": f"{bot}/{path}", "dialect": dialect}})
    async with carrier(stream_url(server, "twilio" if carrier is TwilioMedia else "plivo"), line_silence=True) as call:
        await asyncio.sleep(2)  # the pipeline starts
        await call.speak(SPEECH)
        await asyncio.sleep(2)
        await call.hangup()
    assert likeness(call, SPEECH) > 0.9
    assert [] == call.violations
    assert call.max_buffered_ms <= 300


@pytest.mark.parametrize("carrier", [TwilioMedia, Plivo])
async def test_an_interruption_silences_the_line(launch: Launch, bot: str, carrier: type[TwilioMedia | Plivo]) -> None:
    server = await launch(services={"bot": {"kind": "websocket", "url": f"{bot}/tone", "dialect": "pipecat"}})
    async with carrier(stream_url(server, "twilio" if carrier is TwilioMedia else "plivo"), line_silence=True) as call:
        await asyncio.sleep(2)
        await call.speak(LOUD)
        await call.until(lambda: len(played(call).replace(b"\xff", b"").replace(b"\x7f", b"")) > 4000, 10)
        await call.speak(LOUD)
        await call.until(lambda: call.ear.clears, 10)
        await asyncio.sleep(1)
        heard = len(played(call).replace(b"\xff", b"").replace(b"\x7f", b"")) / 8000
        await call.hangup()
    assert 0.3 < heard < 2.5, "of three seconds"
    assert max(call.clear_to_silence_ms) < 150, "a new stretch of audio after the clear would count"
    assert [] == call.violations
