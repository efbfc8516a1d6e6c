"""Echo: plays the caller back to the caller. `*` cuts it off, `#` hangs up once all has been heard.

python echo.py [PORT]        services: {agent: {kind: websocket, url: "ws://127.0.0.1:9000"}}
"""

import asyncio
import contextlib
import json
import sys

import websockets


async def answer(call):
    with contextlib.suppress(websockets.ConnectionClosed):
        async for message in call:
            if isinstance(message, bytes):
                await call.send(message)
                continue
            event = json.loads(message)
            if event["type"] == "start" and event["media_format"] is None:
                await call.close(4003, "needs audio")
            elif event["type"] == "dtmf" and event["digits"] == "*":
                await call.send(json.dumps({"type": "clear"}))
            elif event["type"] == "dtmf" and event["digits"] == "#":
                await call.send(json.dumps({"type": "stop", "after": "played"}))


async def main(port):
    async with websockets.serve(answer, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9000))
