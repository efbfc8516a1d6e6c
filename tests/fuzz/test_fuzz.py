"""Fuzzing in short (F1, D6), and everything that has failed before. Long runs: `python -m tests.fuzz`."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import logs
from gateway.server import Server
from tests.conftest import Launch
from tests.fuzz import decode, session, wire
from tests.fuzz.codecs import TARGETS, transcripts
from tests.fuzz.decode import REGRESSIONS, Failure
from tests.fuzz.hammer import BROKEN, UPGRADE, framed

ROOT = Path(__file__).parent.parent.parent
KEPT = {path.stem: msgspec.json.decode(path.read_bytes(), type=Failure) for path in sorted(REGRESSIONS.glob("*.json"))}


@pytest.mark.parametrize("codec", TARGETS)
def test_f1_d6_any_frame_is_read_or_malformed(codec: str) -> None:
    figures = decode.run(codec, 4000, seed=len(codec))
    assert [] == [failure.error for failure in figures.failures]
    assert 4000 == figures.frames
    assert figures.reasons["read"] > 40, "a fuzzer whose frames are all rubbish tests one line"
    assert figures.reasons.total() - figures.reasons["read"] > 1000


@pytest.mark.parametrize("kind", session.KINDS)
def test_f1_d6_a_session_keeps_its_promises_between_two_that_talk_rubbish(kind: str) -> None:
    figures = session.run(kind, 5000, seed=7)
    assert [] == [failure.error for failure in figures.failures]
    assert figures.frames >= 5000
    assert figures.reasons["calls"] >= 10


@pytest.mark.parametrize("name", KEPT)
def test_f1_what_has_failed_once_does_not_fail_again(name: str) -> None:
    failure = KEPT[name]
    if failure.level == "decode":
        decode.replay(TARGETS[failure.codec](), failure.script, failure.given())
    else:
        session.replay(transcripts(failure.codec)[failure.script], failure.given())


def test_f1_the_count_of_every_reason_can_be_read_in_the_log() -> None:
    """What is private is masked by its key, and reasons are keys; so are kinds and codes that the peer has chosen."""
    source = "".join(path.read_text() for path in sorted((ROOT / "providers").glob("*.py")))
    reasons = {*re.findall(r'(?:MalformedFrame\(|reason = )"([a-z]\w+)"', source), "before_start", "other"}
    assert {"invalid_json", "bad_base64", "empty_payload", "too_many_digits"} <= reasons
    counts = dict.fromkeys(reasons, 3)
    told = {"bad_frames": counts, "unknown_frames": {"token": 2}, "faults": {"incorrectPayload": 1}}
    assert told == logs.redact(None, "info", dict(told))


async def test_f1_f2_d6_rubbish_on_the_wire_harms_nobody() -> None:
    figures = await wire.run(10**9, seed=3, rate=5000, secs=1.0)
    assert [] == figures["log_errors"]
    assert [] == figures["neighbours_losses"]
    assert figures["frames_taken"] > 1000
    assert figures["service_messages"] > 50
    assert figures["neighbours_frames"] >= 80
    assert figures["reasons"] >= 8


async def emptied(server: Server) -> None:
    async with asyncio.timeout(5):
        while server.streams:  # noqa: ASYNC110 - what it is in the end is what counts
            await asyncio.sleep(0.02)


async def test_f1_a_carrier_that_is_gone_before_its_answer_is_no_fault_of_ours(launch: Launch, log: list[Any]) -> None:
    server = await launch()
    for number in range(30):
        with socket.create_connection(("127.0.0.1", server.port)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
            one.sendall(UPGRADE.format("/twilio/stream").encode() + framed("{}") * (number % 3))
        await asyncio.sleep(0.005)
    await emptied(server)
    assert [] == [entry for entry in log if entry["log_level"] == "error"]


async def test_f2_a_broken_websocket_ends_its_own_connection_only(launch: Launch, log: list[Any]) -> None:
    server = await launch()
    for broken in BROKEN:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(UPGRADE.format("/twilio/stream").encode() + broken)
        async with asyncio.timeout(5):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 101 " in answer
            rest = await reader.read() if broken != BROKEN[3] else b"\x88"  # a client's missing mask is overlooked
        assert rest[:1] == b"\x88", "a close frame, and nothing else"
        writer.close()
    assert [] == [entry for entry in log if entry["log_level"] == "error"]


def test_the_same_seed_is_the_same_run() -> None:
    one, other = (decode.run("native", 2000, seed=3).reasons for _ in range(2))
    assert one == other
    assert one != decode.run("native", 2000, seed=4).reasons


def test_a_failure_is_found_kept_and_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer itself: a decoder with a hole in it."""
    target = TARGETS["native"]()

    def make(_: int) -> object:
        good = target.make(0)

        def bad(frame: str | bytes) -> object:
            if '"clear"' in str(frame):
                raise KeyError("clear")
            return good(frame)

        return bad

    holed = target._replace(make=make)  # type: ignore[arg-type]
    monkeypatch.setitem(TARGETS, "native", lambda: holed)
    figures = decode.run("native", 4000, seed=1)
    assert "KeyError: 'clear'" in {failure.error for failure in figures.failures}
    kept = msgspec.json.decode(msgspec.json.encode(figures.failures[0]), type=Failure)
    with pytest.raises(KeyError):
        decode.replay(holed, kept.script, kept.given())
    decode.replay(target, kept.script, kept.given())
