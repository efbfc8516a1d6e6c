"""What is fuzzed: each carrier's codec, its mirror half, which bots in that carrier's dialect speak to, and our own protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from msgspec import UNSET

import providers
from gateway.errors import LocalError
from gateway.events import Audio, Command, Event, Message, Start, Stop
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.services import framed
from gateway.services.native import NativeCarrier
from tests.providers.test_wire import TRANSCRIPTS

from .mutation import Frame

PCM_16K = MediaFormat(Encoding.PCM_S16LE, 16000)

COMMANDS: tuple[Frame, ...] = (
    '{"type":"checkpoint","name":"end","id":"a"}',
    '{"type":"clear","id":7}',
    '{"type":"dtmf","digits":"12#","id":"b"}',
    '{"type":"say","text":"Hello.","final":true,"language":"en-US","interruptible":true,"preemptible":false,"id":"c"}',
    '{"type":"play","source":"https://media.example.com/a.mp3","loop":2,"interruptible":null,"preemptible":true}',
    '{"type":"language","speech":"de-DE","transcription":"de-DE"}',
    '{"type":"stop","after":"played","handoff":"{}"}',
)
"""Each word of a service."""

HOUSEKEEPING: tuple[Frame, ...] = ('{"type":"ready","next":0}', '{"type":"ready","next":null}', '{"type":"ack","seq":12}')

FRAMES: tuple[Frame, ...] = tuple(
    framed.pack(framed.Header(track, flags, seq, seq * 160), bytes(size))
    for track, flags, seq, size in ((Track.INBOUND, 0, 0, 320), (Track.INBOUND, 9, 2**32 - 1, 640), (Track.OUTBOUND, 0, 5, 0))
)


def native() -> NativeCarrier:
    return NativeCarrier(
        session="s", provider="twilio", kind="k", role="speaker", track=Track.INBOUND, media_format=PCM_16K, frame_ms=20
    )


class Target(NamedTuple):
    """`make` gives a fresh decoder; `seeds` are conversations in order; `check` is asked about whatever comes out."""

    make: Callable[[int], Callable[[Frame], Iterable[Any]]]
    seeds: list[list[Frame]]
    check: Callable[[Any], None]


def transcripts(kind: str) -> list[Any]:
    return [transcript for name, transcript in TRANSCRIPTS.items() if name.startswith(f"{kind}/")]


def _codec(kind: str) -> Target:
    """The carrier's frames, and every event must be tellable to a service."""
    scripts = transcripts(kind)
    service = native()

    def make(at: int) -> Callable[[Frame], Iterable[Event]]:
        return scripts[at % len(scripts)].codec().decode  # type: ignore[no-any-return]

    def check(event: Event) -> None:
        assert [*service.encode(event)] or not isinstance(event, (Audio, Start, Stop))
        assert not isinstance(event, Audio) or event.payload

    return Target(make, [[line.text for line in each.lines if line.dir == "in"] for each in scripts], check)


def start(kind: str) -> Start:
    media_format = None if providers.load(kind).carrier().habits.text else MULAW_8K
    return Start("MZ" + "0" * 32, "CA" + "1" * 32, "AC" + "2" * 32, media_format=media_format)


def started(kind: str) -> Any:
    """A codec after its start frame."""
    provider = providers.load(kind)
    codec = provider(provider.Config(auth="none")).codec()  # type: ignore[call-arg]
    for frame in provider.carrier().encode(start(kind)):
        assert isinstance([*codec.decode(frame)], list)
    return codec


def _carrier(kind: str) -> Target:
    """A bot's frames in a carrier's dialect; every command must be one that our half can carry out or refuse."""
    scripts = []
    for script in transcripts(kind):
        starts = [line.tell or line.event for line in script.lines if isinstance(line.event, Start)]
        frames = [line.text for line in script.lines if line.dir == "out" and (line.frame is not UNSET or line.raw)]
        if starts and frames:
            scripts.append((starts[0], frames))

    def make(at: int) -> Callable[[Frame], Iterable[Command]]:
        carrier = providers.load(kind).carrier()
        assert [*carrier.encode(scripts[at][0])]
        return carrier.decode  # type: ignore[no-any-return]

    return Target(make, [frames for _, frames in scripts], orders())


def orders() -> Callable[[Any], None]:
    """Has a command carried out by each carrier's codec: frames, or one of our refusals."""
    codecs = [started(kind) for kind in providers.names()]

    def check(command: Command) -> None:
        for codec in codecs:
            if type(command) in codec.accepts:
                with suppress(LocalError):
                    assert all(isinstance(frame, str) for frame in codec.encode(command))

    return check


def _native() -> Target:
    return Target(lambda _: native().decode, [[*COMMANDS, b"\0\0" * 320]], orders())


def _framed() -> Target:
    """Texts, and binary messages with their header."""
    obey = orders()

    def make(_: int) -> Callable[[Frame], Iterable[Any]]:
        protocol, numbers = native(), framed.Numbers()

        def decode(message: Frame) -> Iterable[Any]:
            if isinstance(message, str):
                return (protocol.read(message),)
            header = framed.unpack(message, 2)
            return (Audio(message[framed.HEADER_BYTES :]),) if numbers.take(header.seq) else ()

        return decode

    def check(message: Any) -> None:
        if isinstance(message, Message):
            obey(message)

    return Target(make, [[*COMMANDS, *HOUSEKEEPING, *FRAMES]], check)


TARGETS: dict[str, Callable[[], Target]] = {
    **{kind: lambda kind=kind: _codec(kind) for kind in providers.names()},  # type: ignore[misc]
    "native": _native,
    "native_framed": _framed,
    **{f"{kind}.carrier": lambda kind=kind: _carrier(kind) for kind in providers.names()},  # type: ignore[misc]
}
"""By name: the carriers' codecs, our protocol in its two modes, and the carriers' mirror halves."""
