"""Menu: a rising pair of tones asks for a key; 1 and 2 play a tone each; 0 says goodbye and hangs up when that was heard.

python menu.py [PORT]        services: {agent: {kind: websocket, url: "ws://127.0.0.1:9000"}}
"""

import array
import asyncio
import contextlib
import itertools
import json
import math
import sys

import websockets

PROMPT, GOODBYE, WRONG = (440, 660), (660, 440), (220,)
CHOICES = {"1": (880,), "2": (990,)}


def tones(frequencies, rate, ms=250):
    """16-bit samples: one tone after the other."""
    step = [2 * math.pi * frequency / rate for frequency in frequencies for _ in range(rate * ms // 1000)]
    return array.array("h", (round(8000 * math.sin(phase)) for phase in itertools.accumulate(step))).tobytes()


async def answer(call):
    numbers = itertools.count(1)
    rate = 16000

    async def play(frequencies, name):
        await call.send(tones(frequencies, rate))
        await call.send(json.dumps({"type": "checkpoint", "name": f"{name}-{next(numbers)}"}))

    with contextlib.suppress(websockets.ConnectionClosed):
        async for message in call:
            event = {"type": "audio"} if isinstance(message, bytes) else json.loads(message)
            if event["type"] == "start":
                if event["media_format"] is None or event["media_format"]["encoding"] != "pcm_s16le":
                    await call.close(4003, "needs pcm_s16le")
                    return
                rate = event["media_format"]["sample_rate"]
                await play(PROMPT, "prompt")
            elif event["type"] == "dtmf":
                await call.send(json.dumps({"type": "clear"}))  # a key interrupts whatever plays
                if event["digits"] == "0":
                    await play(GOODBYE, "goodbye")
                else:
                    await play(CHOICES.get(event["digits"], WRONG) + PROMPT, "choice")
            elif event["type"] == "checkpoint" and event["name"].startswith("goodbye") and event["outcome"] == "played":
                await call.send(json.dumps({"type": "stop"}))


async def main(port):
    async with websockets.serve(answer, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9000))
