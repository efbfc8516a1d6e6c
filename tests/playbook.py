"""Transcripts for stateful behaviour: one conversation as text, the same for every carrier.

A script is lines. `>>` is what happens, `<<` is all that must come out of it, in order:

    >> start                    the carrier's start frame          << start
    >> caller 20 @40            20 ms of caller's audio, stamped   << heard 20
    >> audio 60                 the service plays 60 ms            << media 60      (what the carrier got, summed up)
    >> checkpoint a             the service asks                   << mark 1        (numbered as the carrier got them)
    >> echo 1                   the carrier says mark 1 played     << checkpoint a played 60
    >> clear                                                       << cut / << clear 20 40
    >> wait 100                 100 ms pass
    >> stop / stop played / hangup / drop / raw TEXT / say TEXT / spoken TEXT / barge_in / keys 12 / send 12
    >> speech agent on / off    somebody starts or stops to sound  << speech agent

`check(kind, script)` compares the conversation that took place with the script and shows the difference as a diff.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterable
from textwrap import dedent

import msgspec

import providers
from gateway.ear import Ear, Fate
from gateway.events import (
    After,
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Fault,
    Flow,
    Gap,
    Outcome,
    Party,
    Play,
    Say,
    Speech,
    Spoken,
    Start,
    Stop,
    StopReason,
    Transcript,
    Unknown,
)
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.session import Session
from gateway.voice import Voice

AUDIO_KINDS = ("twilio_media_streams", "plivo_audio_streaming")
L16_16K = MediaFormat(Encoding.PCM_S16LE, 16000)


class Stage:
    """A session between a codec and the carrier half of the same protocol, on a clock that the test moves."""

    def __init__(self, kind: str, *, media_format: MediaFormat = MULAW_8K, listens: bool = False, **options: object) -> None:
        """`listens`: to a call that others carry. `options` are the session's."""
        provider = providers.load(kind)
        settings: dict[str, object] = {"auth": "none"}
        if listens:
            settings |= {"mode": "listen", "then": "<Hangup/>"}
        if kind == "plivo_audio_streaming":
            settings["media_format"] = msgspec.to_builtins(media_format)
        self.codec = provider(msgspec.convert(settings, provider.Config)).codec()
        self.carrier = provider.carrier()
        self.text = provider.carrier().habits.text
        self.media_format = media_format
        self.now = 1000.0
        self.events: list[Event] = []
        self.commands: list[Command] = []
        self.notes: list[str] = []
        self.details: list[dict[str, object]] = []
        self.session = Session(self.codec, emit=self.emitted, note=self.noted, **options)  # type: ignore[arg-type]

    def emitted(self, event: Event) -> None:
        """The session tells its service something."""
        self.events.append(event)

    def noted(self, what: str, details: dict[str, object]) -> None:
        """The session remarks on something."""
        self.notes.append(what)
        self.details.append(details)

    def start(self) -> None:
        media_format = None if self.text else self.media_format
        self.tell(Start("MZ" + "0" * 32, "CA" + "1" * 32, "AC" + "2" * 32, media_format=media_format))

    def tell(self, event: Event) -> None:
        """The carrier tells something, in its own frames."""
        for frame in self.carrier.encode(event):
            self.session.receive(frame, self.now)

    def perform(self, command: Command) -> None:
        self.session.perform(command, self.now)
        self.pump()

    def pump(self) -> None:
        """Let the carrier read all that may leave now."""
        while (frame := self.session.next_frame(self.now)) is not None:
            self.commands.extend(self.carrier.decode(frame))

    def wait(self, ms: float) -> None:
        """Time passes; frames leave exactly when they are due."""
        until = self.now + ms / 1000
        self.pump()
        while (due := self.session.next_due()) is not None and due <= until and not self.session.over:
            self.now = max(self.now, due)
            self.pump()
            if (again := self.session.next_due()) is not None and again <= self.now:
                break
        self.now = until
        self.pump()


