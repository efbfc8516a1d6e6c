"""The example services work: each on a carrier's double, through a real gateway, and each under `conformance`."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import websockets

from gateway.audio.g711 import decode_mulaw, encode_mulaw
from gateway.conformance import PCM_16K, examine
from gateway.media import MULAW_8K
from tests.conftest import Launch
from tests.doubles import Plivo, TwilioMedia
from tests.doubles.realtime import KEY, Realtime
from tests.test_end_to_end import MULAW, played, stream_url
from tests.test_readme import README, _listening

EXAMPLES = Path(__file__).parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
CARRIERS = [pytest.param(TwilioMedia, "twilio", id="twilio"), pytest.param(Plivo, "plivo", id="plivo")]
PCM = {"encoding": "pcm_s16le", "sample_rate": 16000}


LOUD = encode_mulaw((8000 * np.sin(np.arange(8000))).astype(np.int16)).tobytes()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def serving(module: ModuleType) -> AsyncIterator[str]:
    async with websockets.serve(module.answer, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def agent(url: str, media_format: dict[str, Any] = PCM) -> dict[str, object]:
    return {"agent": {"kind": "websocket", "url": url, "media_format": media_format}}


def test_there_are_five_and_each_is_short_and_in_the_readme() -> None:
    assert ["echo", "menu", "realtime", "recorder", "transcriber"] == NAMES
    for name in NAMES:
        lines = [line for line in (EXAMPLES / f"{name}.py").read_text().splitlines() if line.strip()]
        assert len(lines) < 60, name
        assert f"tests/examples/{name}.py" in README.read_text()


@pytest.mark.parametrize("name", NAMES)
async def test_each_runs_as_a_script(name: str, unused_tcp_port: int) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, str(EXAMPLES / f"{name}.py"), str(unused_tcp_port))
    try:
        await _listening(unused_tcp_port)
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize("name", NAMES)
async def test_each_passes_conformance(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load(name)
    scenes = [
        "formats-asked",
        "text-stream",
        "unknown-type",
        "all-words",
        "dtmf",
        "outcomes",
        "clear-told",
        "gap",
        "fault",
        "reconnect",
    ]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with Realtime() as model:
        if name == "realtime":
            monkeypatch.setattr(module, "URL", model.url)
        elif name == "recorder":
            monkeypatch.setattr(module, "DIRECTORY", tmp_path)
        async with serving(module) as url:
            formats = (MULAW_8K if name == "realtime" else PCM_16K,)
            report = await examine(url, formats=formats, scenes=scenes, calls=4)
    assert {} == {result.check: result.detail for result in report.results if result.outcome == "failed"}


@pytest.mark.parametrize(("carrier", "provider"), CARRIERS)
async def test_echo(launch: Launch, carrier: Any, provider: str) -> None:
    async with serving(load("echo")) as url:
        server = await launch(services=agent(url, {"encoding": "mulaw", "sample_rate": 8000}))
        async with carrier(stream_url(server, provider)) as call:
            await call.speak(MULAW[:6400])
            await call.digits("#")
            await call.wait_closed()
    assert MULAW[:6400] == played(call)
    assert [] == call.violations


@pytest.mark.parametrize(("carrier", "provider"), CARRIERS)
async def test_recorder(launch: Launch, carrier: Any, provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load("recorder")
    monkeypatch.setattr(module, "DIRECTORY", tmp_path / "recordings")
    async with serving(module) as url:
        server = await launch(services=agent(url))
        async with carrier(stream_url(server, provider), pace="fast") as call:
            await call.speak(LOUD[:4000])
            await call.gap(3_000)
            await call.speak(LOUD[:4000])
            await asyncio.sleep(0.1)
            await call.hangup()
            await asyncio.sleep(0.2)
    (path,) = (tmp_path / "recordings").glob("*.wav")
    with wave.open(str(path), "rb") as file:
        assert (1, 2, 16000) == (file.getnchannels(), file.getsampwidth(), file.getframerate())
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert abs(len(samples) / 16 - 4_000) <= 20, "as long as the call"
    assert np.abs(samples[:8000]).max() > 1000
    assert np.abs(samples[10_000:54_000]).max() == 0
    assert np.abs(samples[-8000:]).max() > 1000


def pitch(samples: np.ndarray[Any, Any]) -> float:
    """The strongest frequency, at 8 kHz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples * np.hanning(len(samples))))) * 8000 / len(samples))


