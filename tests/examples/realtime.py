"""Bridge to a voice model that speaks OpenAI's Realtime API. Mu-law passes through; what was not heard is taken back.

OPENAI_API_KEY=… python realtime.py [PORT]   services: {agent: {…, media_format: {encoding: mulaw, sample_rate: 8000}}}
"""

import asyncio
import base64
import contextlib
import json
import os
import sys

import websockets

URL = os.environ.get("REALTIME_URL", "wss://api.openai.com/v1/realtime?model=gpt-realtime")
PCMU = {"format": {"type": "audio/pcmu"}}
AUDIO = {"input": PCMU | {"turn_detection": {"type": "server_vad"}}, "output": PCMU}


async def answer(call):
    media = json.loads(await call.recv())["media_format"]
    if not media or (media["encoding"], media["sample_rate"]) != ("mulaw", 8000):
        await call.close(4003, "needs mulaw at 8000 Hz")
        return
    token = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    async with websockets.connect(URL, additional_headers=token) as model, asyncio.TaskGroup() as tasks:
        await model.send(json.dumps({"type": "session.update", "session": {"type": "realtime", "audio": AUDIO}}))
        tasks.create_task(pump(model, call, from_model))
        tasks.create_task(pump(call, model, from_caller))


async def pump(source, target, translate):
    state = {}
    with contextlib.suppress(websockets.ConnectionClosed):
        async for message in source:
            event = {"type": "audio", "payload": message} if isinstance(message, bytes) else json.loads(message)
            for reply in translate(event, state):
                await target.send(reply if isinstance(reply, bytes) else json.dumps(reply))
    await target.close()  # whichever side ends, ends the other one


def from_model(event, state):
    match event["type"]:
        case "response.output_audio.delta":
            if state.get("item") != event["item_id"]:  # from this checkpoint on, a clear's `played_ms` counts this item
                state["item"] = event["item_id"]
                yield {"type": "checkpoint", "name": f"begin {event['item_id']}"}
            yield base64.b64decode(event["delta"])
        case "response.output_audio.done":
            yield {"type": "checkpoint", "name": f"end {event['item_id']}"}
        case "input_audio_buffer.speech_started":
            yield {"type": "clear"}


def from_caller(event, state):
    if event["type"] == "audio":
        yield {"type": "input_audio_buffer.append", "audio": base64.b64encode(event["payload"]).decode()}
    elif event["type"] == "checkpoint":
        edge, _, item = event["name"].partition(" ")
        if event["outcome"] == "played":
            state["item"] = item if edge == "begin" else None
        elif edge == "begin":  # not one sample of it was heard
            yield truncation(item, 0)
    elif event["type"] == "clear" and state.get("item"):
        yield truncation(state.pop("item"), event["played_ms"])


def truncation(item, ms):
    return {"type": "conversation.item.truncate", "item_id": item, "content_index": 0, "audio_end_ms": ms}


async def main(port):
    await (await websockets.serve(answer, "127.0.0.1", port)).serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 9000))
