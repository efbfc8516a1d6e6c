"""The load generator: all carriers and their services in one process, `python -m gateway.bench.load` with a Load on stdin.

One thread, one epoll, no event loop: it must cost less than what it measures. Tells its progress and then what it measured, as
lines of JSON on stdout.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import clock_gettime, process_time
from time import perf_counter as clock

import msgspec
import numpy as np

from gateway.alignment import align
from gateway.bench import TICK_MS, TICK_SECS, Latency, Load, Measured, Sound
from gateway.bench.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    CarrierFrames,
    ServiceFrames,
    Speech,
    message,
    number_of,
    to_pcm,
    upgrade,
    upgraded,
)
from gateway.bench.host import busy_secs, family, pss_bytes
from gateway.events import Audio, Checkpoint
from gateway.media import MediaFormat
from gateway.provider import Carrier
from gateway.services.framed import HEADER_BYTES, SUBPROTOCOL_FRAMED
from gateway.services.native import SUBPROTOCOL_RAW

TAIL_SECS = 0.5
"""Sending goes on for so long after the last frame that counts: it must not have an easier time than the others."""

CONNECT_SECS = 30.0
"""All calls are up so long after the last of them was dialled, or the round has failed."""

AT_ONCE = 20
"""Calls that may be in the middle of their handshakes."""

EVENTS = 32
"""Sockets that are read before the clock is looked at again."""

ACK_EVERY = 10
SMALL = 200
"""A carrier's frame beyond so many bytes is audio, and its size tells how much."""


class Failed(Exception):
    """The round can't be run. `str(error)` says why."""


