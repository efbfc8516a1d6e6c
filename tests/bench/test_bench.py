"""The benchmark measures what it says, on real sockets and processes; how fast anything is, is not tested here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from websockets.frames import Frame
from websockets.streams import StreamReader

import providers
from gateway import cli
from gateway.bench import Latency, Load, Measured, Round, Sound, runner
from gateway.bench.command import told
from gateway.bench.frames import BINARY, TEXT, CarrierFrames, ServiceFrames, message
from gateway.bench.host import family, start
from gateway.bench.load import Track, sound
from gateway.bench.runner import Timing, run_round, summarize
from gateway.bench.subject import BenchError, Gateway, Running, Subject
from gateway.events import Audio
from gateway.media import MULAW_8K, Encoding, MediaFormat
from gateway.services.framed import HEADER_BYTES, unpack

TWILIO, PLIVO = "twilio_media_streams", "plivo_audio_streaming"
PCM_16K = MediaFormat(Encoding.PCM_S16LE, 16000)
SHORT = Timing(warm_up_secs=0.2, seconds=1.0)
ROOT = Path(__file__).parent.parent.parent


def parsed(data: bytes, *, masked: bool) -> list[Frame]:
    """Whole messages, read by another implementation."""
    reader, frames = StreamReader(), []
    reader.feed_data(data)
    reader.feed_eof()
    while True:
        ended = reader.at_eof()
        try:
            next(ended)
        except StopIteration as done:
            if done.value:
                return frames
        reading = Frame.parse(reader.read_exact, mask=masked)
        with pytest.raises(StopIteration) as read:
            next(reading)
        frames.append(read.value.value)


@pytest.mark.parametrize("size", [0, 5, 125, 126, 400, 65535, 65536])
@pytest.mark.parametrize("masked", [True, False])
def test_messages_are_websocket_messages(size: int, masked: bool) -> None:
    (frame,) = parsed(message(BINARY, bytes(range(256)) * (size // 256) + bytes(size % 256), masked=masked), masked=masked)
    assert (BINARY, size) == (frame.opcode, len(frame.data))


@pytest.mark.parametrize("kind", [TWILIO, PLIVO])
def test_each_call_has_frames_of_its_own_stream(kind: str) -> None:
    frames = CarrierFrames(kind, MULAW_8K, 0.2)
    heard = []
    for number in (0, 77):
        _, first, name = frames.open(number)
        codec = providers.load(kind)(msgspec.convert({"auth": "none"}, providers.load(kind).Config)).codec()
        events = [event for frame in parsed(first, masked=True) for event in codec.decode(bytes(frame.data).decode())]
        assert f"{number:032x}" == events[0].call_id[-32:]
        for head, tail in zip(frames.heads, frames.tails, strict=True):
            (frame,) = parsed(head + name + tail, masked=True)
            assert TEXT == frame.opcode
            heard += [event for event in codec.decode(bytes(frame.data).decode()) if isinstance(event, Audio)]
    assert [20 * tick for tick in range(10)] * 2 == [event.timestamp_ms for event in heard]
    assert frames.speech.pieces[:10] * 2 == [event.payload for event in heard]


def test_a_framed_service_numbers_its_audio() -> None:
    frames = ServiceFrames(PCM_16K, True, 0.1)
    messages = parsed(b"".join(frames.messages), masked=False)
    headers = [unpack(bytes(each.data), 2) for each in messages]
    assert [(tick, tick * 320) for tick in range(5)] == [(header.seq, header.pos) for header in headers]
    assert frames.speech.pieces[0] == bytes(messages[0].data)[HEADER_BYTES:]


def test_a_frame_has_arrived_with_its_last_byte() -> None:
    track = Track(MULAW_8K, 1)
    track.sent = [0.0, 0.02, 0.04, 0.06]
    track.take(159, 0.001, 0.0, 1.0)
    assert [] == track.waits
    track.take(161, 0.03, 0.0, 1.0)
    track.take(160, 0.05, 0.0, 0.04)  # sent when the measured time was over
    assert [0.03, 0.01] == [round(wait, 6) for wait in track.waits]
    assert (3, 1) == (track.units, track.missing)


def test_of_a_message_of_several_frames_the_last_one_counts() -> None:
    track = Track(MULAW_8K, 3)
    track.sent = [0.0, 0.02, 0.04, 0.06, 0.08]
    track.take(480, 0.05, 0.0, 1.0)
    assert [0.01] == [round(wait, 6) for wait in track.waits]
    assert 0 == track.missing


def test_sound_is_compared_and_its_delay_told() -> None:
    speech = ServiceFrames(PCM_16K, False, 0.02).speech
    said = b"".join(speech.piece(tick) for tick in range(40, 140))
    late = b"".join(speech.piece(tick) for tick in range(39, 40))[-2 * 48 :] + said  # 3 ms of what came before
    assert Sound(1.0, 3.0) == sound(speech, [late], 40 * speech.size, PCM_16K)
    assert Sound(1.0, 0.0) == sound(speech, [said], 40 * speech.size, PCM_16K)
    assert sound(speech, [bytes(len(said))], 0, PCM_16K) is None


@pytest.mark.parametrize(
    ("subject", "delay_ms"),
    [
        (Gateway(kind=TWILIO, listeners=1), 2.0),
        (Gateway(kind=PLIVO, framed=True, frame_ms=60), 2.0),
        (Gateway(kind=TWILIO, service_format=MULAW_8K), 0.0),
        (Gateway(kind=TWILIO, service_format=None), 0.0),
    ],
    ids=["raw, a listener", "framed, 60 ms", "as it is", "echo"],
)
def test_a_round_on_a_real_gateway(subject: Gateway, delay_ms: float) -> None:
    told: list[str] = []
    result = run_round(subject, 3, SHORT, told.append)
    measured, echo = result.measured, subject.service_format is None
    assert [] == measured.trouble
    assert 0 == measured.missing_frames
    assert pytest.approx(150 * measured.seconds, abs=60) == measured.down_frames
    assert (0 if echo else pytest.approx(150 * measured.seconds, abs=60)) == measured.up_frames
    assert pytest.approx(measured.up_frames if subject.listeners else 0, abs=60) == measured.listened_frames
    assert measured.subject_cpu_secs > 0
    assert result.underruns is not None
    assert measured.down is not None
    assert 0 < measured.down.p50 <= measured.down.p90 <= measured.down.p99 <= measured.down.p999 <= measured.down.max
    sounds = [measured.sound_down] if echo else [measured.sound_up, measured.sound_down]
    for heard in sounds:
        assert heard is not None
        assert heard.correlation > 0.99
        assert pytest.approx(delay_ms, abs=0.13) == heard.delay_ms
    assert any("measuring, 3 up" in each for each in told)


def test_a_relay_of_somebody_else(tmp_path: Path) -> None:
    peer = ROOT / "tests" / "benchmarks" / "peers" / "naive_aiohttp.py"
    subject = Subject(name="naive", kind=TWILIO, command=(sys.executable, str(peer), "{listen}", "{service}"), held_frames=7)
    pytest.importorskip("audioop")
    result = run_round(subject, 2, SHORT, lambda _: None)
    assert (0, None) == (result.measured.missing_frames, result.underruns)
    assert result.p99_ms > 40  # its resampler works in lumps of 100 ms, and counting samples shows it
    assert result.measured.sound_up is not None


def test_a_subject_that_can_not_be_measured_is_told_why(tmp_path: Path) -> None:
    dies = Subject(name="dies", kind=TWILIO, command=(sys.executable, "-c", "raise SystemExit('no license')"))
    with pytest.raises(BenchError, match="dies ended at once: no license"):
        run_round(dies, 1, SHORT, lambda _: None)
    with pytest.raises(BenchError, match="404"):
        run_round(Gateway(kind=TWILIO, path="/nowhere"), 1, SHORT, lambda _: None)
    with Running(Gateway(kind=TWILIO), 1, tmp_path) as running:
        assert running.pid == family(running.pid)[0]
        assert running.memory_bytes() > 2**20
        assert 0 == running.underruns()
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)


FINE = Latency(100, 0.2, 0.3, 0.5, 0.9, 2.0)


def a_round(calls: int, *, cpu: float = 0.5, p99: float = 1.0, **changes: object) -> Round:
    spread = msgspec.structs.replace(FINE, p99=p99)
    fields = {
        "seconds": 10.0, "up_frames": calls * 500, "down_frames": calls * 500, "subject_cpu_secs": cpu * 10, "own_cpu_secs": 2.0,
        "foreign_cpu_secs": 0.0, "up": spread, "down": FINE, "lateness": FINE, "missing_frames": 0, "memory_bytes": 2**20 * 3,
        "sound_up": Sound(1.0, 2.0), "sound_down": Sound(1.0, 2.0),
    }  # fmt: skip
    measured = Measured(**(fields | changes))  # type: ignore[arg-type]
    trouble = [*runner._doubts(measured, Gateway(kind=TWILIO))]
    return Round(subject="x", calls=calls, measured=measured, underruns=1, idle_memory_bytes=2**20, trouble=trouble)


def test_what_follows_from_a_round() -> None:
    result = a_round(100, cpu=0.4)
    assert (0.4, 40.0, 1.0, True) == (result.cpu, result.frame_us, result.p99_ms, result.valid)
    assert {"cpu": 0.4, "frame_us": 40.0, "call_kib": 20.48, "valid": True} == told(result)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lateness": msgspec.structs.replace(FINE, p99=2.5)}, "the generator was late"),
        ({"own_cpu_secs": 9.0}, "the generator was busy"),
        ({"foreign_cpu_secs": 1.5}, "others used the machine"),
        ({"missing_frames": 3}, "3 frames never arrived"),
        ({"sound_up": None}, "what arrived up is not what was said"),
    ],
)
def test_a_result_that_may_not_be_the_subjects_is_not_valid(changes: dict[str, object], why: str) -> None:
    result = a_round(100, **changes)
    assert not result.valid
    assert result.trouble[0].startswith(why)


def test_a_summary_is_of_the_valid_rounds() -> None:
    rounds = [a_round(100, cpu=0.4), a_round(100, cpu=0.9, missing_frames=5), a_round(100, cpu=0.5), a_round(100, cpu=0.45)]
    row = summarize(rounds)
    assert (4, 3, 0.45, 0) == (row.rounds, row.valid_rounds, row.cpu, row.missing_frames)
    assert ["5 frames never arrived"] == row.trouble
    assert (3, {"p50": 0.2, "p90": 0.3, "p99": 1.0, "p999": 0.9, "max": 2.0}) == (row.underruns, row.up)


@pytest.mark.parametrize("most", [7, 60, 317, 1000])
def test_the_search_ends_near_the_most_calls(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(_subject: Subject, calls: int, _timing: Timing, _tell: runner.Tell) -> Round:
        return a_round(calls, cpu=0.9 * calls / most * 0.8, p99=1.0 if calls <= most else 50.0)

    monkeypatch.setattr(runner, "run_round", pretend)
    tried = [*runner.find(Gateway(kind=TWILIO), SHORT, lambda _: None)]
    best = max(each.calls for each in tried if each.carried_well)
    assert best <= most <= best + max(2, 0.03 * most) + 1
    assert len(tried) <= 12


def test_the_command_speaks_json_when_piped() -> None:
    arguments = ["bench", "--calls", "2", "--rounds", "1", "--seconds", "1", "--warm-up", "0.2", "--provider", "plivo"]
    result = CliRunner().invoke(cli.main, arguments)
    first, last = map(json.loads, result.stdout.splitlines())
    assert (2, "this gateway") == (first["round"]["calls"], first["round"]["subject"])
    assert (1, 2) == (last["summary"][0]["rounds"], last["summary"][0]["calls"])
    assert (0 if first["valid"] else 1) == result.exit_code


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--calls", "0"], "from 1 to 5000"),
        (["--calls", "ten"], "from 1 to 5000"),
        (["--provider", "acme"], "twilio_media_streams"),
        (["--provider", "twilio_conversation"], "plivo_audio_streaming"),
        (["--format", "mp3/8000"], "encodings"),
        (["--plot", "/nowhere/at/all.png"], "no directory"),
    ],
)
def test_usage(arguments: list[str], why: str) -> None:
    result = CliRunner().invoke(cli.main, ["bench", *arguments])
    assert 2 == result.exit_code
    assert why in result.output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_nothing_behind(how: signal.Signals) -> None:
    command = [sys.executable, "-m", "gateway", "bench", "--calls", "2", "--seconds", "60", "--rounds", "1"]
    before = signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # or it inherits that it is ignored, where these tests run in the background
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    children: list[int] = []
    end = time.monotonic() + 30
    while len(children) < 2 and time.monotonic() < end:
        time.sleep(0.1)
        children = family(process.pid)[1:]
    process.send_signal(how)
    _, complaints = process.communicate(timeout=30)
    assert len(children) >= 2
    assert "interrupted" in complaints
    assert "Traceback" not in complaints
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_while_a_process_starts_leaves_none(how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        signal.raise_signal(how)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    before = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):
            start([sys.executable, "-c", "import time; time.sleep(60)"])
        assert signal.default_int_handler is signal.getsignal(how)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert -signal.SIGKILL == started[0].poll()


def test_a_load_survives_its_way_to_the_generator() -> None:
    load = Load(calls=3, port=1, path="/", kind=TWILIO, service_format=PCM_16K, service_port=2)
    assert load == msgspec.json.decode(msgspec.json.encode(load), type=Load)
