"""What is lost when the gateway's own process dies: it is killed in mid-call, with words kept for a service that is away."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.doubles import FRAMED, RecordingService, TwilioMedia
from tests.services.test_websocket import agent, ledger, numbers
from tests.test_drain import running
from tests.test_end_to_end import played
from tests.test_reload import sid


async def test_the_gateways_own_process_dies(tmp_path: Path) -> None:
    async with RecordingService(subprotocol=FRAMED, ack_frames=5) as service:
        routes = [{"service": "agent"}]
        async with running(tmp_path, "--workers", "1", services={"agent": agent(service)}, routes=routes) as gateway:
            async with TwilioMedia(await gateway.stream_url(sid(1)), call_sid=sid(1), line_silence=False) as call:
                link = await service.connected()
                await link.play(ledger(1000, 250), frame_bytes=160)
                await link.send(type="checkpoint", name="end")
                await call.speak(ledger(0, 20))
                await link.until(lambda: 20 == len(link.frames))
                await service.down()
                await call.speak(ledger(20, 20))
                gateway.process.kill()
                assert 1006 == await call.wait_closed()
            await gateway.ended()
            await service.up()
            await gateway.start()
            # The next process knows nothing of that call; it takes others.
            async with TwilioMedia(await gateway.stream_url(sid(2)), call_sid=sid(2), line_silence=False) as other:
                link = await service.connected(2)
                await other.speak(ledger(0, 5))
                await other.hangup()
                await link.wait_for("stop")
            await asyncio.sleep(0.5)
    first, second = service.memories.values()
    assert [*range(20)] == numbers(first.audio), "all that was kept is lost"
    assert [] == [text for text in first.texts if text["type"] in ("checkpoint", "gap", "stop")], "and nobody tells of it"
    heard = numbers(played(call))
    assert [*range(1000, 1000 + len(heard))] == heard
    assert 0 < len(heard) < 250, "all that was queued is lost"
    assert [] == call.marks
    assert [*range(5)] == numbers(second.audio)
    assert 2 == len(service.links)
    assert "resume" not in link.start or link.start["resume"] is None
