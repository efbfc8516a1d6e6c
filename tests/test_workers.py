"""Several workers under a supervisor: no handshake is refused and no call dropped, whoever is replaced, killed or lost.

The long forms, which print their figures as JSON:

    python -m tests.test_workers rolling --restarts 20 --handshakes 100000
    python -m tests.test_workers kills --kills 100
    python -m tests.test_workers spread --calls 400 --workers 4
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway import shares
from gateway.admission import Admission, Refusal
from gateway.shares import RESERVED, Shares
from tests.doubles import RecordingService, TwilioMedia
from tests.test_doctor import free_port
from tests.test_drain import OVERFLOW, Gateway, agent, running, until
from tests.test_end_to_end import MULAW
from tests.test_reload import call_of, sid
from tests.test_tls import Files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")

# --- carriers, as fast as they come ----------------------------------------------------------------------------------------

CONNECT_SECS = 10.0


class Traffic:
    """Calls that come and go: a webhook and a stream each. A connection is one handshake; what went wrong is counted by how."""

    def __init__(self, port: int, *, at_once: int = 8, ssl: ssl.SSLContext | None = None) -> None:
        self.port = port
        self._ssl = ssl
        self.handshakes = 0
        self.calls = 0
        self.wrong: Counter[str] = Counter()
        self.cut = 0  # streams that were on when their process was killed
        self.overflows = 0
        self.slowest_secs = 0.0
        self._at_once = at_once
        self._number = 0
        self._done = False

    async def run(self, handshakes: int) -> None:
        """At least so many, and until `enough`."""
        self._wanted = handshakes
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._at_once):
                tasks.create_task(self._place())

    def enough(self) -> None:
        self._done = True

    async def _place(self) -> None:
        while not (self._done and self.handshakes >= self._wanted):
            self._number += 1
            try:
                await self._call(f"CC{self._number:032x}")
                self.calls += 1
            except (OSError, EOFError, TimeoutError) as error:
                self.wrong[type(error).__name__] += 1
            except Broken as error:
                self.wrong[str(error)] += 1

    async def _call(self, call_sid: str) -> None:
        body = f"CallSid={call_sid}&From=%2B15550001&To=%2B15550002".encode()
        head = f"POST /twilio/answer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        async with self._connected() as (reader, writer):
            writer.write(f"{head}Content-Type: application/x-www-form-urlencoded\r\n\r\n".encode() + body)
            answer = (await reader.read()).decode()
        found = re.search(r'url="wss?://[^/]+(/[^"]+)"', answer)
        if OVERFLOW in answer:  # a machine that is short of something takes fewer calls; that refuses no handshake
            self.overflows += 1
            await asyncio.sleep(0.1)
            return
        if found is None:
            raise Broken("no answer" if not answer else "not answered with a stream")
        async with self._connected() as (reader, writer):
            await stream(reader, writer, found[1], call_sid)
            try:
                writer.write(hung_up(call_sid))
                if not await reader.read():
                    self.cut += 1
            except ConnectionError:
                self.cut += 1

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        began = time.monotonic()
        self.handshakes += 1
        async with asyncio.timeout(CONNECT_SECS):
            reader, writer = await asyncio.open_connection("localhost" if self._ssl else "127.0.0.1", self.port, ssl=self._ssl)
            try:
                yield reader, writer
            finally:
                writer.close()
                self.slowest_secs = max(self.slowest_secs, time.monotonic() - began)


class Broken(Exception):
    """What a carrier would complain of."""


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, call_sid: str) -> None:
    """Connect a stream of Twilio's and start it."""
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101 "):
        raise Broken(f"upgrade answered with {head[9:12].decode()}")
    stream_sid = "MZ" + call_sid[2:]
    start = {
        "accountSid": "AC" + "0" * 32, "streamSid": stream_sid, "callSid": call_sid, "tracks": ["inbound"],
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}, "customParameters": {},
    }  # fmt: skip
    for message in (
        {"event": "connected", "protocol": "Call", "version": "1.0.0"},
        {"event": "start", "sequenceNumber": "1", "start": start, "streamSid": stream_sid},
    ):
        writer.write(frame(1, json.dumps(message).encode()))


def hung_up(call_sid: str) -> bytes:
    """The caller has hung up, and the stream is closed."""
    stop = {"accountSid": "AC" + "0" * 32, "callSid": call_sid}
    message = {"event": "stop", "sequenceNumber": "2", "stop": stop, "streamSid": "MZ" + call_sid[2:]}
    return frame(1, json.dumps(message).encode()) + frame(8, (1000).to_bytes(2))


