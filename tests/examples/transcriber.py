"""Transcriber, a skeleton: finds the caller's utterances by their energy and prints when each began and ended.

python transcriber.py [PORT] services: {agent: {kind: websocket, url: "ws://127.0.0.1:9000"}}
"""

import array
import asyncio
import contextlib
import json
import sys

import websockets

LOUD, PAUSE_MS, FILLED_MS = 500, 400, 10_000  # speech is louder; an utterance ends with such a pause; see PROTOCOL.md, `gap`


def transcribe(samples, rate):
    """Put a speech recognizer here. Runs in a thread."""
    return f"({len(samples) / 2 / rate:.1f} s of speech)"


async def answer(call):
    rate, now, quiet, utterance = 16000, 0.0, 0.0, bytearray()

    async def tell(samples, begin):
        text = await asyncio.to_thread(transcribe, samples, rate)
        print(
            json.dumps({"from_ms": round(begin), "to_ms": round(begin + len(samples) / 2 / rate * 1000), "text": text}),
            flush=True,
        )

    async def hear(samples, tasks):
        nonlocal now, quiet
        ms = len(samples) / 2 / rate * 1000
        loud = max(map(abs, array.array("h", samples)), default=0) > LOUD
        quiet = 0.0 if loud else quiet + ms
        now += ms
        if loud or utterance:
            utterance.extend(samples)
        if utterance and (quiet >= PAUSE_MS or not samples):
            tasks.create_task(tell(bytes(utterance), now - len(utterance) / 2 / rate * 1000))
            utterance.clear()

    async with asyncio.TaskGroup() as tasks:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in call:
                event = {"type": "audio"} if isinstance(message, bytes) else json.loads(message)
                if event["type"] == "audio":
                    await hear(message, tasks)
                elif event["type"] == "start":
                    if event["media_format"] is None or event["media_format"]["encoding"] != "pcm_s16le":
                        await call.close(4003, "needs pcm_s16le")
                        return
                    rate = event["media_format"]["sample_rate"]
                elif event["type"] == "gap" and event["track"] == "inbound":  # time goes on without audio
                    await hear(b"", tasks)
                    now += max(0, event["lost_ms"] - (FILLED_MS if event["reason"] == "carrier" else 0))
        await hear(b"", tasks)


async def main(port):
    await (await websockets.serve(answer, "127.0.0.1", port)).serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9000))
