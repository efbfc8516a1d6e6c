"""The two halves of a caller that carriers of sound share: an ear that plays one FIFO in real time, a mouth of 20 ms chunks."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from websockets.exceptions import ConnectionClosed

from .wire import Peer

Pace = Literal["real", "fast"]
OVERFLOW_BYTES = 128 * 1024
"""The carrier's buffer toward a gateway that does not read: about six seconds of audio."""


@dataclass(eq=False)
class Stretch:
    """Audio that plays from `start` to `end` (seconds)."""

    start: float
    end: float
    data: bytes
    silent: bool
    joined: bool


@dataclass(eq=False)
class Mark:
    name: str
    due: float
    outcome: str = "played"


@dataclass(eq=False)
class Cleared:
    at: float
    buffered_ms: float
    marks: list[str] = field(default_factory=list)


class Ear:
    """Queue arithmetic of a real-time playout; times are arguments, so it can be asked without waiting."""

    def __init__(self, bytes_per_ms: int, silence: bytes, width: int) -> None:
        self.bytes_per_ms, self.silence, self.width = bytes_per_ms, silence, width
        self.stretches: list[Stretch] = []
        self.marks: deque[Mark] = deque()
        self.clears: list[Cleared] = []
        self.max_buffered_ms = 0.0
        self._end = 0.0

    def buffered_ms(self, now: float) -> float:
        return max(0.0, self._end - now) * 1000

    def play(self, data: bytes, now: float) -> None:
        joined = self._end >= now and bool(self.stretches)
        start = self._end if joined else now
        self._end = start + len(data) / self.bytes_per_ms / 1000
        quiet = not data.strip(b"\xff\x7f" if self.width == 1 else b"\0")
        self.stretches.append(Stretch(start, self._end, data, quiet, joined))
        self.max_buffered_ms = max(self.max_buffered_ms, self.buffered_ms(now))

    def mark(self, name: str, now: float) -> None:
        empty = self._end <= now
        self.marks.append(Mark(name, max(self._end, now), "empty" if empty else "played"))

    def clear(self, now: float) -> Cleared:
        """Drop what was not played. The marks stay for the owner to echo or forget."""
        cleared = Cleared(now, self.buffered_ms(now), [mark.name for mark in self.marks if mark.due > now])
        self.clears.append(cleared)
        for mark in self.marks:
            if mark.due > now:
                mark.due, mark.outcome = now, "cleared"
        while self.stretches and self.stretches[-1].start >= now:
            self.stretches.pop()
        if self.stretches and self.stretches[-1].end > now:
            last = self.stretches[-1]
            last.data, last.end = last.data[: self._bytes(now - last.start)], now
        self._end = min(self._end, now)
        return cleared

    def _bytes(self, seconds: float) -> int:
        return round(seconds * 1000 * self.bytes_per_ms / self.width) * self.width

    def heard(self, now: float) -> bytes:
        """All that reached the caller from the first sample on, underrun filled with silence."""
        out = bytearray()
        for stretch in self.stretches:
            if stretch.start >= now:
                break
            if not stretch.joined:
                missing = self._bytes(stretch.start - self.stretches[0].start) - len(out)
                out += self.silence * (max(0, missing) // len(self.silence))
            out += stretch.data if stretch.end <= now else stretch.data[: self._bytes(now - stretch.start)]
        return bytes(out)

    def underruns(self) -> list[tuple[float, float]]:
        """(seconds since the first sample, milliseconds missing) wherever audio came too late; not after a clear."""
        found = []
        for before, after in pairwise(self.stretches):
            if not after.joined and not any(before.end <= c.at <= after.start for c in self.clears):
                found.append((before.end - self.stretches[0].start, (after.start - before.end) * 1000))
        return found

    def quiet_after(self, at: float, quiet_ms: float = 60.0) -> float:
        """Milliseconds from `at` until the caller hears at least `quiet_ms` of nothing (silence samples count as nothing)."""
        head = at
        for stretch in self.stretches:
            if stretch.silent or stretch.end <= head:
                continue
            if (stretch.start - head) * 1000 >= quiet_ms:
                break
            head = stretch.end
        return (head - at) * 1000


class AudioPeer(Peer, ABC):
    """A carrier's end that carries sound."""

    overflow_code = "media buffer overflow"
    bytes_per_ms: int
    width: int
    silence: bytes

    def __init__(
        self,
        url: str,
        *,
        audio: bytes | Mapping[str, bytes] | None = None,
        tracks: tuple[str, ...] = ("inbound",),
        pace: Pace = "real",
        line_silence: bool = False,
        ragged: bool = False,
        jitter_ms: float = 0.0,
        first_timestamp: int = 155,
        **peer: Any,
    ) -> None:
        super().__init__(url, **peer)
        self.audio, self.tracks, self.pace = audio, tracks, pace
        self.line_silence, self.ragged, self.jitter_ms = line_silence, ragged, jitter_ms
        self.first_timestamp = first_timestamp
        self.ear = Ear(self.bytes_per_ms, self.silence, self.width)
        self.marks: list[str] = []
        """Names sent back, in order."""
        self.mark_log: list[tuple[str, float, str]] = []
        """(name, time, `played`, `empty` or `cleared`)."""
        self.frames_sent = 0
        self.stopped = False
        self.said = asyncio.Event()
        """Set when the `audio` given at construction has been spoken."""
        self._mouth = asyncio.Lock()
        self._due = 0.0
        self._clock_ms = float(first_timestamp)
        self._wake = asyncio.Event()

    # What a subclass writes.

    @abstractmethod
    async def _send_media(self, track: str, data: bytes, timestamp_ms: int) -> None: ...

    @abstractmethod
    async def _send_mark(self, mark: Mark) -> None: ...

    # The ear.

    async def _begin(self) -> None:
        self._spawn(self._play_out())
        self._spawn(self._talk())

    async def _play_out(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                self._wake.clear()
                if not self.ear.marks:
                    await self._wake.wait()
                elif (wait := self.ear.marks[0].due - self.now()) > 0:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), wait)
                elif self.stopped:
                    return
                else:
                    mark = self.ear.marks.popleft()
                    self.marks.append(mark.name)
                    self.mark_log.append((mark.name, self.now(), mark.outcome))
                    await self._send_mark(mark)
                    self.changed()

    def _queue(self, data: bytes) -> None:
        self.ear.play(data, self.now())

    def _queue_mark(self, name: str) -> None:
        self.ear.mark(name, self.now())
        self._wake.set()

    @property
    def heard(self) -> bytes:
        """What the caller heard up to now, in the stream's format, from the first sample on; underrun is silence."""
        return self.ear.heard(self.now())

    @property
    def played(self) -> bytes:
        """`heard` without the fill: the gateway's samples alone (cleared ones left out)."""
        now = self.now()
        return b"".join(
            s.data if s.end <= now else s.data[: self.ear._bytes(now - s.start)] for s in self.ear.stretches if s.start < now
        )

    @property
    def buffered_ms(self) -> float:
        return self.ear.buffered_ms(self.now())

    @property
    def max_buffered_ms(self) -> float:
        """The most that ever lay unplayed at the carrier."""
        return self.ear.max_buffered_ms

    @property
    def underruns(self) -> list[tuple[float, float]]:
        return self.ear.underruns()

    @property
    def clear_to_silence_ms(self) -> list[float]:
        """For each clear: from its arrival to the first 60 ms of nothing heard; later audio counts against it."""
        return [self.ear.quiet_after(clear.at) for clear in self.ear.clears]

    async def played_out(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109
        """Wait until something was played and nothing is left, marks included."""
        await self.until(lambda: self.ear.stretches and not self.buffered_ms and not self.ear.marks, timeout)

    # The mouth.

    async def _talk(self) -> None:
        with suppress(ConnectionClosed):
            if self.audio is not None:
                await self.speak(self.audio)
            self.said.set()
            self.changed()
            while self.line_silence and not (self.stopped or self.closed.is_set()):  # else nothing in here would ever wait
                if self._mouth.locked():
                    await asyncio.sleep(0.02)
                else:
                    await self.speak(b"", at_least_frames=1, pace="real")

    async def speak(self, audio: bytes | Mapping[str, bytes], *, pace: Pace | None = None, at_least_frames: int = 0) -> int:
        """Say these samples (one track, or a mapping of tracks); returns the frames sent, fewer if the socket closed.

        `real` keeps an absolute 20 ms schedule over successive calls, and a pause between calls shows as a jump of the
        timestamps, as on the wire. `fast` sends at once and counts 20 ms per chunk.
        """
        tracks = {self.tracks[0]: audio} if isinstance(audio, bytes) else dict(audio)
        step = 20 * self.bytes_per_ms
        real = (pace or self.pace) == "real"
        longest = max([len(data) for data in tracks.values()] + [at_least_frames * step])
        sent = at = 0
        async with self._mouth:
            now = self.now()
            self._due = max(self._due, now) if real else now
            natural = self.first_timestamp + (now - self.opened_at) * 1000
            if real and self._clock_ms < natural - 20:
                self._clock_ms = natural
            while at < longest and not self.closed.is_set():
                size = self.random.randrange(1, 2 * step) if self.ragged else step
                size = min(size, longest - at) if self.ragged else size
                if real:
                    late = self.random.random() * self.jitter_ms / 1000 if self.jitter_ms else 0.0
                    await asyncio.sleep(max(0.0, self._due + late - self.now()))
                elif sent % 32 == 31:
                    await asyncio.sleep(0)
                for track, data in tracks.items():
                    piece = data[at : at + size]
                    if not self.ragged:
                        piece += self.silence * ((size - len(piece)) // len(self.silence))
                    if piece and not await self._offer(track, piece, wait=not real):
                        return sent
                sent += 1
                at += size
                self._clock_ms += size / self.bytes_per_ms
                self._due += size / self.bytes_per_ms / 1000
        return sent

    async def _offer(self, track: str, piece: bytes, *, wait: bool) -> bool:
        transport = self.ws.transport
        if self.stopped:
            return False
        if wait:
            for _ in range(500):
                if transport.get_write_buffer_size() <= OVERFLOW_BYTES:
                    break
                await asyncio.sleep(0.01)
        if transport.get_write_buffer_size() > OVERFLOW_BYTES:
            self.violate(f"{self.overflow_code}: the gateway does not read")
            return True
        try:
            await self._send_media(track, piece, int(self._clock_ms))
        except ConnectionClosed:
            return False
        self.frames_sent += 1
        return True

    async def gap(self, milliseconds: int, *, pace: Pace | None = None) -> None:
        """Send nothing for a while; the timestamps jump by it."""
        async with self._mouth:
            if (pace or self.pace) == "real":
                self._due = max(self._due, self.now()) + milliseconds / 1000
                await asyncio.sleep(max(0.0, self._due - self.now()))
            self._clock_ms += milliseconds
