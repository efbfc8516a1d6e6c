"""Recorder: writes what the caller says to a WAV file, as long as the call was to the millisecond.

python recorder.py [PORT]    services: {agent: {kind: websocket, url: "ws://127.0.0.1:9000"}}
"""

import asyncio
import contextlib
import json
import sys
import wave
from pathlib import Path

import websockets

DIRECTORY = Path("recordings")
FILLED_MS = 10_000  # of a hole that the carrier left the gateway fills so much itself


def new_path(session):
    """A call that comes back after a lost connection gets one more file, not the same again."""
    DIRECTORY.mkdir(exist_ok=True)
    taken = len([*DIRECTORY.glob(f"{session}-*.wav")])
    return DIRECTORY / f"{session}-{taken + 1}.wav"


async def answer(call):
    with contextlib.ExitStack() as files, contextlib.suppress(websockets.ConnectionClosed):
        recording = None
        async for message in call:
            if isinstance(message, bytes):
                if recording is not None:
                    recording.writeframes(message)
                continue
            event = json.loads(message)
            if event["type"] == "start":
                media = event["media_format"]
                if media is None or media["encoding"] != "pcm_s16le":
                    await call.close(4003, "needs pcm_s16le")
                    return
                recording = files.enter_context(wave.open(str(new_path(event["session"])), "wb"))
                recording.setparams((1, 2, media["sample_rate"], 0, "NONE", ""))
            elif event["type"] == "gap" and event["track"] == "inbound":
                missing = event["lost_ms"] - (FILLED_MS if event["reason"] == "carrier" else 0)
                recording.writeframes(bytes(2 * (max(0, missing) * recording.getframerate() // 1000)))


async def main(port):
    async with websockets.serve(answer, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9000))