class Track:
    """One direction of one call: when each of its frames was sent, and how many have arrived."""

    __slots__ = ("bytes", "sent", "tap", "tap_at", "unit", "unit_bytes", "units", "waits")

    def __init__(self, media_format: MediaFormat, unit: int) -> None:
        self.sent: list[float] = []
        self.unit = unit
        """Frames that arrive together."""
        self.unit_bytes = media_format.bytes_for(TICK_MS) * unit
        self.bytes = 0
        self.units = 0
        self.waits: list[float] = []
        self.tap: list[bytes] | None = None
        """Where it is listened to, what arrives."""
        self.tap_at = 0

    def take(self, size: int, now: float, begin: float, end: float) -> None:
        """Audio of so many bytes has arrived."""
        self.bytes += size
        while self.bytes >= (self.units + 1) * self.unit_bytes:
            self.units += 1
            at = self.units * self.unit - 1
            if at < len(self.sent) and begin <= self.sent[at] < end:
                self.waits.append(now - self.sent[at])

    @property
    def missing(self) -> int:
        return max(0, len(self.sent) // self.unit - self.units) * self.unit


class Peer(ABC):
    """One socket of ours."""

    __slots__ = ("backlog", "begun", "generator", "over", "rest", "sock")

    def __init__(self, generator: Generator, sock: socket.socket) -> None:
        self.generator = generator
        self.sock = sock
        self.rest = b""
        self.backlog = b""
        self.begun = False
        """Whether the HTTP upgrade is done."""
        self.over = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        if self.backlog:
            data = self.backlog + data
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.lose(f"a connection broke: {error.strerror}")
            return
        if sent < len(data):
            self.backlog = data[sent:]
            self.generator.stalled += 1
        else:
            self.backlog = b""

    def read(self) -> None:
        buffer = self.generator.buffer
        try:
            size = self.sock.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(f"a connection broke: {error.strerror}")
            return
        if not size:
            self.lose("a connection was closed")
            return
        now = clock()
        if not self.begun:
            self.rest += bytes(buffer[:size])
            head, end, rest = self.rest.partition(b"\r\n\r\n")
            if end:
                self.rest = rest
                self.begun = True
                self.greet(head)
            return
        if self.rest:
            data = self.rest + bytes(buffer[:size])
            self.rest = b""
            at = self.messages(memoryview(data), len(data), now)
            self.rest = data[at:]
        else:
            at = self.messages(buffer, size, now)
            if at < size:
                self.rest = bytes(buffer[at:size])

    def messages(self, data: memoryview, size: int, now: float) -> int:
        """Take whole messages; returns where the rest begins."""
        at = 0
        while size - at >= 2:
            length, body = data[at + 1], at + 2
            masked = length & 0x80
            length &= 0x7F
            if length == 126:
                length, body = (data[at + 2] << 8) | data[at + 3] if size - at >= 4 else size, at + 4
            elif length == 127:
                length, body = int.from_bytes(data[at + 2 : at + 10], "big") if size - at >= 10 else size, at + 10
            if masked:
                body += 4
            end = body + length
            if end > size:
                break
            opcode = data[at] & 0x0F
            if opcode >= CLOSE:
                self.control(opcode, unmasked(data, body, end, masked))
            else:
                self.take(opcode, data, body, end, now)
            at = end
        return at

    def control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self.send(message(PONG, payload, masked=isinstance(self, Caller)))
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big")
            self.lose(f"a stream was closed with {code} {payload[2:].decode(errors='replace')}".rstrip())

    def lose(self, why: str) -> None:
        if not self.over and not self.generator.ending:
            self.generator.complain(why)
        self.over = True
        self.generator.forget(self)

    @abstractmethod
    def greet(self, head: bytes) -> None: ...

    @abstractmethod
    def take(self, opcode: int, data: memoryview, begin: int, end: int, now: float) -> None: ...


class Caller(Peer):
    """A carrier's end of one call."""

    __slots__ = ("carrier", "down", "frames", "name", "number", "ready", "tick", "up")

    def __init__(self, generator: Generator, sock: socket.socket, number: int) -> None:
        super().__init__(generator, sock)
        load = generator.load
        self.number = number
        self.ready = not load.service_port
        self.tick = 0
        self.carrier: Carrier
        self.name = b""
        self.up = Track(load.service_format, load.frame_ms // TICK_MS)
        self.down = Track(load.carrier_format, 1)

    def greet(self, head: bytes) -> None:
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            raise Failed(f"the subject refused a stream: {head.splitlines()[0].decode(errors='replace')}")
        self.carrier, frames, self.name = self.generator.carriers.open(self.number)
        self.send(frames)
        self.generator.opening -= 1
        if self.ready:
            self.generator.call_is_up(self)

    def take(self, opcode: int, data: memoryview, begin: int, end: int, now: float) -> None:
        generator = self.generator
        size = generator.sizes.get(end - begin) if end - begin > SMALL else None
        if size is None:
            size = self._learn(bytes(data[begin:end]))
            if not size:
                return
        track = self.down
        if track.tap is not None:
            for command in self.carrier.decode(str(data[begin:end], "utf-8")):
                if isinstance(command, Audio):
                    track.tap.append(command.payload)
        track.take(size, now, generator.begin, generator.end)

    def _learn(self, text: bytes) -> int:
        """How much audio a message of this length has; what else it is, is carried out."""
        size = 0
        for command in self.carrier.decode(text.decode()):
            if isinstance(command, Audio):
                size += len(command.payload)
            elif isinstance(command, Checkpoint):
                for frame in self.carrier.encode(command):
                    self.send(message(TEXT, frame.encode() if isinstance(frame, str) else frame, masked=True))
        if size and len(text) > SMALL:
            self.generator.sizes[len(text)] = size
        return size

    def speak(self, now: float) -> None:
        """Send what is due."""
        tick, generator = self.tick, self.generator
        track = self.up if generator.load.service_port else self.down
        track.sent.append(now)
        self.tick = tick + 1
        self.send(generator.carriers.heads[tick] + self.name + generator.carriers.tails[tick])


class Servant(Peer):
    """A service's end of one call, or a listener's."""

    __slots__ = ("caller", "framed", "heard", "listener", "seen", "tick")

    def __init__(self, generator: Generator, sock: socket.socket) -> None:
        super().__init__(generator, sock)
        self.caller: Caller | None = None
        self.framed = False
        self.listener = False
        self.heard = 0
        self.seen = 0
        self.tick = 0

    def greet(self, head: bytes) -> None:
        wanted = SUBPROTOCOL_FRAMED if self.generator.load.framed else SUBPROTOCOL_RAW
        offered = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-protocol:")), b"")
        chosen = wanted if wanted in [each.strip() for each in offered.decode().partition(":")[2].split(",")] else None
        self.framed = chosen == SUBPROTOCOL_FRAMED
        self.send(upgraded(head, chosen))

    def take(self, opcode: int, data: memoryview, begin: int, end: int, now: float) -> None:
        if opcode != BINARY:
            self._read(json.loads(unmasked(data, begin, end, 1)))
            return
        size = end - begin
        if self.framed:
            size -= HEADER_BYTES
            self.seen += 1
            if not self.seen % ACK_EVERY:
                self.send(message(TEXT, b'{"type":"ack","seq":%d}' % (self.seen - 1), masked=False))
        self.heard += size
        caller = self.caller
        if caller is None or self.listener:
            return
        track, generator = caller.up, self.generator
        if track.tap is not None:
            track.tap.append(unmasked(data, end - size, end, 1, begin))
        track.take(size, now, generator.begin, generator.end)

    def _read(self, words: dict[str, object]) -> None:
        kind = words.get("type")
        if kind == "start":
            self.caller = self.generator.callers[number_of(str(words["call_id"]))]
            self.listener = words.get("role") == "listener"
            if self.framed:
                self.send(message(TEXT, b'{"type":"ready"}', masked=False))
            if not self.listener and not self.caller.ready:
                self.caller.ready = True
                self.generator.call_is_up(self.caller, self)
        elif kind in ("fault", "gap", "flow"):
            self.generator.complain(f"the service was told of a {kind}: {json.dumps(words)}")

    def speak(self, now: float) -> None:
        tick, caller = self.tick, self.caller
        if caller is not None:
            caller.down.sent.append(now)
        self.tick = tick + 1
        self.send(self.generator.services.messages[tick])


Speaker = Caller | Servant


class Generator:
    """One round: dial, warm up, measure, hang up."""

    def __init__(self, load: Load, tell: Callable[[dict[str, object]], None]) -> None:
        self.load = load
        self._tell = tell
        secs = load.calls / load.ramp_per_sec + CONNECT_SECS + load.warm_up_secs + load.seconds + TAIL_SECS
        self.carriers = CarrierFrames(load.kind, load.carrier_format, secs)
        self.services = ServiceFrames(load.service_format, load.framed, secs if load.service_port else 0)
        self.buffer = memoryview(bytearray(1 << 20))
        self.sizes: dict[int, int] = {}
        self.callers: list[Caller] = []
        self.begin = self.end = float("inf")
        self.opening = 0
        self.stalled = 0
        self.ending = False
        self.trouble: dict[str, int] = {}
        self._poll = select.epoll()
        self._peers: dict[int, Peer] = {}
        self._listener: socket.socket | None = None
        self._random = random.Random(load.seed)  # noqa: S311 phases need no secrecy
        self._phases = [(self._random.random(), self._random.random()) for _ in range(load.calls)]
        self._ring: list[tuple[float, Speaker]] = []  # by phase, as a share of 20 ms
        self._at = 0
        self._lap = 0.0
        self._origin = 0.0
        self._up = 0
        self._late: list[float] = []

    def run(self) -> Measured:
        load = self.load
        gc.disable()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if load.service_port:
            self._listener = socket.create_server(("127.0.0.1", load.service_port), backlog=1024)
            self._listener.setblocking(False)
            self._poll.register(self._listener, select.EPOLLIN)
        self._origin = clock()
        self._ramp()
        self.begin = clock() + load.warm_up_secs
        self.end = self.begin + load.seconds
        self._tell({"phase": "warming up", "up": self._up})
        self._until(self.begin)
        self._tell({"phase": "measuring", "up": self._up})
        first = self.callers[0]
        for track in (first.up, first.down):
            track.tap, track.tap_at = [], track.bytes
        pids = family(load.pid)
        heard = [peer.heard for peer in self._servants(listeners=True)]
        began = self._sums(), self._cpu(pids), process_time(), busy_secs(), clock()
        self._until(self.end)
        ended = self._sums(), self._cpu(pids), process_time(), busy_secs(), clock()
        heard = [peer.heard - before for peer, before in zip(self._servants(listeners=True), heard, strict=False)]
        taps, first.up.tap, first.down.tap = (first.up.tap or [], first.down.tap or []), None, None
        memory = sum(pss_bytes(pid) for pid in pids)
        self._until(self.end + TAIL_SECS, sending=True)
        self._until(clock() + TAIL_SECS, sending=False)
        tracks = [track for caller in self.callers for track in (caller.up, caller.down)]
        missing = sum(max(0, track.missing - load.held_frames) for track in tracks)
        self._hang_up()
        if self.stalled:
            self.complain("the subject did not read: a socket's buffer was full", self.stalled)
        seconds = ended[4] - began[4]
        subject, own = ended[1] - began[1], ended[2] - began[2]
        tick_bytes = load.service_format.bytes_for(TICK_MS)
        return Measured(
            seconds=seconds,
            up_frames=ended[0][0] - began[0][0],
            down_frames=ended[0][1] - began[0][1],
            subject_cpu_secs=subject,
            own_cpu_secs=own,
            foreign_cpu_secs=max(0.0, ended[3] - began[3] - subject - own),
            up=spread([wait for caller in self.callers for wait in caller.up.waits]) if load.service_port else None,
            down=spread([wait for caller in self.callers for wait in caller.down.waits]),
            lateness=spread(self._late) or Latency(0, 0, 0, 0, 0, 0),
            missing_frames=missing,
            listened_frames=sum(heard) // tick_bytes,
            sound_up=sound(self.carriers.speech, taps[0], first.up.tap_at, load.service_format),
            sound_down=sound(
                self.services.speech if load.service_port else self.carriers.speech,
                taps[1],
                first.down.tap_at,
                load.carrier_format,
            ),
            memory_bytes=memory,
            trouble=[f"{why} ({count} times)" if count > 1 else why for why, count in self.trouble.items()],
        )

    # --- what peers tell ---

    def complain(self, why: str, times: int = 1) -> None:
        if why in self.trouble or len(self.trouble) < 10:
            self.trouble[why] = self.trouble.get(why, 0) + times

    def forget(self, peer: Peer) -> None:
        if self._peers.pop(peer.sock.fileno(), None) is not None:
            self._poll.unregister(peer.sock)
            peer.sock.close()

    def call_is_up(self, caller: Caller, servant: Servant | None = None) -> None:
        """Both ends are there: from its next turn on each of them speaks."""
        self._up += 1
        phases = self._phases[caller.number]
        self._ring.append((phases[0], caller))
        if servant is not None:
            self._ring.append((phases[1], servant))
        self._ring.sort(key=lambda each: each[0])
        self._resume(clock())

    def _resume(self, now: float) -> None:
        """Find the next turn anew: the ring has changed."""
        self._lap, share = divmod((now - self._origin) / TICK_SECS, 1)
        self._at = next((at for at, (phase, _) in enumerate(self._ring) if phase >= share), len(self._ring))

    # --- the loop ---

    def _ramp(self) -> None:
        load, began = self.load, clock()
        told = 0.0
        while self._up < load.calls:
            now = clock()
            due = len(self.callers) < min(load.calls, (now - began) * load.ramp_per_sec + 1)
            if due and self.opening < AT_ONCE:
                self._dial()
            if now > began + load.calls / load.ramp_per_sec + CONNECT_SECS or self.trouble:
                why = "; ".join(self.trouble) or f"after {now - began:.0f} s"
                raise Failed(f"only {self._up} of {load.calls} calls came up: {why}")
            if now > told + 0.5:
                told = now
                self._tell({"phase": "connecting", "up": self._up})
            self._until(now + 0.002)

    def _dial(self) -> None:
        sock = socket.socket()
        sock.connect(("127.0.0.1", self.load.port))  # on loopback done at once
        caller = Caller(self, sock, len(self.callers))
        self.callers.append(caller)
        self.opening += 1
        self._watch(caller)
        caller.send(upgrade(self.load.path, self.carriers.subprotocol))

    def _watch(self, peer: Peer) -> None:
        self._peers[peer.sock.fileno()] = peer
        self._poll.register(peer.sock, select.EPOLLIN)

    def _until(self, end: float, *, sending: bool = True) -> None:
        """Send what is due and read what comes."""
        poll, peers, late = self._poll, self._peers, self._late
        number = poll.fileno()
        accepting = self._listener.fileno() if self._listener is not None else -1
        while True:
            due = end
            if sending and self._ring:
                while True:
                    ring = self._ring
                    if self._at >= len(ring):
                        self._at, self._lap = 0, self._lap + 1
                    due = self._origin + (self._lap + ring[self._at][0]) * TICK_SECS
                    now = clock()
                    if due > now or due >= end:
                        break
                    speaker = ring[self._at][1]
                    self._at += 1
                    if not speaker.over:
                        speaker.speak(now)
                        if now >= self.begin:
                            late.append(now - due)
            now = clock()
            if now >= end:
                return
            # epoll itself waits in whole milliseconds
            ready, _, _ = select.select([number], [], [], max(0.0, min(due, end) - now))
            if ready:
                for file, _ in poll.poll(0, EVENTS):
                    if file == accepting:
                        self._accept()
                    elif peer := peers.get(file):
                        peer.read()

    def _accept(self) -> None:
        assert self._listener is not None  # noqa: S101 it is what is ready
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._watch(Servant(self, sock))

    def _hang_up(self) -> None:
        self._tell({"phase": "hanging up", "up": self._up})
        self.ending = True
        for caller in self.callers:
            if not caller.over:
                caller.send(self.carriers.close(caller.carrier))
        end = clock() + 3.0
        while self._peers and clock() < end:
            self._until(clock() + 0.05, sending=False)
        for peer in [*self._peers.values()]:
            self.forget(peer)

    # --- figures ---

    def _servants(self, *, listeners: bool) -> list[Servant]:
        return [peer for peer in self._peers.values() if isinstance(peer, Servant) and peer.listener is listeners]

    def _sums(self) -> tuple[int, int]:
        return (
            sum(caller.up.units * caller.up.unit for caller in self.callers),
            sum(caller.down.units * caller.down.unit for caller in self.callers),
        )

    @staticmethod
    def _cpu(pids: list[int]) -> float:
        return sum(clock_gettime((~pid << 3) | 2) for pid in pids)  # the clock of a process's CPU time, clock_getcpuclockid(3)


def sound(said: Speech, tap: list[bytes], at: int, media_format: MediaFormat) -> Sound | None:
    """How what arrived, from the byte `at` on, differs from what was said; None: it is something else."""
    clip = said.pcm(0, len(said.pieces))
    received = to_pcm(b"".join(tap), media_format)[: len(clip)]
    theirs, ours = (np.frombuffer(pcm, "<i2").astype(np.float64) for pcm in (received, clip * 2))
    found = align(theirs, ours)
    if found is None:
        return None
    clip_ms = len(said.pieces) * TICK_MS
    behind_ms = (media_format.duration_ms(at) - found[0] / 8 + clip_ms / 2) % clip_ms - clip_ms / 2
    return Sound(round(found[1], 4), round(behind_ms, 3))


def unmasked(data: memoryview, begin: int, end: int, masked: int, body: int | None = None) -> bytes:
    """Bytes of a message; its mask, if it has one, is the four bytes before its `body`."""
    if not masked or begin == end:
        return bytes(data[begin:end])
    body = begin if body is None else body
    mask = np.frombuffer(data[body - 4 : body], np.uint8)
    mask = np.resize(np.roll(mask, body - begin), end - begin)
    return np.bitwise_xor(np.frombuffer(data[begin:end], np.uint8), mask).tobytes()


def spread(waits: list[float]) -> Latency | None:
    """Of seconds."""
    if not waits:
        return None
    p50, p90, p99, p999 = np.percentile(waits, [50, 90, 99, 99.9]) * 1000
    return Latency(len(waits), *(round(float(each), 3) for each in (p50, p90, p99, p999, max(waits) * 1000)))


def main() -> None:
    what = sys.stdin.buffer.readline()
    if not what:
        sys.exit(1)  # whoever started us is gone
    load = msgspec.json.decode(what, type=Load)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def tell(what: dict[str, object]) -> None:
        os.write(1, msgspec.json.encode(what) + b"\n")

    try:
        measured = Generator(load, tell).run()
    except (Failed, OSError) as error:
        tell({"failed": str(error)})
        sys.exit(1)
    tell({"measured": measured})


if __name__ == "__main__":
    main()
