"""Files that operators play into live calls, and listeners that they put on them and take off."""

from __future__ import annotations

import asyncio
import io
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from gateway import wav
from gateway.admin import LARGEST_SOUND
from gateway.audio import convert_whole
from gateway.media import MULAW_8K, Encoding, MediaFormat
from gateway.server import Server
from tests.conftest import Launch
from tests.doubles import ConversationRelay, Plivo, RecordingService, TwilioMedia
from tests.services.test_listeners import NOISE, echoing, listener
from tests.test_admin import ADMIN, Operator, ready
from tests.test_drain import running
from tests.test_end_to_end import MULAW, played, stream_url
from tests.test_metrics import scrape
from tests.test_reload import sid

AUDIO_WAV = {"Content-Type": "audio/wav"}


@pytest.fixture
async def operator() -> AsyncIterator[Operator]:
    async with aiohttp.ClientSession() as http:
        yield Operator(http)


async def only_call(server: Server, operator: Operator) -> str:
    (call,) = (await operator.get(server, "/calls"))[1]["calls"]
    return str(call["session"])


def tone(directory: Path, name: str = "notice.wav", *, secs: float = 0.5, rate: int = 16000) -> Path:
    """A file that is nowhere silent."""
    time = np.arange(int(secs * rate)) / rate
    wav.write(directory / name, (12000 * np.sin(2 * np.pi * 440 * time + 0.5)).astype("<i2").tobytes(), rate)
    return directory / name


def as_mulaw(path: Path) -> bytes:
    read = wav.read(path)
    return convert_whole(read.pcm, read.media_format, MULAW_8K)


# --- a file is played ---


@pytest.mark.parametrize("upload", [False, True])
async def test_a_file_is_heard_behind_what_waits_and_before_what_is_said_next(
    launch: Launch, operator: Operator, tmp_path: Path, upload: bool, log: list[Any]
) -> None:
    file = tone(tmp_path)
    async with RecordingService() as service:
        server = await launch(services={"agent": listener(service)}, admin=ADMIN, sounds=str(tmp_path))
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await link.send_audio(NOISE[:4000])
            await asyncio.sleep(0.1)
            what: Any = {"data": file.read_bytes(), "headers": AUDIO_WAV} if upload else {"json": {"file": "notice.wav"}}
            status, answer = await operator.post(server, f"/calls/{await only_call(server, operator)}/play", **what)
            await link.send_audio(NOISE[4000:6000])
            await link.send(type="checkpoint", name="end")
            end = await link.wait_for("checkpoint")
            await call.hangup()
    assert (202, "play", 500) == (status, answer["done"], answer["length_ms"])
    assert 200 <= answer["ahead_ms"] <= 500, "what the service has said before"
    assert NOISE[:4000] + as_mulaw(file) + NOISE[4000:6000] == played(call)
    assert ("played", 1250) == (end["outcome"], end["played_ms"])
    assert call.max_buffered_ms <= 280, "the carrier holds no more than ever"
    assert [] == call.violations
    assert ["play"] == [entry["action"] for entry in log if entry["event"] == "operator_command"]


async def test_mulaw_of_a_telephone_is_heard_bit_for_bit_on_plivo_too(launch: Launch, operator: Operator) -> None:
    server = await launch(admin=ADMIN)
    sound = NOISE[:8000].replace(b"\x7f", b"\xff")  # both are zero, and PCM knows but one
    header = (
        b"RIFF"
        + (36 + len(sound)).to_bytes(4, "little")
        + b"WAVEfmt \x10\0\0\0\x07\0\x01\0\x40\x1f\0\0\x40\x1f\0\0\x01\0\x08\0data"
    )
    async with Plivo(stream_url(server, "plivo")) as call:
        await asyncio.sleep(0.1)
        path = f"/calls/{await only_call(server, operator)}/play"
        body = header + len(sound).to_bytes(4, "little") + sound
        status, answer = await operator.post(server, path, data=body, headers={"Content-Type": "audio/x-wav"})
        await call.until(lambda: len(played(call)) >= 8000, 5)
        await call.hangup()
    assert (202, 1000) == (status, answer["length_ms"])
    assert sound == played(call)[:8000]
    assert [] == call.violations