def frame(opcode: int, payload: bytes) -> bytes:
    """A client's WebSocket frame, masked with zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0xFE]) + size.to_bytes(2)
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


class Held:
    """A call that stays, and tells whether it was ever closed by the other end."""

    def __init__(self, port: int, number: int, *, ssl: ssl.SSLContext | None = None) -> None:
        self._port = port
        self._ssl = ssl
        self.call_sid = f"CB{number:032x}"
        self.dropped = False
        self._reading: asyncio.Task[None]

    async def place(self, tasks: asyncio.TaskGroup) -> None:
        host = "localhost" if self._ssl else "127.0.0.1"
        reader, self._writer = await asyncio.open_connection(host, self._port, ssl=self._ssl)
        await stream(reader, self._writer, "/twilio/stream", self.call_sid)
        self._reading = tasks.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            if data[0] & 0x0F == 9:  # a ping: answered with what is in it, as all are that come alone
                self._writer.write(frame(10, data[2 : 2 + (data[1] & 0x7F)]))
        self.dropped = True

    def hang_up(self) -> None:
        """Without waiting for the other end."""
        self._reading.cancel()
        self._writer.write(hung_up(self.call_sid))
        self._writer.close()


async def pids(gateway: Gateway) -> list[int]:
    """Of those that take calls."""
    return [each["pid"] for each in (await gateway.ask("/version"))[1]["workers"] if not each["leaving"]]


async def wait_for(condition: Callable[[], Awaitable[bool]], within_secs: float = 30.0) -> None:
    async with asyncio.timeout(within_secs):
        while not await condition():  # noqa: ASYNC110 - other processes decide
            await asyncio.sleep(0.02)


async def settled(gateway: Gateway, workers: int) -> bool:
    """So many workers, and all of them ready."""
    if len(await pids(gateway)) != workers:
        return False
    return (await gateway.ask("/readyz"))[1] == {"ready": True, "reasons": []}


# --- what is measured --------------------------------------------------------------------------------------------------------


async def rolling(directory: Path, *, restarts: int, handshakes: int, held: int = 10, workers: int = 2) -> dict[str, Any]:
    """Rolling restarts under traffic, with calls that are there from the beginning to the end."""
    options = {"max_calls": 5000, "max_pending_per_address": 5000, "drain_secs": 3600, "stall_timeout_secs": 0}
    async with running(directory, "--workers", str(workers), **options) as gateway, asyncio.TaskGroup() as tasks:
        calls = [Held(gateway.port, number) for number in range(held)]
        for call in calls:
            await call.place(tasks)
        traffic = Traffic(gateway.port)
        running_traffic = tasks.create_task(traffic.run(handshakes))
        began = time.monotonic()
        replaced = []
        for number in range(restarts):
            status, answer = await gateway.ask("/replace", "POST")
            replaced.append(status)
            assert 202 == status, answer
            while traffic.handshakes < handshakes * (number + 1) // (restarts + 1):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        traffic.enough()
        await running_traffic
        dropped = sum(call.dropped for call in calls)
        for call in calls:
            call.hang_up()
        return {
            "restarts": len(replaced), "workers": workers, "handshakes": traffic.handshakes, "calls": traffic.calls,
            "refused": sum(traffic.wrong.values()), "how": dict(traffic.wrong), "overflows": traffic.overflows,
            "cut": traffic.cut, "held": held, "dropped": dropped,
            "slowest_ms": round(traffic.slowest_secs * 1000), "secs": round(time.monotonic() - began, 1),
        }  # fmt: skip


async def kills(directory: Path, *, kills: int, signals: tuple[signal.Signals, ...], workers: int = 2) -> dict[str, Any]:
    """Workers killed one after the other under traffic."""
    options = {"max_calls": 5000, "max_pending_per_address": 5000, "drain_secs": 3600, "stall_timeout_secs": 0}
    async with running(directory, "--workers", str(workers), **options) as gateway, asyncio.TaskGroup() as tasks:
        traffic = Traffic(gateway.port)
        running_traffic = tasks.create_task(traffic.run(1))
        times = []
        for number in range(kills):
            await asyncio.sleep(0.5)
            before = await pids(gateway)
            victim = before[number % workers]
            began = time.monotonic()
            os.kill(victim, signals[number % len(signals)])

            async def replaced(victim: int = victim) -> bool:
                return victim not in await pids(gateway) and await settled(gateway, workers)

            await wait_for(replaced)
            times.append(time.monotonic() - began)
        traffic.enough()
        await running_traffic
        return {
            "kills": kills, "signals": [each.name for each in signals], "workers": workers, "handshakes": traffic.handshakes,
            "wrong": dict(traffic.wrong), "cut": traffic.cut, "replaced_ms_max": round(max(times) * 1000),
            "replaced_ms_median": round(sorted(times)[len(times) // 2] * 1000), "slowest_ms": round(traffic.slowest_secs * 1000),
        }  # fmt: skip


async def spread(directory: Path, *, calls: int, workers: int) -> dict[str, Any]:
    """Long calls, as they come to lie on the workers."""
    options = {"max_calls": 2 * calls, "max_pending_per_address": 5000}
    async with running(directory, "--workers", str(workers), **options) as gateway, asyncio.TaskGroup() as tasks:
        held = [Held(gateway.port, number) for number in range(calls)]
        for call in held:
            await call.place(tasks)
        await wait_for(lambda: has_calls(gateway, calls))
        found = Counter(call["worker"] for call in (await gateway.ask("/calls"))[1]["calls"])
        for call in held:
            call.hang_up()
        shares_of = [found[number] for number in range(workers)]
        return {"calls": calls, "workers": workers, "shares": shares_of, "largest": round(max(shares_of) * workers / calls, 3)}


async def has_calls(gateway: Gateway, count: int) -> bool:
    return bool((await gateway.ask("/calls"))[1]["count"] == count)


# --- tests -------------------------------------------------------------------------------------------------------------------


async def test_o2_a_rolling_restart_refuses_no_handshake_and_drops_no_call(tmp_path: Path) -> None:
    figures = await rolling(tmp_path, restarts=2, handshakes=2000)
    assert (2, 0, 0, {}) == (figures["restarts"], figures["refused"], figures["dropped"], figures["how"])
    assert 0 == figures["cut"]


async def test_o3_workers_that_are_killed_are_replaced_and_nobody_is_refused(tmp_path: Path) -> None:
    """What a killed worker had in its hands is gone; whoever was waiting is not refused."""
    figures = await kills(tmp_path, kills=4, signals=(signal.SIGKILL,))
    assert {} == {how: count for how, count in figures["wrong"].items() if how in ("ConnectionRefusedError", "TimeoutError")}
    assert sum(figures["wrong"].values()) <= 4 * 8, "at most what was under way"


async def test_o3_a_worker_that_is_told_to_go_finishes_what_it_has(tmp_path: Path) -> None:
    figures = await kills(tmp_path, kills=3, signals=(signal.SIGTERM,))
    assert ({}, 0) == (figures["wrong"], figures["cut"])


async def test_o4_workers_and_calls_outlive_the_supervisor_and_the_next_one_takes_over(tmp_path: Path) -> None:
    """No handshake is refused meanwhile; workers of the dead one take no more once there are others, and end with their calls."""
    async with RecordingService() as service, running(tmp_path, "--workers", "2", **agent(service)) as gateway:
        before = await pids(gateway)
        traffic = Traffic(gateway.port, at_once=2)
        async with asyncio.TaskGroup() as tasks, TwilioMedia(await gateway.stream_url(sid(1)), call_sid=sid(1)) as call:
            tasks.create_task(traffic.run(1))
            link = await call_of(service, sid(1))
            gateway.process.kill()
            await gateway.process.wait()
            await call.speak(MULAW[:1600])
            assert before == [pid for pid in before if alive(pid)]
            second = free_port()
            gateway.write(admin=f"127.0.0.1:{second}")
            gateway.admin = second
            await gateway.start()
            events = Counter(entry["event"] for entry in gateway.events())
            assert 2 == events["worker_found"]
            await wait_for(lambda: settled(gateway, 2))

            async def taken_over() -> bool:
                return not {*before} & {*await pids(gateway)}

            await wait_for(taken_over)
            assert sid(1) in [each["call_id"] for each in (await gateway.ask("/calls"))[1]["calls"]]
            await call.speak(MULAW[1600:3200])
            await until(lambda: MULAW[:1600] in link.audio)
            await call.hangup()
            traffic.enough()
        await until(lambda: not any(alive(pid) for pid in before), 30)
        assert await settled(gateway, 2)
        gateway.process.send_signal(signal.SIGTERM)
        assert 0 == await gateway.ended()
    assert ({}, 0) == (traffic.wrong, traffic.cut)
    assert [] == call.violations


async def test_o4_nobody_can_find_the_workers_of_a_free_port_again_so_they_end_with_their_calls(tmp_path: Path) -> None:
    async with running(tmp_path, "--workers", "2", listen="127.0.0.1:0") as gateway:
        before = await pids(gateway)
        gateway.process.kill()
        await gateway.process.wait()
        await until(lambda: not any(alive(pid) for pid in before), 30)


async def test_two_supervisors_do_not_share_an_address(tmp_path: Path) -> None:
    async with running(tmp_path, "--workers", "2") as gateway:
        arguments = ("-m", "gateway", "serve", "--workers", "2", "--config", str(gateway.path))
        other = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=subprocess.PIPE)
        _, said = await other.communicate()
        assert 1 == other.returncode
        assert b"another gateway" in said
        assert await settled(gateway, 2)


async def test_what_can_not_start_ends_the_supervisor_with_the_reason(tmp_path: Path) -> None:
    """The file is good, but its certificate is not: 78, and one sentence."""
    files = Files(tmp_path)
    Path(files.tls.certificate).write_text("no certificate")  # noqa: ASYNC240
    gateway = Gateway(tmp_path / "gateway.json", tls=files.options)
    arguments = ("-m", "gateway", "serve", "--workers", "2", "--config", str(gateway.path))
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=subprocess.PIPE)
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert 78 == process.returncode
    assert files.tls.certificate in said.decode()
    assert b"Traceback" not in said


async def test_max_calls_counts_the_calls_of_all_workers(tmp_path: Path) -> None:
    """To the last slot, whichever worker has answered the webhook and whichever has the stream."""
    async with running(tmp_path, "--workers", "3", max_calls=24) as gateway, asyncio.TaskGroup() as tasks:
        held = []
        for number in range(24):
            call_sid = f"CB{number:032x}"
            path = (await gateway.stream_url(call_sid)).partition(str(gateway.port))[2]
            assert path, f"refused at {number} of 24"
            call = Held(gateway.port, number)
            reader, call._writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            await stream(reader, call._writer, path, call_sid)
            call._reading = tasks.create_task(call._read(reader))
            held.append(call)
        await wait_for(lambda: has_calls(gateway, 24))
        assert OVERFLOW in await gateway.webhook("answer", sid(1))
        assert 1 < len({call["worker"] for call in (await gateway.ask("/calls"))[1]["calls"]}), "or nothing was tested"
        assert [False] * 24 == [call.dropped for call in held]
        held.pop().hang_up()
        await wait_for(lambda: has_calls(gateway, 23))
        assert OVERFLOW not in await gateway.webhook("answer", sid(2))
        for call in held:
            call.hang_up()


async def test_the_operators_listener_speaks_for_all_workers(tmp_path: Path) -> None:
    """Calls are found and told wherever they are; counters never go backwards, though workers die."""
    async with running(tmp_path, "--workers", "2") as gateway, asyncio.TaskGroup() as tasks:
        held = [Held(gateway.port, number) for number in range(12)]
        for call in held:
            await call.place(tasks)
        await wait_for(lambda: has_calls(gateway, 12))
        listed = (await gateway.ask("/calls"))[1]["calls"]
        for each in listed:
            status, detail = await gateway.ask(f"/calls/{each['session']}")
            assert (200, each["call_id"]) == (status, detail["call_id"])
        for each in listed[:6]:
            assert (200, "hangup") == pick(await gateway.ask(f"/calls/{each['session']}/hangup", "POST"), "done")
        status, answer = await gateway.ask(f"/calls/{listed[6]['session']}/dtmf", "POST", json={"digits": "x"})
        assert 400 == status
        assert "12#" in answer["error"]
        assert 404 == (await gateway.ask("/calls/nobody/hangup", "POST"))[0]
        await wait_for(lambda: has_calls(gateway, 6))
        assert 6 == await metric(gateway, "telephony_calls_total")
        assert 6 == await metric(gateway, "telephony_calls_active")
        assert 2 == await metric(gateway, "telephony_workers")
        assert 500 == await metric(gateway, "telephony_call_slots_limit")
        in_all = await metric(gateway, "telephony_frames_total")
        for pid in await pids(gateway):
            os.kill(pid, signal.SIGKILL)
        await wait_for(lambda: settled(gateway, 2))
        assert 6 == await metric(gateway, "telephony_calls_total")
        assert 0 == await metric(gateway, "telephony_calls_active")
        assert in_all <= await metric(gateway, "telephony_frames_total")
        assert 2 == await metric(gateway, "telephony_worker_exits_total")
        assert 202 == (await gateway.ask("/replace", "POST"))[0]
        assert 6 == await metric(gateway, "telephony_calls_total")
        for call in held:
            call.hang_up()


async def test_a_reload_reaches_all_workers_and_those_that_come_later(tmp_path: Path) -> None:
    async with running(tmp_path, "--workers", "2") as gateway:
        gateway.write(hold_ms=7, listen="127.0.0.1:1")
        status, answer = await gateway.ask("/reload", "POST")
        assert (202, ["listen"]) == (status, answer["result"]["kept"])
        assert 7 == (await gateway.ask("/config"))[1]["hold_ms"]
        reloaded = [entry for entry in gateway.events() if entry["event"] == "configuration_reloaded"]
        assert [["hold_ms"], ["hold_ms"]] == [entry["changed"] for entry in reloaded]
        assert {0, 1} == {entry["worker"] for entry in reloaded}
        gateway.path.write_text("routes: [")
        status, answer = await gateway.ask("/reload", "POST")
        assert 422 == status
        assert str(gateway.path) in answer["error"]
        assert 422 == (await gateway.ask("/replace", "POST"))[0]
        os.kill((await pids(gateway))[0], signal.SIGKILL)
        await wait_for(lambda: settled(gateway, 2))
        assert "<Connect" in await gateway.webhook("answer", sid(1)), "it goes by the last good file"


# --- the counts that they share ------------------------------------------------------------------------------------------------


def both() -> tuple[Shares, Shares]:
    memory = shares.create()
    found = Shares(memory, 0), Shares(memory, 3)
    found[0].workers = 2
    for cell in (0, 3):
        found[0].clear(cell)
    os.close(memory)
    return found


def test_a_reservation_is_counted_once_and_taken_over_by_whoever_gets_the_stream() -> None:
    first, second = (Admission(2, 1000, 100, others=each) for each in both())
    assert None is first.reserve("a", 0)
    assert None is first.reserve("b", 0)
    assert Refusal.MAX_CALLS is second.reserve("c", 0)
    for call_id in ("a", "b"):
        assert None is second.connect("192.0.2.1", 0)
        assert None is second.started(call_id, "192.0.2.1", 0)
    assert Refusal.MAX_CALLS is second.reserve("c", 0)
    assert Refusal.MAX_CALLS is first.reserve("c", 0)
    assert (0, 2) == (first.calls, second.calls)
    second.ended("a", 0)
    assert None is first.reserve("c", 0)
    assert (1, 1) == (first.calls, second.calls)
    first.held(1000)
    assert None is second.reserve("d", 1000)


def test_limits_are_shared_by_the_workers() -> None:
    first, second = (Admission(100, 4, 10, others=each) for each in both())
    assert [None, None, Refusal.RATE] == [first.reserve(str(number), 0) for number in range(3)]
    assert [None, None, Refusal.RATE] == [second.reserve(str(number), 0) for number in range(10, 13)]
    assert [None] * 5 + [Refusal.PENDING] == [first.connect("192.0.2.1", 0) for _ in range(6)]


def test_more_reservations_than_can_be_listed_are_counted_all_the_same() -> None:
    first, second = both()
    for number in range(RESERVED + 10):
        first.reserve(str(number))
    assert RESERVED + 10 == second.total()
    assert sum(second.claim(str(number)) for number in range(RESERVED + 10)) == RESERVED
    for number in range(RESERVED + 10):
        first.release(str(number))
    assert 0 == first.total()


def test_what_a_dead_worker_had_is_free_once_its_cell_is_cleared() -> None:
    first, second = both()
    second.set_active(5)
    second.reserve("a")
    assert 6 == first.total()
    first.clear(3)
    assert 0 == first.total()
    assert not first.claim("a")


def alive(pid: int) -> bool:
    try:
        return "Z" != Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def pick(answer: tuple[int, Any], key: str) -> tuple[int, Any]:
    return answer[0], answer[1].get(key)


async def metric(gateway: Gateway, name: str) -> float:
    """The sum over its labels."""
    text = (await gateway.ask("/metrics"))[1]
    return sum(float(found[1]) for found in re.finditer(rf"(?m)^{name}(?:\{{[^}}]*\}})? (\S+)$", text))


def main() -> None:
    parser = argparse.ArgumentParser(description="The long forms.")
    parser.add_argument("what", choices=["rolling", "kills", "spread"])
    for name, default in (("restarts", 20), ("handshakes", 100_000), ("kills", 100), ("calls", 400), ("workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        match options.what:
            case "rolling":
                made = rolling(
                    path, restarts=options.restarts, handshakes=options.handshakes, held=40, workers=options.workers or 2
                )
            case "kills":
                signals = (signal.SIGKILL, signal.SIGTERM)
                made = kills(path, kills=options.kills, signals=signals, workers=options.workers or 2)
            case _:
                made = spread(path, calls=options.calls, workers=options.workers or 4)
        sys.stdout.write(json.dumps(asyncio.run(made)) + "\n")


if __name__ == "__main__":
    main()
