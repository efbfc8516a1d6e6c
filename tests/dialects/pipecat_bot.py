"""A bot as pipecat's own examples make them: FastAPI, its WebSocket transport, a pipeline. Knows nothing of this gateway.

`python pipecat_bot.py PORT`, where `pipecat-ai[websocket]` and `uvicorn` are installed. `/echo` and `/twilio` say what they hear;
`/tone` says three seconds of a tone when it first hears something loud, and is interrupted when it hears something loud again.
"""

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI, WebSocket
from pipecat.frames.frames import Frame, InputAudioRawFrame, OutputAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.runner.utils import parse_telephony_websocket
from pipecat.serializers.base_serializer import FrameSerializer
from pipecat.serializers.protobuf import ProtobufFrameSerializer
from pipecat.serializers.twilio import TwilioFrameSerializer
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams, FastAPIWebsocketTransport
from pipecat.workers.runner import WorkerRunner

RATE = 16000
LOUD = 2000
app = FastAPI()


class Echo(FrameProcessor):
    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            await self.push_frame(OutputAudioRawFrame(frame.audio, frame.sample_rate, frame.num_channels))
        else:
            await self.push_frame(frame, direction)


class Tone(FrameProcessor):
    def __init__(self) -> None:
        super().__init__()
        self.loud = False
        self.times = 0

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if not isinstance(frame, InputAudioRawFrame):
            await self.push_frame(frame, direction)
            return
        before, self.loud = self.loud, bool(np.abs(np.frombuffer(frame.audio, "<i2")).max(initial=0) > LOUD)
        if before or not self.loud:
            return
        self.times += 1
        if self.times == 1:
            tone = (8000 * np.sin(np.arange(3 * RATE) * 2 * np.pi * 440 / RATE)).astype("<i2").tobytes()
            await self.push_frame(OutputAudioRawFrame(tone, RATE, 1))
        else:
            await self.broadcast_interruption()


async def run(websocket: WebSocket, serializer: FrameSerializer, bot: FrameProcessor, rate: int, **options: bool) -> None:
    params = FastAPIWebsocketParams(audio_in_enabled=True, audio_out_enabled=True, serializer=serializer, **options)
    transport = FastAPIWebsocketTransport(websocket, params)
    pipeline = Pipeline([transport.input(), bot, transport.output()])
    worker = PipelineWorker(pipeline, params=PipelineParams(audio_in_sample_rate=rate, audio_out_sample_rate=rate))

    @transport.event_handler("on_client_disconnected")
    async def gone(_transport: object, _client: object) -> None:
        await worker.cancel()

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await runner.run()


@app.websocket("/{what}")
async def answer(websocket: WebSocket, what: str) -> None:
    await websocket.accept()
    if what == "twilio":
        _, call = await parse_telephony_websocket(websocket)
        quiet = TwilioFrameSerializer.InputParams(auto_hang_up=False)
        await run(websocket, TwilioFrameSerializer(stream_sid=call["stream_id"], params=quiet), Echo(), 8000)
    else:
        headers = what == "wav"  # some bots are written with WAV headers on each piece of audio
        await run(websocket, ProtobufFrameSerializer(), Tone() if what == "tone" else Echo(), RATE, add_wav_header=headers)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