async def test_files_that_cannot_be_played(launch: Launch, operator: Operator, tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    tone(tmp_path, "outside.wav")
    (sounds / "out").symlink_to(tmp_path)
    (sounds / "text.wav").write_text("no")
    tone(sounds, "long.wav", secs=3, rate=8000)
    tone(sounds, "fast.wav", rate=96000)
    server = await launch(admin=ADMIN, sounds=str(sounds), capacity_ms=2000)
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await ready(call)
        path = f"/calls/{await only_call(server, operator)}/play"
        for name in ("none.wav", "../outside.wav", str(tmp_path / "outside.wav"), "out/outside.wav", ".", "", "a\0b", "x" * 300):
            status, answer = await operator.post(server, path, json={"file": name})
            assert (404, "there is no such file in `sounds`") == (status, answer["error"]), name
        for body, expected, complaint in (
            ({"json": {"file": "text.wav"}}, 422, "is not a WAV file"),
            ({"json": {"file": "fast.wav"}}, 422, "write a rate from 8000 to 48000 Hz"),
            ({"json": {"file": "long.wav"}}, 409, "it lasts 3.0 s, and the queue has room for 2.0 s"),
            ({"json": {"fil": "long.wav"}}, 400, '{"file": "notice.wav"}'),
            ({"data": b"no", "headers": AUDIO_WAV}, 415, "the body is not a WAV file"),
            ({"data": b"no", "headers": {"Content-Type": "audio/mpeg"}}, 415, "send a WAV file as audio/wav"),
            ({"data": io.BytesIO(bytes(LARGEST_SOUND + 1)), "headers": AUDIO_WAV}, 413, f"send at most {LARGEST_SOUND} bytes"),
        ):
            status, answer = await operator.post(server, path, **body)
            assert expected == status, answer
            assert complaint in answer["error"]
        await asyncio.sleep(0.2)
        assert MULAW[:800] == played(call)[:800]
        assert len(played(call)) <= 960, "nothing of all that"
        await call.hangup()
    assert 404 == (await operator.post(server, path, json={"file": "long.wav"}))[0]


async def test_a_stream_that_ends_when_all_is_heard_takes_no_file(launch: Launch, operator: Operator, tmp_path: Path) -> None:
    file = tone(tmp_path)
    async with RecordingService() as service:
        server = await launch(services={"agent": listener(service)}, admin=ADMIN)
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await link.send_audio(NOISE[:8000])
            await link.send(type="stop", after="played")
            await asyncio.sleep(0.2)
            path = f"/calls/{await only_call(server, operator)}/play"
            for _ in range(2):
                status, answer = await operator.post(server, path, data=file.read_bytes(), headers=AUDIO_WAV)
                assert (409, "the stream refused it: it ends once what is queued has played") == (status, answer["error"])
            status, answer = await operator.post(server, path, json={"file": "notice.wav"})
            assert (409, True) == (status, "no directory of sounds is configured" in answer["error"])
            await call.wait_closed()
    assert NOISE[:8000] == played(call)


async def test_streams_of_text_and_streams_that_only_listen_play_nothing(
    launch: Launch, operator: Operator, tmp_path: Path
) -> None:
    listens = {"kind": "twilio_media_streams", "auth": "none", "mode": "listen", "then": "<Hangup/>"}
    relay = {"kind": "twilio_conversation_relay", "auth": "none"}
    server = await launch(providers={"twilio": listens, "relay": relay}, admin=ADMIN)
    body = tone(tmp_path).read_bytes()
    async with ConversationRelay(stream_url(server, "relay")):
        await asyncio.sleep(0.1)
        path = f"/calls/{await only_call(server, operator)}/play"
        status, answer = await operator.post(server, path, data=body, headers=AUDIO_WAV)
        assert 409 == status
        assert "this stream can't carry out 'audio'; it accepts: checkpoint, dtmf, language, play, say, stop" == answer["error"]
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.speak(MULAW[:800])
        path = f"/calls/{await only_call(server, operator)}/play"
        status, answer = await operator.post(server, path, data=body, headers=AUDIO_WAV)
        assert (409, "this stream can't carry out 'audio'; it accepts: nothing") == (status, answer["error"])
        await call.hangup()


# --- listeners ---


async def test_listeners_are_told_of_in_calls_metrics_and_the_log(launch: Launch, operator: Operator, log: list[Any]) -> None:
    async with RecordingService() as a, RecordingService() as b:
        services = {"a": listener(a), "b": listener(b, track="outbound"), "gone": listener("ws://127.0.0.1:9", give_up_secs=0.2)}
        server = await launch(**echoing("a", "b", "gone", **services), admin=ADMIN)
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await a.connected()
            await b.connected()
            await call.speak(MULAW[:8000])
            _, brief = await operator.get(server, "/calls")
            _, detail = await operator.get(server, f"/calls/{await only_call(server, operator)}")
            during = await scrape(server)
            await call.hangup()
        await asyncio.sleep(0.2)
        after = await scrape(server)
    listed = {each["name"]: each for each in detail["listeners"]}
    assert {each["name"] for each in brief["calls"][0]["listeners"]} == {*listed}
    assert [("inbound", "serving"), ("outbound", "serving"), ("inbound", "lost")] == [
        (listed[name]["track"], listed[name]["state"]) for name in ("a", "b", "gone")
    ]
    assert 0 == listed["a"]["dropped_ms"]
    assert 100 <= listed["gone"]["dropped_ms"] <= 1000, "what it should have heard before it was given up"
    assert listed["a"]["lag_ms"] < 500
    assert 1 == during["telephony_listener_calls", "a", "serving"] == during["telephony_listener_calls", "b"]
    assert 0 == during["telephony_listener_calls", "gone"] == after["telephony_listener_calls", "a"]
    assert during["telephony_listener_lag_max_seconds", "a"] < 0.5
    for now in (during, after):
        assert 1 == now["telephony_listeners_lost_total", "gone"]
        assert (
            pytest.approx(listed["gone"]["dropped_ms"] / 1000, abs=0.01)
            == now["telephony_listener_dropped_seconds_total", "gone"]
        )
        assert 0 == now["telephony_listener_dropped_seconds_total", "a"]
    (ended,) = [entry for entry in log if entry["event"] == "stream_ended"]
    assert {"a": 0, "b": 0, "gone": listed["gone"]["dropped_ms"]} == {
        each["name"]: each["dropped_ms"] for each in ended["listeners"]
    }
    assert MULAW[:8000] == a.links[0].audio


async def test_what_a_listener_loses_after_the_end_is_counted_once(launch: Launch) -> None:
    async with RecordingService(small_buffers=True) as deaf:
        server = await launch(**echoing("deaf", deaf=listener(deaf, replay_ms=60_000)), admin=ADMIN, hold_ms=60_000)
        async with TwilioMedia(stream_url(server, "twilio"), pace="fast") as call:
            link = await deaf.connected()
            link.stall()
            await call.speak(random.Random(2).randbytes(8000 * 120))
            before = await scrape(server)
            await call.hangup()
        await asyncio.sleep(3)
        after = await scrape(server)
    lost = after["telephony_listener_dropped_seconds_total", "deaf"]
    assert before["telephony_listener_dropped_seconds_total", "deaf"] <= lost <= 121
    assert 1 < lost, "what waited for it when it was given up"


async def test_a_listener_is_put_on_a_live_call_and_taken_off(
    launch: Launch, operator: Operator, tmp_path: Path, log: list[Any]
) -> None:
    async with RecordingService() as monitor, RecordingService() as ear:
        services = {
            "monitor": listener(monitor),
            "ear": listener(ear, track="outbound"),
            "archive": {"kind": "recorder", "directory": str(tmp_path), "name": "{session}"},
        }
        server = await launch(**echoing(**services), admin=ADMIN)
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await call.speak(MULAW[:1600])
            session = await only_call(server, operator)
            path = f"/calls/{session}/listeners"
            for name in services:
                status, answer = await operator.post(server, path, json={"service": name})
                assert 202 == status, answer
            link, heard = await monitor.connected(), await ear.connected()
            assert (409, "monitor listens already") == unpacked(await operator.post(server, path, json={"service": "monitor"}))
            await call.speak(NOISE[:8000])
            await asyncio.sleep(0.3)
            for name in services:
                status, answer = await operator.ask(server, "DELETE", f"{path}/{name}")
                assert 200 == status
                assert "done" == next(each["state"] for each in answer["listeners"] if each["name"] == name)
            stop = await link.wait_for("stop")
            await call.speak(NOISE[8000:12000])
            assert 404 == (await operator.ask(server, "DELETE", f"{path}/monitor"))[0]
            # And on again: its next connection begins with what is said then.
            assert 202 == (await operator.post(server, path, json={"service": "monitor"}))[0]
            again = await monitor.connected(2)
            await call.speak(NOISE[12000:13600])
            await call.hangup()
            await again.wait_for("stop")
    assert "detached" == stop["reason"]
    assert "listener" == link.start["role"]
    assert NOISE[:8000] == link.audio.lstrip(b"\xff"), "before it perhaps the pause in which it came"
    assert NOISE[12000:13600] == again.audio.lstrip(b"\xff")
    assert NOISE[:7000] in heard.audio.replace(b"\xff", b"")
    pcm = wav.read(tmp_path / f"{session}.wav")
    assert 900 <= pcm.duration_ms <= 2000
    assert len(played(call)) >= 13_600, "the call noticed nothing"
    assert [] == call.violations + monitor.violations + ear.violations
    commands = [entry["action"] for entry in log if entry["event"] == "operator_command"]
    assert ["attach"] * 3 + ["detach"] * 3 + ["attach"] == commands


async def test_a_recorder_on_a_line_on_which_nothing_happens_records_that(
    launch: Launch, operator: Operator, tmp_path: Path
) -> None:
    archive = {"kind": "recorder", "directory": str(tmp_path), "name": "{session}"}
    server = await launch(**echoing(archive=archive), admin=ADMIN)
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.speak(MULAW[:800])
        session = await only_call(server, operator)
        path = f"/calls/{session}/listeners"
        assert 202 == (await operator.post(server, path, json={"service": "archive"}))[0]
        await asyncio.sleep(0.3)
        assert 200 == (await operator.ask(server, "DELETE", f"{path}/archive"))[0]
        await call.hangup()
    assert wav.read(tmp_path / f"{session}.wav").duration_ms >= 300


async def test_listeners_that_cannot_be_put_on_a_call(launch: Launch, operator: Operator) -> None:
    async with RecordingService() as service:
        services = {f"x{at}": listener(service) for at in range(17)}
        server = await launch(**echoing(**services), admin=ADMIN)
        async with ConversationRelay(stream_url(server, "relay")):
            await asyncio.sleep(0.1)
            path = f"/calls/{await only_call(server, operator)}/listeners"
            status, error = unpacked(await operator.post(server, path, json={"service": "nobody"}))
            assert 404 == status
            assert error.startswith("service: there is none of this name; there are: echo, x0")
            assert 400 == (await operator.post(server, path, json={"x": 1}))[0]
            for at in range(16):
                assert 202 == (await operator.post(server, path, json={"service": f"x{at}"}))[0]
            refused = unpacked(await operator.post(server, path, json={"service": "x16"}))
            assert (409, "16 services listen already") == refused
        assert 404 == (await operator.post(server, "/calls/0123/listeners", json={"service": "x1"}))[0]
        assert 404 == (await operator.ask(server, "DELETE", "/calls/0123/listeners/x1"))[0]


async def test_a_listener_that_is_of_no_use_there_is_lost_and_the_call_is_not(launch: Launch, operator: Operator) -> None:
    async with RecordingService() as service:
        services = {
            "twilio": listener(service.url) | {"dialect": "twilio_media_streams"},
            "text": {"kind": "websocket", "url": service.url, "dialect": "twilio_conversation_relay"},
            "echo2": {"kind": "echo"},
            "gone": listener("ws://127.0.0.1:9", give_up_secs=0.1),
        }
        server = await launch(**echoing(**services), admin=ADMIN)
        async with ConversationRelay(stream_url(server, "relay")) as talk, TwilioMedia(stream_url(server, "twilio")) as call:
            await ready(call)
            sessions = {each["provider"]: each["session"] for each in (await operator.get(server, "/calls"))[1]["calls"]}
            for session in sessions.values():
                for name in services:
                    status, answer = await operator.post(server, f"/calls/{session}/listeners", json={"service": name})
                    assert status in (202, 409), answer
            await call.speak(NOISE[:8000])
            await asyncio.sleep(0.5)
            _, detail = await operator.get(server, f"/calls/{sessions['twilio']}")
            states = {each["name"]: each["state"] for each in detail["listeners"]}
            assert ("lost", "serving") == (states["gone"], states["echo2"])
            subscribed = server.streams[sessions["twilio"]]._channel._subscriptions
            assert 1 + sum(state not in ("lost", "done") for state in states.values()) == len(subscribed)
            await call.hangup()
            await talk.hangup()
    assert len(played(call)) >= 8000
    assert [] == call.violations


@pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")
async def test_all_of_it_reaches_the_worker_that_has_the_call(tmp_path: Path) -> None:
    body = tone(tmp_path, secs=2, rate=48000).read_bytes()
    archive = {"kind": "recorder", "directory": str(tmp_path / "recordings"), "name": "{session}"}
    what = {"services": {"echo": {"kind": "echo"}, "archive": archive}, "routes": [{"service": "echo"}]}
    async with running(tmp_path, "--workers", "2", sounds=str(tmp_path), **what) as gateway:
        for number in range(1, 5):  # on whichever worker
            async with TwilioMedia(await gateway.stream_url(sid(number)), call_sid=sid(number)) as call:
                await call.speak(MULAW[:800])
                (listed,) = (await gateway.ask("/calls"))[1]["calls"]
                path = f"/calls/{listed['session']}"
                assert 202 == (await gateway.ask(f"{path}/listeners", "POST", json={"service": "archive"}))[0]
                status, answer = await gateway.ask(f"{path}/play", "POST", data=io.BytesIO(body), headers=AUDIO_WAV)
                assert (202, 2000) == (status, answer["length_ms"])
                assert 202 == (await gateway.ask(f"{path}/play", "POST", json={"file": "notice.wav"}))[0]
                oversize = io.BytesIO(bytes(LARGEST_SOUND + 1))
                assert 413 == (await gateway.ask(f"{path}/play", "POST", data=oversize, headers=AUDIO_WAV))[0]
                await asyncio.sleep(0.3)
                status, answer = await gateway.ask(f"{path}/listeners/archive", "DELETE")
                assert (200, "done") == (status, answer["listeners"][0]["state"])
                await call.hangup()
            assert as_mulaw(tmp_path / "notice.wav")[:800] in played(call)
            assert wav.read(tmp_path / "recordings" / f"{listed['session']}.wav").duration_ms > 100
            assert [] == call.violations
            async with asyncio.timeout(5):
                while (await gateway.ask("/calls"))[1]["count"]:  # noqa: ASYNC110 - another process decides
                    await asyncio.sleep(0.05)


def unpacked(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1].get("error", "")


def test_the_largest_upload_is_longer_than_any_queue_of_the_default_length() -> None:
    assert MediaFormat(Encoding.PCM_S16LE, 48000).bytes_for(120_000) < LARGEST_SOUND
