"""What passed on a carrier's socket, stored without what is private, and played again."""

# ruff: noqa: ASYNC240 - tests may wait for a disk

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import providers
from gateway import capture, cli, replay
from gateway.capture import CaptureError, Frame, Header, masked, read
from tests.conftest import Launch
from tests.doubles import ConversationRelay, Plivo, TwilioMedia
from tests.test_doctor import document, free_port
from tests.test_end_to_end import MULAW, stream_url

ECHO = {"echo": {"kind": "echo"}}


def capturing(directory: Path) -> dict[str, Any]:
    return {"services": ECHO, "routes": [{"service": "echo", "capture": str(directory)}]}


async def captured(server: Any, directory: Path) -> Path:
    """The one capture in there, once it is complete."""
    async with asyncio.timeout(5):
        while server.streams or not any('"type":"end"' in path.read_text() for path in directory.glob("*.jsonl")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (path,) = directory.glob("*.jsonl")
    return path


async def a_call(server: Any) -> TwilioMedia:
    params = {"card": "CANARY", "caller": "+15550101234"}
    async with TwilioMedia(stream_url(server, "twilio"), parameters=params) as call:
        await call.speak(MULAW[:3200])
        await call.digits("7")
        await call.speak(MULAW[3200:8000])
        await call.digits("*")
        await call.speak(MULAW[:3200])
        await asyncio.sleep(0.2)
        await call.hangup()
    return call


async def play_again(path: Path, url: str, speed: float = 8) -> replay.Outcome:
    header, frames = read(path)
    return await replay.replay(providers.load(header.kind), header, frames, url=url, speed=speed)


async def test_a_call_is_stored_with_its_audio_and_without_what_is_private(launch: Launch, tmp_path: Path) -> None:
    server = await launch(**capturing(tmp_path / "c"))
    call = await a_call(server)
    path = await captured(server, tmp_path / "c")
    assert 0o600 == path.stat().st_mode & 0o777
    text = path.read_text()
    for canary in ("CANARY", "5550101234", 'digit\\":\\"7'):
        assert canary not in text
    header, frames = read(path)
    assert ("twilio", "twilio_media_streams") == (header.provider, header.kind)
    sound = {"in": b"", "out": b""}
    for frame in frames:
        message = json.loads(frame.frame)
        if message["event"] == "media":
            sound[frame.dir] += base64.b64decode(message["media"]["payload"])
    assert MULAW[:8000] + MULAW[:3200] == sound["in"]
    before_the_cut = call.played.replace(b"\xff", b"")[:2000]
    assert before_the_cut == sound["out"].replace(b"\xff", b"")[:2000]
    kinds = [(frame.dir, json.loads(frame.frame)["event"]) for frame in frames]
    assert [("in", "connected"), ("in", "start")] == kinds[:2]
    assert ("in", "stop") == kinds[-1]
    assert {("out", "mark"), ("in", "mark"), ("out", "clear")} <= {*kinds}
    assert [frame.at for frame in frames] == sorted(frame.at for frame in frames)
    assert 1.2 < frames[-1].at < 4


async def test_it_is_played_again_and_nothing_differs(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "QUIET_SECS", 0.3)
    server = await launch(**capturing(tmp_path / "c"))
    await a_call(server)
    path = await captured(server, tmp_path / "c")
    fresh = await launch(services=ECHO)
    for url in (stream_url(fresh, "twilio"), f"http://127.0.0.1:{fresh.port}/twilio/answer"):
        outcome = await play_again(path, url)
        assert [] == outcome.difference, outcome
        assert "clear" in outcome.got
        assert "checkpoint" in outcome.got
        assert outcome.got_audio_ms > 300


async def test_another_service_differs(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await launch(**capturing(tmp_path / "c"))
    await a_call(server)
    path = await captured(server, tmp_path / "c")
    silent = await launch(services={"archive": {"kind": "recorder", "directory": str(tmp_path / "r")}})
    monkeypatch.setattr(replay, "REPLY_SECS", 0.2)
    monkeypatch.setattr(replay, "QUIET_SECS", 0.2)
    outcome = await play_again(path, stream_url(silent, "twilio"))
    assert ([], 0) == (outcome.got, outcome.got_audio_ms)
    assert outcome.late
    assert "-clear" in outcome.difference


@pytest.mark.parametrize("name", ["plivo", "relay"])
async def test_every_carriers_calls_are_played_again(launch: Launch, tmp_path: Path, name: str) -> None:
    server = await launch(**capturing(tmp_path))
    if name == "plivo":
        async with Plivo(stream_url(server, name)) as call:
            await call.speak(MULAW[:3200])
            await call.digits("5")
            await asyncio.sleep(0.2)
            await call.hangup()
    else:
        async with ConversationRelay(stream_url(server, name), characters_per_second=200) as talk:
            await talk.says("My number is 4929 1234 5678 9012, thank you.")
            await talk.spoken_out()
            await talk.digits("5")
            await asyncio.sleep(0.2)
            await talk.hangup()
    path = await captured(server, tmp_path)
    assert "4929" not in path.read_text()
    fresh = await launch(services=ECHO)
    outcome = await play_again(path, stream_url(fresh, name))
    assert [] == outcome.difference
    assert outcome.got


async def test_the_command_exits_1_on_a_difference(launch: Launch, tmp_path: Path) -> None:
    server = await launch(**capturing(tmp_path))
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.speak(MULAW[:1600])
        await call.hangup()
    path = await captured(server, tmp_path)
    fresh = await launch(services=ECHO)

    def run(file: Path) -> Any:
        arguments = ["replay", str(file), "--url", stream_url(fresh, "twilio"), "--speed", "4"]
        return CliRunner().invoke(cli.main, arguments)

    same = await asyncio.to_thread(run, path)
    assert (0, True) == (same.exit_code, json.loads(same.output.splitlines()[-1])["same"])
    other = tmp_path / "other.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"out"' not in line]
    other.write_text("\n".join(lines))
    different = await asyncio.to_thread(run, other)
    assert 1 == different.exit_code
    assert "+audio" in json.loads(different.output.splitlines()[-1])["difference"]
    nowhere = await asyncio.to_thread(
        CliRunner().invoke, cli.main, ["replay", str(path), "--url", "ws://127.0.0.1:9/twilio/stream"]
    )
    assert 1 == nowhere.exit_code
    assert "nothing listens there" in nowhere.output


@pytest.mark.parametrize("name", ["twilio", "plivo", "relay"])
async def test_the_command_signs_as_an_account_of_a_configuration(launch: Launch, tmp_path: Path, name: str) -> None:
    routes = [{"service": "echo", "capture": str(tmp_path)}]
    first = document(free_port(), routes=routes)
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps(first))
    server = await launch(**first)
    ask = [*("--config", str(file), "--provider", name, "--json")]

    def run(*arguments: str) -> tuple[int, Any]:
        done = CliRunner().invoke(cli.main, [*arguments])
        return done.exit_code, json.loads(done.output.splitlines()[-1]) if done.output.startswith("{") else done.output

    said = ("--say", "Hello there.") if name == "relay" else ("--dtmf", "1")
    status, report = await asyncio.to_thread(run, "simulate", *ask, "--hold", "1", *said)
    assert 0 == status, report
    path = await captured(server, tmp_path)
    status, outcome = await asyncio.to_thread(run, "replay", str(path), *ask)
    assert 0 == status, outcome
    assert outcome["same"]
    assert outcome["got"]
    bare = ("--url", f"{server.settings.base_url()}/{name}/answer")
    status, complaint = await asyncio.to_thread(run, "replay", str(path), *bare)
    assert (1, True) == (status, "403" in complaint)
    other = "plivo" if name != "plivo" else "twilio"
    status, complaint = await asyncio.to_thread(run, "replay", str(path), "--config", str(file), "--provider", other)
    assert (2, True) == (status, f"provider {other} is " in complaint)
    status, complaint = await asyncio.to_thread(run, "replay", str(path))
    assert (2, True) == (status, "give --url, or --config" in complaint)


async def test_a_route_without_it_stores_nothing(launch: Launch, tmp_path: Path) -> None:
    routes = [{"service": "echo", "provider": "plivo", "capture": str(tmp_path / "c")}, {"service": "echo"}]
    server = await launch(services=ECHO, routes=routes)
    await a_call(server)
    assert not (tmp_path / "c").exists()


@pytest.mark.allow_errors("capture_failed")
async def test_a_directory_that_can_not_be_written_ends_the_capture_and_not_the_call(
    launch: Launch, tmp_path: Path, log: list[Any]
) -> None:
    (tmp_path / "file").write_text("")
    server = await launch(**capturing(tmp_path / "file" / "c"))
    call = await a_call(server)
    assert len(call.played) > 3000
    assert [] == call.violations
    assert ["capture_failed"] == [entry["event"] for entry in log if entry["event"] == "capture_failed"]


@pytest.mark.parametrize(("bound", "value"), [("CAPACITY_BYTES", 2000), ("LARGEST_FILE_BYTES", 4000)])
async def test_it_is_bounded_in_memory_and_on_disk(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(capture, bound, value)
    if bound == "CAPACITY_BYTES":
        monkeypatch.setattr(capture, "masked", lambda text: __import__("time").sleep(0.05) or text)
    server = await launch(**capturing(tmp_path))
    call = await a_call(server)
    assert len(call.played) > 3000
    async with asyncio.timeout(20):
        while not any('"type":"end"' in path.read_text() for path in tmp_path.glob("*.jsonl")):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    (path,) = tmp_path.glob("*.jsonl")
    end = json.loads(path.read_text().splitlines()[-1])
    if bound == "CAPACITY_BYTES":
        assert end["dropped"] > 0
    else:
        assert end["truncated"]
        assert path.stat().st_size < 4300


def test_masks_keep_a_frame_what_it_is() -> None:
    start = {
        "event": "start",
        "sequenceNumber": "12345678901",
        "start": {
            "callSid": "CA12345678901234567890123456789012",
            "customParameters": {"token": "CANARY", "x": "CANARY"},
            "from": "+14155550100",
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000},
        },
        "extra_headers": "{a: CANARY; b: CANARY}",
    }
    out = json.loads(masked(json.dumps(start)))
    assert "CANARY" not in json.dumps(out)
    assert "5550100" not in json.dumps(out)
    assert ("12345678901", start["start"]["callSid"]) == (out["sequenceNumber"], out["start"]["callSid"])  # type: ignore[index]
    assert {"token": "***", "x": "***"} == out["start"]["customParameters"]
    assert start["start"]["mediaFormat"] == out["start"]["mediaFormat"]  # type: ignore[index]
    for frame, expected in [
        ({"event": "dtmf", "dtmf": {"digit": "4"}}, {"event": "dtmf", "dtmf": {"digit": "0"}}),
        ({"event": "dtmf", "dtmf": {"digit": "*"}}, {"event": "dtmf", "dtmf": {"digit": "*"}}),
        ({"type": "sendDigits", "digits": "49w#"}, {"type": "sendDigits", "digits": "00w#"}),
        ({"type": "end", "handoffData": '{"card": 1}'}, {"type": "end", "handoffData": "***"}),
        ({"type": "prompt", "voicePrompt": "It is 4929 1234."}, {"type": "prompt", "voicePrompt": "It is •."}),
        ({"media": {"timestamp": "1700000000000"}}, {"media": {"timestamp": "1700000000000"}}),
        ({"media": {"payload": "MTIzNDU2Nzg5MDEyMzQ1"}}, {"media": {"payload": "MTIzNDU2Nzg5MDEyMzQ1"}}),
    ]:
        assert expected == json.loads(masked(json.dumps(frame)))
    assert "4155550100" not in masked("no json +14155550100")
    assert "4155550100" not in masked('["+14155550100"]')


def test_what_is_no_capture_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(CaptureError, match="No such file"):
        read(path)
    path.write_text("{}")
    with pytest.raises(CaptureError, match="1 is not the header"):
        read(path)
    header = '{"type":"capture","version":1,"time":"","provider":"p","kind":"k","session":"s"}\n'
    path.write_text(header + '{"at": "x"}\n{"at":0,"dir":"in","text":"a"}\n')
    with pytest.raises(CaptureError, match=r"x\.jsonl:2: not a frame"):
        read(path)
    path.write_text(header + '{"at":0,"dir":"in","data":"AAA="}\n{"at":1,"dir"')
    assert (Header(1, "", "p", "k", "s"), [Frame(0, "in", data="AAA=")]) == read(path), "a torn last line is no harm"
    path.write_text(header.replace(":1,", ":9,"))
    with pytest.raises(CaptureError, match="version 9"):
        read(path)
    path.write_text(header.replace('"k"', '"nobody"'))
    done = CliRunner().invoke(cli.main, ["replay", str(path), "--url", "ws://127.0.0.1:9/"])
    assert (1, False) == (done.exit_code, "Traceback" in done.output)
