"""Pipecat's own echo: its Twilio serializer and WebSocket transport with a pipeline that sends callers their own words.

Run by a Python that has `pipecat-ai[websocket]` and uvicorn: `python pipecat_echo.py LISTEN_PORT RATE`
"""

from __future__ import annotations

import json
import sys

import uvicorn
from fastapi import FastAPI, WebSocket
from loguru import logger
from pipecat.frames.frames import InputAudioRawFrame, OutputAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.serializers.twilio import TwilioFrameSerializer
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams, FastAPIWebsocketTransport

logger.remove()
LISTEN, RATE = int(sys.argv[1]), int(sys.argv[2])


class Echo(FrameProcessor):
    async def process_frame(self, frame, direction: FrameDirection) -> None:  # type: ignore[no-untyped-def]
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            frame = OutputAudioRawFrame(audio=frame.audio, sample_rate=frame.sample_rate, num_channels=1)
        await self.push_frame(frame, direction)


app = FastAPI()


@app.websocket("/")
async def stream(socket: WebSocket) -> None:
    await socket.accept()
    sid = None
    while sid is None:
        frame = json.loads(await socket.receive_text())
        if frame["event"] == "start":
            sid = frame["start"]["streamSid"]
    serializer = TwilioFrameSerializer(sid, params=TwilioFrameSerializer.InputParams(auto_hang_up=False))
    params = FastAPIWebsocketParams(audio_in_enabled=True, audio_out_enabled=True, serializer=serializer)
    transport = FastAPIWebsocketTransport(socket, params)
    pipeline = Pipeline([transport.input(), Echo(), transport.output()])
    task = PipelineTask(pipeline, params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE))
    await PipelineRunner(handle_sigint=False).run(task)


uvicorn.run(app, host="127.0.0.1", port=LISTEN, log_level="error")
