"""Recordings: everything at its time, readable whatever happens, nothing private, and never at the expense of the call."""

# ruff: noqa: ASYNC221, ASYNC240 - tests may wait for a disk

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import pytest

from gateway.audio.g711 import decode_mulaw
from gateway.events import BargeIn, Clear, Dtmf, Fault, Gap, Spoken, Start, Stop, StopReason, Transcript
from gateway.services import recorder
from gateway.services.recorder import header, line, recover
from tests.conftest import Launch
from tests.doubles import ConversationRelay, RecordingService, TwilioMedia
from tests.test_end_to_end import MULAW, stream_url

NOISE = bytes(random.Random(2).choices(range(100), k=16_000))
"""Loud, and no piece of it comes twice."""
AGENT = {"encoding": "mulaw", "sample_rate": 8000}


def pcm(mulaw: bytes) -> npt.NDArray[np.int16]:
    return decode_mulaw(np.frombuffer(mulaw, np.uint8))


def stereo(path: Path) -> npt.NDArray[np.int16]:
    """Both tracks, as somebody else's reader has them."""
    with wave.open(str(path)) as file:
        assert (2, 2, 8000) == (file.getnchannels(), file.getsampwidth(), file.getframerate())
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)


def place(piece: npt.NDArray[np.int16], column: npt.NDArray[np.int16]) -> int:
    """The sample at which `piece` begins."""
    return column.tobytes().index(piece.tobytes()) // 2


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def files(directory: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The one recording in there, and its log."""
    (sound,) = directory.rglob("*.wav")
    return sound, told(sound.with_suffix(".jsonl"))


def config(directory: Path, agent: str, **options: object) -> dict[str, Any]:
    return {
        "services": {
            "agent": {"kind": "websocket", "url": agent, "media_format": AGENT},
            "archive": {"kind": "recorder", "directory": str(directory), **options},
        },
        "routes": [{"service": "agent", "listeners": ["archive"]}],
    }


async def over(server: Any, directory: Path) -> None:
    """Until the streams have ended and their recordings are complete."""
    async with asyncio.timeout(5):
        while server.streams or [*directory.rglob("*.part")]:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


async def test_a_call_is_recorded_as_it_was_heard(launch: Launch, tmp_path: Path) -> None:
    async with RecordingService() as service:
        server = await launch(**config(tmp_path / "r", service.url))
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(call.speak(NOISE[:12_000]))
                await asyncio.sleep(0.3)
                await link.send_audio(NOISE)
                await link.send(type="checkpoint", name="greeting")
                await asyncio.sleep(0.5)
                await link.send(type="clear")
                cut = await link.wait_for("clear")
                await asyncio.sleep(0.2)
                await link.send_audio(NOISE[8000:8800])
            await call.digits("4111")
            await asyncio.sleep(0.2)
            await call.hangup()
            await over(server, tmp_path)
    sound, log = files(tmp_path / "r")
    both = stereo(sound)
    spoken = place(pcm(NOISE[:160]), both[:, 0])
    heard = place(pcm(NOISE[:160]), both[:, 1])
    again = place(pcm(NOISE[8000:8160]), both[:, 1])
    assert 250 <= (heard - spoken) / 8 <= 420
    loud = np.flatnonzero(np.abs(both[heard:again, 1]) > 0)[-1] + 1
    assert abs(loud - cut["played_ms"] * 8) <= 8, "cut where the ear was"
    assert 190 <= (again - heard - loud) / 8 <= 320, "and silent as long"
    assert 1500 * 8 <= len(both) <= 2400 * 8
    kinds = [each["type"] for each in log]
    assert ["recording", "start", "checkpoint", "clear", *["dtmf"] * 4, "stop", "end"] == kinds
    (clear,) = [each for each in log if each["type"] == "clear"]
    assert abs(clear["at_ms"] - (heard + loud) / 8) <= 25, "the log is on the same axis"
    assert log[-1]["duration_ms"] == round(len(both) / 8)


async def test_the_canonical_call_has_no_more_right_than_left_and_is_private(launch: Launch, tmp_path: Path) -> None:
    async with RecordingService() as service:
        server = await launch(**config(tmp_path / "r", service.url, name="{date}/{provider}-{session}"))
        params = {"caller": "+15550101234", "called": "+15550105678", "card": "CANARY"}
        async with TwilioMedia(stream_url(server, "twilio"), parameters=params) as call:
            await call.speak(MULAW[:800])
            await call.digits("4929")
            await call.hangup()
            await over(server, tmp_path)
    sound, log = files(tmp_path / "r")
    assert sound.parent.parent == tmp_path / "r"
    assert sound.name.startswith("twilio-")
    text = sound.with_suffix(".jsonl").read_text()
    for canary in ("5550101234", "5550105678", "CANARY", '"4"', "4929"):
        assert canary not in text + str(sound)
    (start,) = [each for each in log if each["type"] == "start"]
    assert "CA" in start["call_id"]
    for path in (sound, sound.with_suffix(".jsonl")):
        assert 0o600 == path.stat().st_mode & 0o777
    assert 0o700 == (tmp_path / "r").stat().st_mode & 0o777


@pytest.mark.parametrize("transcripts", [False, True])
async def test_a_call_of_words_has_a_log_and_the_words_only_if_wanted(launch: Launch, tmp_path: Path, transcripts: bool) -> None:
    async with RecordingService() as service:
        server = await launch(**config(tmp_path, service.url, transcripts=transcripts))
        async with ConversationRelay(stream_url(server, "relay"), characters_per_second=200) as call:
            link = await service.connected()
            await call.says("My card is sesame")
            await link.wait_for("transcript")
            await link.send(type="say", text="Thank you.")
            await call.spoken_out()
            await call.hangup()
            await over(server, tmp_path)
    assert not [*tmp_path.glob("*.wav*")]
    (path,) = tmp_path.glob("*.jsonl")
    assert transcripts == ("sesame" in path.read_text())
    kinds = [each["type"] for each in told(path)]
    assert ["recording", "start"] == kinds[:2]
    assert "transcript" in kinds
    assert "stop" == kinds[-1]


async def test_a_recorder_alone_is_a_silent_line(launch: Launch, tmp_path: Path, log: list[Any]) -> None:
    server = await launch(services={"archive": {"kind": "recorder", "directory": str(tmp_path)}})
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.speak(NOISE[:8000])
        await call.hangup()
        await over(server, tmp_path)
    assert b"" == call.played
    sound, _ = files(tmp_path)
    both = stereo(sound)
    begin = place(pcm(NOISE[:8000]), both[:, 0])
    assert begin <= 4000
    assert not both[:, 1].any()
    (line,) = [each for each in log if each["event"] == "stream_ended"]
    assert (8000, 8000, 0, {}) == (line["received_samples"], line["forwarded_samples"], line["dropped_samples"], line["faults"])


async def test_many_at_once_in_one_directory(launch: Launch, tmp_path: Path) -> None:
    server = await launch(services={"archive": {"kind": "recorder", "directory": str(tmp_path)}})

    async def one(seed: int) -> None:
        async with TwilioMedia(stream_url(server, "twilio"), seed=seed) as call:
            await call.speak(MULAW[:1600])
            await call.hangup()

    async with asyncio.TaskGroup() as tasks:
        for seed in range(12):
            tasks.create_task(one(seed))
    await over(server, tmp_path)
    assert 12 == len([*tmp_path.glob("*.wav")]) == len([*tmp_path.glob("*.jsonl")])
    assert all(1600 <= len(stereo(path)) for path in tmp_path.glob("*.wav"))


# --- O10 and its kin: disks --------------------------------------------------------------------------------------------


def full_after(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A disk with so many bytes left."""
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if offset + len(data) > room:
            if offset >= room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = bytes(data)[: room - offset]
        return real(descriptor, data, offset)

    monkeypatch.setattr(recorder.os, "pwrite", pwrite)


async def undisturbed(launch: Launch, directory: Path, log: list[Any]) -> str:
    """A call, carried although the recording fails; returns why that failed."""
    seen: list[Any] = []
    async with RecordingService() as service:
        server = await launch(**config(directory, service.url))
        server.bus.watch(lambda _, event: seen.append(event))
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await link.send_audio(NOISE[:8000])
            await call.speak(NOISE[:8000])
            await asyncio.sleep(0.4)
            await call.hangup()
            await link.wait_for("stop")
        while server.streams:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
    assert NOISE[:8000] == call.played.replace(b"\xff", b"")
    assert NOISE[:8000] == link.audio.replace(b"\xff", b"")
    assert [] == call.violations
    (failed,) = [entry for entry in log if entry["event"] == "recording_failed"]
    assert "archive" == failed["service"]
    assert ["recording_failed"] == [event.code for event in seen if isinstance(event, Fault)]
    assert "caller_hangup" == next(entry["reason"] for entry in log if entry["event"] == "stream_ended")
    return str(failed["error"])


@pytest.mark.allow_errors("recording_failed")
async def test_a_full_disk_ends_the_recording_and_not_the_call(
    launch: Launch, tmp_path: Path, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_after(monkeypatch, 24_001)
    assert "No space left on device" == await undisturbed(launch, tmp_path, log)
    sound, entries = files(tmp_path)
    assert 24_000 == sound.stat().st_size
    assert (24_000 - 44) // 4 == len(stereo(sound))
    assert "recording_failed" == entries[-1]["type"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.allow_errors("recording_failed")
async def test_a_file_system_of_24_kilobytes(launch: Launch, tmp_path: Path, log: list[Any]) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        assert "No space left on device" == await undisturbed(launch, tmp_path, log)
        sound, _ = files(tmp_path)
        assert len(stereo(sound)) > 2000
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.allow_errors("recording_failed")
async def test_an_unwritable_directory_ends_nothing_else(launch: Launch, tmp_path: Path, log: list[Any]) -> None:
    (tmp_path / "file").write_text("")
    assert "File exists" == await undisturbed(launch, tmp_path / "file" / "r", log)


@pytest.mark.allow_errors("recording_failed")
async def test_a_bug_in_the_recorder_ends_nothing_else(
    launch: Launch, tmp_path: Path, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder.Layout, "frames", lambda _: 1 / 0)
    assert "ZeroDivisionError" in await undisturbed(launch, tmp_path, log)


async def test_a_disk_that_hangs_holds_up_nothing(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it: not the loop, not the call, not its end; what it does not take is silence of that length."""
    release = threading.Event()
    real = os.pwrite
    monkeypatch.setattr(recorder.os, "pwrite", lambda *given: release.wait(20) and real(*given))
    monkeypatch.setattr(recorder, "CAPACITY_BYTES", 4000)
    worst = 0.0
    async with RecordingService() as service:
        server = await launch(**config(tmp_path / "r", service.url), hold_ms=100)
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()

            async def watch() -> None:
                nonlocal worst
                while True:
                    before = time.monotonic()
                    await asyncio.sleep(0.01)
                    worst = max(worst, time.monotonic() - before)

            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(watch())
                await link.send_audio(NOISE[:8000])
                await call.speak(NOISE[:12_000])
                watching.cancel()
            await call.hangup()
            await link.wait_for("stop")
            while server.streams:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        release.set()
        await over(server, tmp_path)
    assert worst < 0.3
    assert NOISE[:12_000] == link.audio.replace(b"\xff", b"")


# --- processes that die ------------------------------------------------------------------------------------------------

GATEWAY = """
import asyncio, json, sys
from gateway import config, logs
from gateway.cli import make_server
async def main():
    logs.configure()
    server = make_server(config.parse(sys.argv[1]))
    print(await server.start(), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_what_a_killed_process_leaves_can_be_read_and_is_finished_by_the_next(tmp_path: Path, launch: Launch) -> None:
    document = {
        "listen": "127.0.0.1:0",
        "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
        "services": {"archive": {"kind": "recorder", "directory": str(tmp_path)}},
        "routes": [{"service": "archive"}],
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", GATEWAY, json.dumps(document)), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    port = int(await asyncio.wait_for(process.stdout.readline(), 20))
    try:
        async with TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream") as call:
            await call.speak(b"\x10" * 8 * 2600)
            (part,) = tmp_path.glob("*.wav.part")
            process.send_signal(signal.SIGKILL)
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
    readable = stereo(part)
    assert 8000 <= len(readable) <= 2700 * 8, "all but the last second"
    with part.open("ab") as file:
        file.write(b"\1\2\3\4\5")  # as if it had died in the middle of a write
    assert [part.with_suffix("")] == recover(tmp_path)
    both = stereo(part.with_suffix(""))
    assert len(readable) + 1 == len(both)
    assert "recovered" == told(part.with_suffix("").with_suffix(".jsonl"))[-1]["type"]


def test_a_recording_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    import fcntl

    part, other = tmp_path / "live.wav.part", tmp_path / "empty.wav.part"
    part.write_bytes(header(8000, 0) + bytes(400))
    other.write_bytes(b"RIFF")
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [] == recover(tmp_path)
    assert [tmp_path / "live.wav"] == recover(tmp_path)
    assert 100 == len(stereo(tmp_path / "live.wav"))
    assert other.exists()


async def test_stopping_the_gateway_completes_recordings(launch: Launch, tmp_path: Path) -> None:
    server = await launch(services={"archive": {"kind": "recorder", "directory": str(tmp_path)}})
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.speak(MULAW[:4000])
        await server.stop()
        await call.wait_closed()
        await over(server, tmp_path)
    sound, log = files(tmp_path)
    assert 4000 <= len(stereo(sound))
    assert ("drain", "end") == (log[-2]["reason"], log[-1]["type"])


# --- S8: the log -------------------------------------------------------------------------------------------------------


def test_the_log_has_nothing_private() -> None:
    events = [
        Start("MZ1", "CA1", caller="+14155550100", called="14155550101", parameters={"token": "CANARY"}),
        Dtmf("4929123"),
        Transcript("CANARY four nine"),
        BargeIn("CANARY", 5),
        Spoken("CANARY"),
        Fault("x", "call +14155550100 with text='CANARY'"),
        Stop(StopReason.SERVICE_STOP, handoff='{"card": "CANARY"}'),
    ]
    for event in events:
        text = json.dumps(line(event, transcripts=False))
        assert "CANARY" not in text
        assert "5550100" not in text
        assert "4929" not in text
    assert {"type": "transcript", "text": "yes", "final": True} == line(Transcript("yes"), transcripts=True)
    assert {"type": "barge_in", "heard": "yes", "after_ms": 5} == line(BargeIn("yes", 5), transcripts=True)
    assert "CANARY" not in json.dumps(line(events[0], transcripts=True))
    assert {"type": "clear", "played_ms": 1, "cleared_ms": 2} == line(Clear(1, 2), transcripts=False)
    assert {"type": "gap", "lost_ms": 3, "track": "inbound", "reason": "carrier"} == line(Gap(3), transcripts=False)


async def test_ids_of_the_carrier_stay_inside_the_directory(launch: Launch, tmp_path: Path) -> None:
    options = {"kind": "recorder", "directory": str(tmp_path / "r"), "name": "{call_id}-{session}"}
    server = await launch(services={"archive": options})
    start = {
        "event": "start",
        "streamSid": "MZ1",
        "start": {
            "callSid": "../../../etc/x",
            "streamSid": "MZ1",
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
        },
    }
    async with aiohttp.ClientSession() as http, http.ws_connect(stream_url(server, "twilio")) as socket:
        await socket.send_json(start)
        await socket.send_json({"event": "stop", "streamSid": "MZ1"})
        await socket.receive(timeout=3)
    await over(server, tmp_path)
    assert [tmp_path / "r"] == [*tmp_path.iterdir()]
    (sound,) = (tmp_path / "r").glob("*.wav")
    assert sound.name.startswith("_________etc_x-")