@pytest.mark.parametrize(("carrier", "provider"), CARRIERS)
async def test_menu(launch: Launch, carrier: Any, provider: str) -> None:
    async with serving(load("menu")) as url:
        server = await launch(services=agent(url))
        async with carrier(stream_url(server, provider)) as call:
            await call.until(lambda: len(played(call)) >= 3900)
            await call.played_out()
            await call.digits("2")
            await call.until(lambda: len(played(call)) >= 9800)
            await call.played_out()
            await call.digits("0")
            await call.wait_closed()
    heard = decode_mulaw(np.frombuffer(played(call), np.uint8)).astype(float)
    pitches = [round(pitch(heard[at + 200 : at + 1800]) / 10) * 10 for at in range(0, len(heard) - 1900, 2000)]
    assert [440, 660] == pitches[:2]
    assert 990 in pitches
    assert [660, 440] == pitches[-2:], "the goodbye was heard to its end before the call ended"
    assert [] == call.violations


@pytest.mark.parametrize(("carrier", "provider"), CARRIERS)
async def test_transcriber(launch: Launch, carrier: Any, provider: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(load("transcriber")) as url:
        server = await launch(services=agent(url))
        async with carrier(stream_url(server, provider), pace="fast") as call:
            await call.speak(b"\xff" * 4000 + LOUD + b"\xff" * 4800)
            await call.gap(3_000)
            await call.speak(LOUD[:4000] + b"\xff" * 800)
            await asyncio.sleep(0.1)
            await call.hangup()
            await asyncio.sleep(0.2)
    first, second = sorted(
        (json.loads(line) for line in capsys.readouterr().out.splitlines() if "from_ms" in line), key=lambda line: line["from_ms"]
    )
    assert 480 <= first["from_ms"] <= 520
    assert 1880 <= first["to_ms"] <= 1940, "with the pause that ended it"
    assert 5_060 <= second["from_ms"] <= 5_140, "in the call's own time"
    assert "s of speech" in second["text"]


@pytest.mark.parametrize(("carrier", "provider"), CARRIERS)
async def test_realtime(launch: Launch, carrier: Any, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("realtime")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with Realtime() as model:
        monkeypatch.setattr(module, "URL", model.url)
        async with serving(module) as url:
            server = await launch(services=agent(url, {"encoding": "mulaw", "sample_rate": 8000}))
            async with carrier(stream_url(server, provider)) as call:
                await model.began()
                await model.speak("item-1", MULAW[:4000])
                await call.until(lambda: len(played(call)) >= 4000)
                await call.played_out()
                await asyncio.sleep(0.1)
                await model.speak("item-2", MULAW[:16000] * 2)
                await model.speak("item-3", MULAW[:8000])
                await asyncio.sleep(0.7)
                await call.speak(MULAW[:1600])
                await model.notice_speech()
                await call.until(lambda: len(model.truncated) == 2)
                heard_ms = (len(played(call)) - 4000) / 8
                await call.hangup()
            await asyncio.sleep(0.1)
    assert MULAW[:1600] == bytes(model.heard)
    assert MULAW[:4000] == played(call)[:4000], "bit for bit"
    cut = dict(model.truncated)
    assert {"item-2", "item-3"} == set(cut)
    assert 0 == cut["item-3"]
    assert abs(heard_ms - cut["item-2"]) <= 100, "what the caller heard, and not what was sent"
    assert 400 < cut["item-2"] < 1400
    assert 1 == len(call.ear.clears)
    assert [] == model.violations
    assert [] == call.violations
    assert 1 == model.closed


async def test_realtime_ends_the_call_when_the_model_does(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("realtime")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with Realtime() as model:
        monkeypatch.setattr(module, "URL", model.url)
        async with serving(module) as url:
            server = await launch(services=agent(url, {"encoding": "mulaw", "sample_rate": 8000}))
            async with TwilioMedia(stream_url(server, "twilio")) as call:
                await model.began()
                await model.hang_up()
                await call.wait_closed()
    assert 1000 == call.close_code