class Phone(Stage):
    """A stage with a line and an ear at its end: what leaves arrives after the network's delay, and so does what comes back.

    Both ways keep their order. `delay` draws the milliseconds of each message, `late` those by which the session's timer is
    late. `ear` (or `voice`, on a text stream) is the truth. `hang_up` drops the line at the carrier's end.
    """

    def __init__(
        self,
        kind: str,
        *,
        delay: Callable[[], float] = float,
        late: Callable[[], float] = float,
        jitter_ms: float = 0.0,
        fate: Callable[[str], Fate] | None = None,
        **options: object,
    ) -> None:
        super().__init__(kind, **options)  # type: ignore[arg-type]
        self.ear = Ear(self.media_format, self.carrier.habits, jitter_ms=jitter_ms, fate=fate)
        self.voice = Voice()
        self.heard_before_cuts: list[int] = []
        """Samples heard of each generation that a clear at the carrier has ended."""
        self.closed = False
        """Whether the carrier's end is closed: nothing more is heard or said."""
        self._hung_up = False
        self._cut_at_sample = 0
        self._delay = delay
        self._late = late
        self._down: deque[tuple[float, Command | None]] = deque()
        self._up: deque[tuple[float, Event | None]] = deque()
        self._due: float | None = None
        self._wake = 0.0

    @property
    def heard_samples(self) -> int:
        """Samples heard since the last clear that reached the carrier."""
        self._answer(self.ear.advance(self.now))
        return self.ear.played - self._cut_at_sample

    @property
    def mouth(self) -> Ear | Voice:
        return self.voice if self.text else self.ear

    def left(self, command: Command) -> None:
        """A command has left the gateway."""

    def perform(self, command: Command) -> None:
        super().perform(command)
        self.wait(0)

    def hang_up(self, event: Event | None = None) -> None:
        """The call ends at the carrier, which says `event` if it says anything, and closes."""
        self._answer(self.mouth.advance(self.now))
        self._close()
        if event is not None:
            self._answer([event])
        self._up.append((self._arrival(self._up), None))

    def interrupt(self) -> None:
        """The caller speaks over the voice of a text stream."""
        self._answer(self.voice.interrupt(self.now))
        self.wait(0)

    def pump(self) -> None:
        while (frame := self.session.next_frame(self.now)) is not None:
            for command in self.carrier.decode(frame):
                self.commands.append(command)
                self.left(command)
                self._down.append((self._arrival(self._down), command))
        if self.session.over and not self._hung_up:
            self._hung_up = True
            self._down.append((self._arrival(self._down), None))
        due = None if self.session.over else self.session.next_due()
        if due is not None and due <= self.now:
            raise AssertionError(f"nothing leaves at {self.now}, yet more was due at {due}: the writer would spin")
        if due != self._due:
            self._due = due
            self._wake = 0.0 if due is None else due + self._late() / 1000

    def wait(self, ms: float) -> None:
        until = self.now + ms / 1000
        while True:
            times = [self._wake] if self._due is not None else []
            times += [queue[0][0] for queue in (self._down, self._up) if queue]
            if not self.closed and (at := self.mouth.next_event()) is not None:
                times.append(at)
            if not times or (at := min(times)) > until:
                break
            self.now = max(self.now, at)
            self._deliver()
            self.pump()
        self.now = until
        if not self.closed:
            self._answer(self.mouth.advance(self.now))

    def _close(self) -> None:
        self.ear.end(self.now)
        self.closed = True

    def _deliver(self) -> None:
        while self._down and self._down[0][0] <= self.now:
            command = self._down.popleft()[1]
            if self.closed:
                continue
            if command is None:
                self._close()
            else:
                self._answer(self._reach_carrier(command))
        if not self.closed:
            self._answer(self.mouth.advance(self.now))
        while self._up and self._up[0][0] <= self.now:
            event = self._up.popleft()[1]
            if event is None:
                self.session.end(StopReason.CARRIER_CLOSED, self.now)
            else:
                self.tell(event)
        if self._due is not None and self._wake <= self.now:
            self._due = None

    def _reach_carrier(self, command: Command) -> list[Event]:
        ear, voice, now = self.ear, self.voice, self.now
        match command:
            case Audio():
                ear.media(command.payload, now)
            case Checkpoint():
                return ear.checkpoint(command.name, now)
            case Clear():
                events = ear.advance(now)
                self.heard_before_cuts.append(ear.played - self._cut_at_sample)
                self._cut_at_sample = ear.played
                return events + ear.clear(now)
            case Say():
                return voice.say(command, now)
            case Dtmf() if self.text:
                return voice.tones(command.digits, now)
            case Play():
                return voice.play(command, now)
        return []

    def _answer(self, events: Iterable[Event]) -> None:
        for event in events:
            self._up.append((self._arrival(self._up), event))

    def _arrival(self, queue: deque[tuple[float, Command | None]] | deque[tuple[float, Event | None]]) -> float:
        at = self.now + self._delay() / 1000
        return max(at, queue[-1][0]) if queue else at


