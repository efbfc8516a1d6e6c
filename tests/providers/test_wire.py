"""The wire tables: every recorded line both ways, then fed again bent in every way a carrier may bend it.

`tests/wire/<kind>/*.jsonl` holds one conversation per file. The first line may carry `config`; then `dir: in` is a frame of
the carrier and the event it means (none: it means nothing), `dir: out` a command and the frame that carries it out (none:
there is none). `error` is the reason of a MalformedFrame, `refused` the code of a refusal by our encoder. `tell` is what the
carrier half is given where that differs from the event, `read` what it reads. `mirror: false` is decoded only.
`optional` names members that may be missing without changing the event.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from msgspec import UNSET, Raw, Struct, UnsetType

import providers
from gateway.errors import LocalError, MalformedFrame
from gateway.events import COMMAND_NAMES, Checkpoint, Command, Event, Message, Start, Stop, Unknown

WIRE = Path(__file__).parent.parent / "wire"


class Line(Struct, forbid_unknown_fields=True):
    dir: Literal["in", "out"]
    frame: Raw | UnsetType = UNSET
    raw: str | None = None
    binary: str | None = None
    event: Event | None = None
    command: Command | None = None
    error: str | None = None
    refused: str | None = None
    tell: Event | None = None
    read: Command | None = None
    mirror: bool = True
    optional: list[str] = []
    note: str = ""

    @property
    def text(self) -> str | bytes:
        """The frame as the peer writes it."""
        if self.binary is not None:
            return b64decode(self.binary)
        return self.raw if self.raw is not None else bytes(self.frame).decode()


class Head(Struct, forbid_unknown_fields=True):
    config: dict[str, Any] = {}
    note: str = ""


class Transcript(Struct):
    kind: str
    head: Head
    lines: list[Line]

    def codec(self) -> Any:
        provider = providers.load(self.kind)
        return provider(msgspec.convert({"auth": "none"} | self.head.config, provider.Config)).codec()


def read(path: Path) -> Transcript:
    head, *lines = path.read_bytes().splitlines()
    decoder = msgspec.json.Decoder(Line)
    return Transcript(path.parent.name, msgspec.json.decode(head, type=Head), [decoder.decode(line) for line in lines])


TRANSCRIPTS = {f"{path.parent.name}/{path.stem}": read(path) for path in sorted(WIRE.glob("*/*.jsonl"))}
every_transcript = pytest.mark.parametrize("transcript", TRANSCRIPTS.values(), ids=TRANSCRIPTS)


def outcome(act: Callable[[Any], Any], given: Any) -> Any:
    """What came of it: a list, or the one word of its refusal."""
    try:
        return list(act(given))
    except MalformedFrame as error:
        return error.reason
    except LocalError as error:
        return error.code


@every_transcript
def test_codec_reads_and_writes_every_line(transcript: Transcript) -> None:
    """In: exactly this event or this reason. Out: exactly this frame, member for member, or this refusal."""
    codec = transcript.codec()
    for line in transcript.lines:
        if line.dir == "in":
            expected: Any = line.error or ([line.event] if line.event else [])
            assert outcome(codec.decode, line.text) == expected, line
        elif line.command is not None:
            frames = outcome(codec.encode, line.command)
            if isinstance(frames, list):
                assert all(type(frame) is str for frame in frames)
                frames = [json.loads(frame) for frame in frames]
            expected = line.refused or ([] if line.frame is UNSET else [json.loads(bytes(line.frame))])
            assert frames == expected, line


@every_transcript
def test_carrier_half_tells_the_same_and_reads_what_we_write(transcript: Transcript) -> None:
    """The mirror: events come out as the recorded frames, counters included; our frames are read back as the commands."""
    carrier = providers.load(transcript.kind).carrier()
    recorded, told = [], []
    for line in transcript.lines:
        if line.dir == "in" and line.error is None:
            event = line.tell or line.event
            mirrored = line.mirror and line.raw is None
            # A start is told in any case: the carrier half learns the stream's ids from it.
            frames = carrier.encode(event) if event is not None and (mirrored or isinstance(event, Start)) else ()
            if mirrored:
                recorded.append(json.loads(line.text))
                told += [json.loads(frame) for frame in frames]
        elif line.dir == "out" and (line.frame is not UNSET or line.error or line.read):
            expected = line.error or [line.read or line.command]
            assert outcome(carrier.decode, line.text) == expected, line
    assert told == recorded


def add_unknown_members(value: Any) -> Any:
    if isinstance(value, dict):
        return (
            {"x-new": {"deep": [1, None]}} | {name: add_unknown_members(member) for name, member in value.items()} | {"zz": "z"}
        )
    return value


def reorder(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reorder(member) for name, member in reversed(value.items())}
    return value


def swap_types(value: Any) -> Any:
    """Numbers as strings, and strings of digits as numbers."""
    if isinstance(value, dict):
        return {name: swap_types(member) for name, member in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,14}", value):
        return int(value)
    return value


@pytest.mark.parametrize("bend", [add_unknown_members, reorder, swap_types])
@every_transcript
def test_bent_frames_mean_the_same(transcript: Transcript, bend: Callable[[Any], Any]) -> None:
    """Unknown members, any order of keys, numbers as strings and the reverse: the events stay the same."""
    codec = transcript.codec()
    for line in transcript.lines:
        if line.dir == "in" and line.error is None and line.raw is None and not isinstance(line.event, Unknown):
            frame = json.loads(line.text)
            # Custom parameters are data: members added or retyped there are not the carrier's.
            parameters = frame.get("customParameters") or frame.get("start", {}).get("customParameters")
            bent = bend(frame)
            if parameters is not None:
                (bent if "customParameters" in frame else bent["start"])["customParameters"] = parameters
            assert list(codec.decode(json.dumps(bent))) == ([line.event] if line.event else []), line


@every_transcript
def test_missing_optional_members_change_nothing(transcript: Transcript) -> None:
    """Each named member left out alone, and all of them together."""
    optional = [line for line in transcript.lines if line.optional]
    for missing in {*(path for line in optional for path in line.optional), ""}:
        codec = transcript.codec()
        for line in transcript.lines:
            if line.dir == "out" or line.error is not None or line.raw is not None:
                continue
            frame = json.loads(line.text)
            for path in line.optional:
                if missing in (path, ""):
                    *parents, name = path.split(".")
                    owner = frame
                    for parent in parents:
                        owner = owner[parent]
                    del owner[name]
            assert list(codec.decode(json.dumps(frame))) == ([line.event] if line.event else []), (missing, line)


@pytest.mark.parametrize("kind", providers.names())
def test_every_word_of_a_wire_is_in_its_tables(kind: str) -> None:
    """Every event a provider emits and every command it accepts is recorded, and nothing else is."""
    lines = [line for name, transcript in TRANSCRIPTS.items() if name.startswith(f"{kind}/") for line in transcript.lines]
    heard = {type(line.event) for line in lines if line.event is not None}
    obeyed = {type(line.command) for line in lines if line.command is not None and line.refused is None}
    refused = {type(line.command) for line in lines if line.refused is not None}
    provider = providers.load(kind)
    accepts = provider(provider.Config(auth="none")).codec().accepts  # type: ignore[call-arg]
    assert heard - {Unknown} == provider.emits
    assert Unknown in heard
    assert obeyed == accepts
    assert obeyed | refused == set(COMMAND_NAMES)


@pytest.mark.parametrize("kind", providers.names())
def test_only_what_needs_no_frame_has_none(kind: str) -> None:
    """An accepted command without a frame would be swallowed in silence: only Stop and ConversationRelay's checkpoint may."""
    silent: set[type[Message]] = {
        type(line.command)
        for name, transcript in TRANSCRIPTS.items()
        if name.startswith(f"{kind}/")
        for line in transcript.lines
        if line.command is not None and line.refused is None and line.frame is UNSET
    }
    assert silent <= ({Checkpoint} if kind == "twilio_conversation_relay" else {Stop})
