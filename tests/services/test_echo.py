"""The embedded echo, heard through a real gateway."""

from __future__ import annotations

import asyncio

from tests.conftest import Launch
from tests.doubles import Plivo, TwilioMedia
from tests.test_end_to_end import MULAW, played, stream_url


async def test_audio_comes_back_later_by_the_delay(launch: Launch) -> None:
    server = await launch(services={"echo": {"kind": "echo", "delay_ms": 300}})
    async with TwilioMedia(stream_url(server, "twilio"), pace="fast") as call:
        await call.speak(MULAW[:3200])
        await asyncio.sleep(0.9)
        await call.hangup()
    assert b"\xff" * 2400 + MULAW[:3200] == played(call)
    assert [] == call.violations


async def test_keys_clear_checkpoint_and_hang_up(launch: Launch) -> None:
    server = await launch(services={"echo": {"kind": "echo", "delay_ms": 1500}})
    async with Plivo(stream_url(server, "plivo"), pace="fast") as call:
        await call.speak(MULAW[:1600])
        await asyncio.sleep(0.2)
        await call.digits("5*")
        await asyncio.sleep(0.2)
        assert 1 == len(call.ear.clears)
        await call.digits("*#")
        await call.wait_closed()
    assert [] == call.violations
    assert 1000 == call.close_code
