"""What passed on a carrier's socket, frame by frame with times, for finding faults and for `telephony-gateway replay`.

JSON lines: first the header, then `{"at": seconds, "dir": "in" or "out", "text": frame}`, at last the end. Audio is kept;
secrets, numbers, parameters and digits are not: each digit of a key is 0, so that frames stay what they were.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from gateway import logs
from gateway.errors import GatewayError
from gateway.scribe import Pen, Scribe

VERSION = 1
CAPACITY_BYTES = 4 * 2**20
"""Frames of one stream that may wait for the disk; further ones are left out and counted."""

LARGEST_FILE_BYTES = 256 * 2**20
"""An hour of mu-law both ways is 170 MB."""

HELD_FRAMES = 100
"""Before the start frame nobody knows the route: so many frames wait to be told."""

BUFFER_BYTES = 32 * 1024

_VERBATIM = {"payload", "chunk", "timestamp", "sequencenumber", "event", "type", "track", "tracks", "encoding", "contenttype"}
_PARAMETERS = {"customparameters", "parameters", "extraheaders"}
_DIGITS = {"digit", "digits", "dtmf"}
_HIDDEN = {"handoffdata", "authorization", "token", "secret", "password"}
_LONG = re.compile(r"\d(?:[ .-]?\d){3,}")


class Header(Struct, tag_field="type", tag="capture"):
    """The first line."""

    version: int
    time: str
    provider: str
    kind: str
    session: str
    masked: str = "digits are 0; numbers, parameters and secrets are hidden"


class Frame(Struct, omit_defaults=True):
    """One frame: text, or bytes in base64."""

    at: float
    dir: Literal["in", "out"]
    text: str | None = None
    data: str | None = None

    @property
    def frame(self) -> str | bytes:
        return self.text if self.text is not None else base64.b64decode(self.data or "")


class End(Struct, tag_field="type", tag="end"):
    """The last line. `dropped` frames did not fit; `truncated`: the file had reached its largest size."""

    at: float
    reason: str | None
    dropped: int
    truncated: bool


class CaptureError(GatewayError):
    """A file that can't be used. `str(error)` says why."""


def read(path: Path) -> tuple[Header, list[Frame]]:
    """A captured stream. Raises CaptureError."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror or error}") from error
    try:
        header = msgspec.json.decode(lines[0] if lines else b"", type=Header)
    except msgspec.MsgspecError as error:
        raise CaptureError(f"{path}:1 is not the header of a capture: {error}") from error
    if header.version != VERSION:
        raise CaptureError(f"{path} is a capture of version {header.version}; this gateway reads version {VERSION}")
    frames = []
    decoder = msgspec.json.Decoder(Frame)
    for number, line in enumerate(lines[1:], 2):
        if b'"type":"end"' in line[:20]:
            break
        try:
            frame = decoder.decode(line)
            _ = frame.frame
        except (msgspec.MsgspecError, binascii.Error) as error:
            if number == len(lines):
                break  # whoever wrote it died in the middle of the line
            raise CaptureError(f"{path}:{number}: not a frame: {error}") from error
        frames.append(frame)
    return header, frames


def masked(frame: str) -> str:
    """A frame without what is private; one that is no JSON object keeps only its beginning, scrubbed."""
    try:
        message = msgspec.json.decode(frame)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        message = None
    if not isinstance(message, dict):
        return _LONG.sub("•", str(logs.redact(None, "", {"message": frame[:200]})["message"]))
    return msgspec.json.encode({key: _mask(key, value) for key, value in message.items()}).decode()


def _mask(key: str, value: Any) -> Any:
    plain = re.sub("[^a-z]", "", key.lower())
    if isinstance(value, dict):
        if plain in _PARAMETERS:
            return dict.fromkeys(value, "***")
        return {inner: _mask(inner, each) for inner, each in value.items()}
    if isinstance(value, list):
        return [_mask(key, each) for each in value]
    if plain in _DIGITS:
        return re.sub(r"\d", "0", value) if isinstance(value, str) else 0 if isinstance(value, int) else value
    if plain in _VERBATIM or plain.endswith(("id", "sid", "rate", "channels")) or not isinstance(value, str):
        return value
    if plain in _PARAMETERS:
        return re.sub(r"([:=]\s*)[^,;}&]+", r"\1***", value) if re.search("[:=]", value) else "***"
    if plain in _HIDDEN:
        return "***"
    cleaned = logs.redact(None, "", {"message" if plain.endswith(("text", "prompt", "transcript", "body")) else key: value})
    text = str(next(iter(cleaned.values())))
    return _LONG.sub("•", text) if " " in text or plain.endswith(("text", "prompt")) else text


class _File:
    """The file; on the scribe's thread only."""

    def __init__(self, directory: Path, header: Header) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{header.time[:19].replace('-', '').replace(':', '')}Z-{header.session}.jsonl"
        self._file = os.open(directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        self._size = 0
        self._buffer = bytearray(msgspec.json.encode(header) + b"\n")
        self._truncated = False
        self._flush()

    def write(self, item: Frame | End) -> None:
        if isinstance(item, End):
            item.truncated = self._truncated
        elif item.text is not None:
            item.text = masked(item.text)
        line = msgspec.json.encode(item) + b"\n"
        if self._size + len(self._buffer) + len(line) > LARGEST_FILE_BYTES and not isinstance(item, End):
            self._truncated = True
        if self._truncated and not isinstance(item, End):
            return
        self._buffer += line
        if len(self._buffer) >= BUFFER_BYTES:
            self._flush()

    def close(self, failure: Exception | None) -> None:
        try:
            if failure is None:
                self._flush()
        finally:
            os.close(self._file)

    def _flush(self) -> None:
        view = memoryview(bytes(self._buffer))
        self._buffer.clear()
        self._size += len(view)
        while view:
            view = view[os.write(self._file, view) :]


class Capture:
    """One stream's. `take` every frame; `keep` once the route is known and wants it, else forget it; `close` at the end."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._held: list[Frame] = []
        self._pen: Pen[Frame | End] | None = None
        self.dropped = 0

    def take(self, direction: Literal["in", "out"], frame: str | bytes, now: float) -> None:
        """Never waits and never raises."""
        if isinstance(frame, str):
            item = Frame(round(now - self._began, 6), direction, text=frame)
        else:
            item = Frame(round(now - self._began, 6), direction, data=base64.b64encode(frame).decode())
        if self._pen is None:
            if len(self._held) < HELD_FRAMES:
                self._held.append(item)
        elif not self._pen.put(item, len(frame) + 100):
            self.dropped += 1

    def keep(self, directory: Path, provider: str, kind: str, session: str, failed: Callable[[Exception], None]) -> None:
        """From now on write it into `directory`, with what was taken before."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        header = Header(VERSION, time, provider, kind, session)
        self._pen = Pen(Scribe.at(directory), lambda: _File(directory, header), capacity_bytes=CAPACITY_BYTES, failed=failed)
        held, self._held = self._held, []
        for item in held:
            self._pen.put(item, 200)

    def close(self, reason: str | None, now: float) -> None:
        """The stream is over."""
        if self._pen is not None:
            self._pen.put(End(round(now - self._began, 6), reason, self.dropped, False), 100)
            self._pen.close()
