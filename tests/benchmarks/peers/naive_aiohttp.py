"""A relay as one writes it in an afternoon: Twilio's media stream to a WebSocket of 16-bit samples, and back.

Not part of the gateway and none of its code: what the gateway is compared with. No sessions, no playout, no metrics, no checks;
json, base64, one soxr stream for each direction of each call, asyncio's own loop.

`python naive_aiohttp.py LISTEN_PORT SERVICE_PORT [RATE]`
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import warnings

import aiohttp
import numpy as np
import soxr
from aiohttp import web

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        import audioop
    except ImportError:  # Python 3.13 has none
        sys.exit("audioop is missing: pip install audioop-lts")

LISTEN, SERVICE = int(sys.argv[1]), int(sys.argv[2])
RATE = int(sys.argv[3]) if len(sys.argv) > 3 else 16000


async def stream(request: web.Request) -> web.WebSocketResponse:
    carrier = web.WebSocketResponse()
    await carrier.prepare(request)
    up = soxr.ResampleStream(8000, RATE, 1, dtype="int16")
    down = soxr.ResampleStream(RATE, 8000, 1, dtype="int16")
    service = None
    stream_sid = None
    playing = None

    async def play() -> None:
        async for message in service:
            if message.type == aiohttp.WSMsgType.BINARY:
                samples = down.resample_chunk(np.frombuffer(message.data, dtype=np.int16))
                if len(samples):
                    payload = base64.b64encode(audioop.lin2ulaw(samples.tobytes(), 2)).decode()
                    await carrier.send_str(json.dumps({"event": "media", "streamSid": stream_sid, "media": {"payload": payload}}))

    async with aiohttp.ClientSession() as session:
        async for message in carrier:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            frame = json.loads(message.data)
            if frame["event"] == "start":
                stream_sid = frame["start"]["streamSid"]
                service = await session.ws_connect(f"ws://127.0.0.1:{SERVICE}/")
                await service.send_str(json.dumps({"type": "start", "call_id": frame["start"]["callSid"]}))
                playing = asyncio.create_task(play())  # noqa: TID251 as one writes it in an afternoon
            elif frame["event"] == "media":
                pcm = audioop.ulaw2lin(base64.b64decode(frame["media"]["payload"]), 2)
                samples = up.resample_chunk(np.frombuffer(pcm, dtype=np.int16))
                if len(samples):
                    await service.send_bytes(samples.tobytes())
            elif frame["event"] == "stop":
                break
        if playing is not None:
            playing.cancel()
        if service is not None:
            await service.close()
    return carrier


app = web.Application()
app.router.add_get("/", stream)
web.run_app(app, host="127.0.0.1", port=LISTEN, print=None, access_log=None)