def check(kind: str, script: str, **options: object) -> Stage:
    """Run the script's `>>` lines and compare what came out with its `<<` lines. Returns the stage for a closer look."""
    stage = Stage(kind, **options)  # type: ignore[arg-type]
    wanted = [" ".join(line.split()) for line in dedent(script).strip().splitlines() if line.strip()]
    happened: list[str] = []
    marks: list[str] = []
    for line in wanted:
        if not line.startswith(">>"):
            continue
        happened.append(line)
        seen_events, seen_commands = len(stage.events), len(stage.commands)
        _act(stage, line[3:], marks)
        stage.pump()
        happened += _frames(stage, stage.commands[seen_commands:], marks)
        happened += [f"<< {_event(stage, event)}" for event in stage.events[seen_events:]]
    if happened != wanted:
        diff = difflib.unified_diff(wanted, happened, "the script", f"what {kind} did", lineterm="", n=50)
        raise AssertionError("\n" + "\n".join(diff))
    return stage


def _act(stage: Stage, line: str, marks: list[str]) -> None:
    word, _, rest = line.partition(" ")
    match word:
        case "start":
            stage.start()
        case "caller":
            ms, _, stamp = rest.partition(" @")
            payload = bytes([int(stamp or 0) % 251 or 1]) * stage.media_format.bytes_for(int(ms))
            stage.tell(Audio(payload, Track.INBOUND, int(stamp or 0)))
        case "keys":
            stage.tell(Dtmf(rest))
        case "echo":
            stage.tell(Checkpoint(marks[int(rest) - 1], Outcome.PLAYED))
        case "echo?":
            stage.tell(Checkpoint(rest, Outcome.PLAYED))
        case "cleared":
            stage.tell(Clear())
        case "prompt":
            stage.tell(Transcript(rest))
        case "spoken":
            stage.tell(Spoken(rest))
        case "speech":
            who, _, state = rest.partition(" ")
            stage.tell(Speech(Party(who), state == "on"))
        case "barge_in":
            stage.tell(BargeIn(rest, 100))
        case "raw":
            stage.session.receive(rest, stage.now)
        case "hangup":
            stage.tell(Stop(StopReason.CALLER_HANGUP))
            stage.session.end(StopReason.CARRIER_CLOSED, stage.now)
        case "drop":
            stage.session.end(StopReason.CARRIER_CLOSED, stage.now)
        case "wait":
            stage.wait(float(rest))
        case "audio":
            stage.perform(Audio(b"\x55" * stage.media_format.bytes_for(float(rest))))
        case "checkpoint":
            stage.perform(Checkpoint(rest, ref="c"))
        case "clear":
            stage.perform(Clear(ref="c"))
        case "say":
            stage.perform(Say(rest))
        case "play":
            stage.perform(Play(rest))
        case "send":
            stage.perform(Dtmf(rest, ref="d"))
        case "stop":
            stage.perform(Stop(after=After(rest or "now")))
        case _:
            raise AssertionError(f"no such line in a playbook: {line!r}")


def _frames(stage: Stage, commands: list[Command], marks: list[str]) -> list[str]:
    lines: list[str] = []
    played = 0
    for command in commands:
        if isinstance(command, Audio):
            played += len(command.payload)
            continue
        if played:
            lines.append(f"<< media {stage.media_format.duration_ms(played):g}")
            played = 0
        match command:
            case Checkpoint():
                marks.append(command.name)
                lines.append(f"<< mark {len(marks)}")
            case Clear():
                lines.append("<< cut")
            case Say():
                lines.append(f"<< text {command.text}")
            case Dtmf():
                lines.append(f"<< digits {command.digits}")
            case _:
                lines.append(f"<< {type(command).__name__.lower()}")
    if played:
        lines.append(f"<< media {stage.media_format.duration_ms(played):g}")
    return lines


def _event(stage: Stage, event: Event) -> str:
    match event:
        case Audio():
            return f"heard {stage.media_format.duration_ms(len(event.payload)):g}"
        case Checkpoint():
            return f"checkpoint {event.name} {event.outcome} {event.played_ms}"
        case Clear():
            return f"clear {event.played_ms} {event.cleared_ms}"
        case Stop():
            return f"stop {event.reason}"
        case Gap():
            return f"gap {event.lost_ms}"
        case Dtmf():
            return f"keys {event.digits}"
        case Fault():
            return f"fault {event.code} {event.ref}"
        case Flow():
            return f"flow {event.state}"
        case Unknown():
            return f"unknown {event.kind}"
        case Transcript() | Spoken():
            return f"{type(event).__name__.lower()} {event.text}"
        case Speech():
            return f"speech {event.who}"
        case _:
            return type(event).__name__.lower()
