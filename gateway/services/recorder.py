"""The recorder: a stereo WAV of each stream, the caller left and what the caller really heard right, and a log of its events.

While a call runs its audio is in `NAME.wav.part`, whose header is right for what is there up to the last second; at the end it
becomes `NAME.wav`. What a process left behind that died is finished by the next one that records into the same directory.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import struct
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from gateway import logs
from gateway.events import Audio, BargeIn, Event, Gap, Spoken, Start, Stop, Transcript
from gateway.media import Track
from gateway.recording import FRAME_BYTES, Layout
from gateway.scribe import Pen, Scribe
from gateway.services import Line, LinkFigures
from gateway.settings import RecorderService

CAPACITY_BYTES = 4 * 2**20
"""What may wait for the disk, of one stream; beyond it the subscription sheds, and the recording has silence of that length."""

POLL_SECS = 0.1
WRITE_SECS = 1.0
"""Audio is written in pieces of this, with the header that goes with it: what a killed process loses."""

HEADER_BYTES = 44
LARGEST_DATA_BYTES = 2**32 - 2**16
"""A WAV file tells its length in 32 bits."""

PART = ".part"
_LONGEST_ID = 80

Batch = tuple[float, list[Event]]
"""Seconds since the stream began, and what has happened."""


def header(sample_rate: int, data_bytes: int) -> bytes:
    """Of a 16-bit stereo WAV."""
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 2, sample_rate, sample_rate * FRAME_BYTES, FRAME_BYTES, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + data_bytes, b"WAVE") + fmt + struct.pack("<4sI", b"data", data_bytes)


def recover(directory: Path) -> list[Path]:
    """Finish what processes that died have left in `directory`. Recordings that are being written are left alone."""
    finished = []
    for part in sorted(directory.rglob(f"*.wav{PART}")):
        with suppress(OSError), part.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody is writing it
            target = part.with_suffix("")
            head = file.read(HEADER_BYTES)
            if len(head) < HEADER_BYTES or target.exists():
                continue
            (rate,) = struct.unpack_from("<I", head, 24)
            data = (file.seek(0, os.SEEK_END) - HEADER_BYTES) // FRAME_BYTES * FRAME_BYTES
            file.truncate(HEADER_BYTES + data)
            file.seek(0)
            file.write(header(rate, data))
            part.rename(target)
            finished.append(target)
            duration_ms = data // FRAME_BYTES * 1000 // rate
            with target.with_suffix(".jsonl").open("a+b") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 1))
                torn = log.read() not in (b"", b"\n")  # it died in the middle of a line
                log.write(b'%s{"at_ms":%d,"type":"recovered","duration_ms":%d}\n' % (b"\n" * torn, duration_ms, duration_ms))
    return finished


class Recording:
    """The files of one stream. Used on the scribe's thread only; raises OSError."""

    def __init__(self, service: RecorderService, facts: dict[str, str], start: Start) -> None:
        """`facts`: session, provider, kind."""
        self._transcripts = service.transcripts
        self._layout = Layout(start) if start.media_format is not None else None
        self._pending = bytearray()
        self._data_bytes = 0
        self._audio = -1
        self._log = -1
        began = datetime.now(UTC)
        self._path = self._create(Path(service.directory), _name(service.name, facts, start, began))
        rate = self._layout.sample_rate if self._layout is not None else None
        about: dict[str, Any] = {"time": began.isoformat(timespec="milliseconds"), **facts}
        if self._layout is not None:
            about |= {"audio": self._path.name, "sample_rate": rate, "left": "caller", "right": "heard by the caller"}
        self._note(0, {"type": "recording", **about})

    def write(self, batch: Batch) -> None:
        elapsed, events = batch
        layout = self._layout
        for event in events:
            if layout is not None:
                layout.add(event)
            if type(event) is not Audio:
                at_ms = layout.position_ms if layout is not None else round(elapsed * 1000)
                if type(event) is Gap and layout is not None:
                    at_ms = max(0, layout.track_ms(event.track) - event.lost_ms)  # where the hole begins
                self._note(at_ms, line(event, transcripts=self._transcripts))
        if layout is not None:
            self._take(layout, WRITE_SECS)

    def close(self, failure: Exception | None) -> None:
        try:
            if failure is None and self._layout is not None:
                self._layout.finish()
                self._take(self._layout, 0)
        except Exception as error:
            failure = error
            raise
        finally:
            self._finish(failure)

    def _take(self, layout: Layout, at_least_secs: float) -> None:
        least = int(at_least_secs * layout.sample_rate) * FRAME_BYTES
        for block in layout.frames():
            self._pending += block
            if len(self._pending) >= least:
                self._flush(layout)
        if len(self._pending) >= max(least, 1):
            self._flush(layout)

    def _flush(self, layout: Layout) -> None:
        if self._data_bytes + len(self._pending) > LARGEST_DATA_BYTES:
            raise OSError(errno.EFBIG, "a WAV file holds no more than 4 GiB")
        view = memoryview(bytes(self._pending))
        self._pending.clear()
        while view:
            written = os.pwrite(self._audio, view, HEADER_BYTES + self._data_bytes)
            self._data_bytes += written
            view = view[written:]
        os.pwrite(self._audio, header(layout.sample_rate, self._data_bytes), 0)

    def _finish(self, failure: Exception | None) -> None:
        if self._audio >= 0 and self._layout is not None:
            whole = self._data_bytes // FRAME_BYTES * FRAME_BYTES
            with suppress(OSError):
                os.ftruncate(self._audio, HEADER_BYTES + whole)
                os.pwrite(self._audio, header(self._layout.sample_rate, whole), 0)
            with suppress(OSError):
                self._part.rename(self._path)
            os.close(self._audio)
        with suppress(OSError):
            at_ms = self._layout.position_ms if self._layout is not None else 0
            if failure is not None:
                self._note(at_ms, {"type": "recording_failed", "error": str(failure)})
            elif self._layout is not None:
                length_ms = round(self._data_bytes // FRAME_BYTES * 1000 / self._layout.sample_rate)
                self._note(at_ms, {"type": "end", "duration_ms": length_ms})
        os.close(self._log)

    @property
    def _part(self) -> Path:
        return self._path.with_name(self._path.name + PART)

    def _create(self, directory: Path, name: str) -> Path:
        """Open both files under a name that nobody has. Private: who may read them is for their owner to widen."""
        flags = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        for number in range(1, 100):
            path = directory / f"{name}{'' if number == 1 else f'-{number}'}.wav"
            for each in reversed((path.parent, *path.parent.parents)):
                each.mkdir(exist_ok=True, mode=0o700)
            if path.exists():
                continue
            with suppress(FileExistsError):
                self._log = os.open(path.with_suffix(".jsonl"), flags | os.O_WRONLY | os.O_APPEND, 0o600)
                if self._layout is None:
                    return path
                try:
                    self._audio = os.open(path.with_name(path.name + PART), flags | os.O_RDWR, 0o600)
                    fcntl.flock(self._audio, fcntl.LOCK_EX)
                    os.pwrite(self._audio, header(self._layout.sample_rate, 0), 0)
                except OSError:
                    os.close(self._log)
                    raise
                return path
        raise FileExistsError(errno.EEXIST, f"a hundred recordings are called {name}")

    def _note(self, at_ms: int, what: dict[str, Any]) -> None:
        os.write(self._log, msgspec.json.encode({"at_ms": at_ms, **what}) + b"\n")


def line(event: Event, *, transcripts: bool) -> dict[str, Any]:
    """What the log says of an event: no digits, no numbers, no parameters, and no words unless `transcripts`."""
    fields = {key: getattr(event, key) for key in event.__struct_fields__}
    told = {
        key: msgspec.to_builtins(value)
        for key, value in fields.items()
        if value not in (None, "", (), {}) and (key, value) != ("tones", False)
    }
    masked = dict(logs.redact(None, "", told))
    if transcripts and isinstance(event, (Transcript, BargeIn, Spoken)) and "tones" not in told:
        masked.update((key, told[key]) for key in ("text", "heard") if key in told)
    kind = re.sub("(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    return {"type": kind, **masked}


def _name(pattern: str, facts: dict[str, str], start: Start, began: datetime) -> str:
    """The file's name, without its ending. What comes from the carrier can't leave the directory."""
    known = {
        "date": began.strftime("%Y-%m-%d"),
        "time": began.strftime("%Y%m%dT%H%M%SZ"),
        "call_id": start.call_id,
        "provider": facts["provider"],
        "session": facts["session"],
    }
    plain = {key: re.sub("[^A-Za-z0-9_-]", "_", value)[:_LONGEST_ID] or "_" for key, value in known.items()}
    return re.sub(r"\{(\w+)\}", lambda found: plain[found[1]], pattern)


def prepare(service: RecorderService) -> Scribe:
    """The scribe for a recorder's directory, which first finishes what lies there unfinished."""
    directory = Path(service.directory)
    return Scribe.at(directory, lambda: recover(directory))


class RecorderLink:
    """Records one stream, as a listener or, a silent one, as its only service."""

    held_bytes = 0
    """See `Link`."""

    def __init__(self, name: str, service: RecorderService, line: Line) -> None:
        self._name = name
        self._service = service
        self._line = line
        self._failed = False
        self._took_at = asyncio.get_running_loop().time()
        self.forwarded_bytes = 0
        """See `Link`."""

    @property
    def unknown(self) -> bool:
        """See `Link`."""
        return False

    def figures(self) -> LinkFigures:
        """See `Link`."""
        return LinkFigures(self._name, "away" if self._failed else "serving", self._took_at)

    async def run(self) -> None:
        """See `Link.run`. Returns once the files are complete."""
        line, service = self._line, self._service
        subscription = line.subscription
        subscription.track, subscription.both = Track.INBOUND, True
        facts = {"session": line.session_id, "provider": line.provider, "kind": line.kind}
        pen: Pen[Batch] = Pen(
            prepare(service),
            lambda: Recording(service, facts, line.start),
            capacity_bytes=CAPACITY_BYTES,
            failed=self._lost,
        )
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            while True:
                await subscription.wait()
                if pen.full and not self._failed:
                    await asyncio.sleep(POLL_SECS)  # the subscription holds what it can, and says what it can't
                    continue
                events = subscription.take_nowait()
                size = sum(len(event.payload) if type(event) is Audio else 100 for event in events)
                if not self._failed and pen.put((loop.time() - began, events), size):
                    self.forwarded_bytes += sum(
                        len(event.payload) for event in events if type(event) is Audio and event.track is Track.INBOUND
                    )
                if any(type(event) is Stop for event in events):
                    break
        finally:
            pen.close()
        await pen.closed()

    def _lost(self, error: Exception) -> None:
        self._failed = True
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        self._line.log.error("recording_failed", service=self._name, directory=self._service.directory, error=reason)
        self._line.report("recording_failed", f"{self._name}: {reason}; the call goes on without a recording")
