"""Level two: a session between a carrier and a service that both talk rubbish, with the queue and the ring behind it.

Asserted at the moment it happens: start comes first and once, stop last and once; every checkpoint that was taken comes back
once; the account balances and agrees with a ledger of our own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from time import perf_counter, thread_time_ns
from typing import Any

from gateway.bus import Subscription
from gateway.errors import MalformedFrame
from gateway.events import Audio, Checkpoint, Command, Event, Gap, Start, Stop, StopReason
from gateway.media import Track
from gateway.services.intake import Intake
from gateway.services.ring import Frame as RingFrame
from gateway.session import Session

from .codecs import COMMANDS, PCM_16K, native, transcripts
from .decode import Failure, Figures
from .mutation import Frame, Mutator

KINDS = ("twilio_media_streams", "twilio_conversation_relay", "plivo_audio_streaming")
STEPS = 120
WAITS_SECS = (0.0, 0.001, 0.02, 0.02, 0.1, 0.5, 6.0, 11.0)
SIZES = (160, 160, 160, 320, 1, 7, 0, 8000, 200_000)


class Call:
    """One session with a ledger. `play` takes the steps; each raises AssertionError where a promise is broken."""

    def __init__(self, script: Any, mutator: Mutator, service: Mutator, random: Random, figures: Figures) -> None:
        self.codec, self.carrier = script.codec(), None
        self.kind = script.kind
        self.good = [line.text for line in script.lines if line.dir == "in"]
        self.mutator, self.service, self.random, self.figures = mutator, service, random, figures
        self.now = 1000.0
        self.notes = 0
        self.seen: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.heard_bytes = 0
        self.accepted_bytes = 0
        self.forwarded = 0
        self.subscription: Subscription | None = None
        self.intake: Intake | None = None
        self.protocol = native()
        self.marks: list[str] = []
        self.sent: list[Frame] = []
        """Frames of the carrier, for the report of a failure."""
        self.session = Session(self.codec, emit=self.emitted, note=self.noted, capacity_ms=random.choice((2000, 120_000)))

    # --- what comes out ---

    def noted(self, what: str, values: dict[str, object]) -> None:
        self.notes += 1
        assert self.notes < 60, "remarks are bounded"

    def emitted(self, event: Event) -> None:
        kind = type(event).__name__
        assert not self.seen["Stop"], f"{kind} after the stop"
        if isinstance(event, Start):
            assert not self.seen, f"{[*self.seen]} before the start"
            if event.media_format is not None:
                self.subscription = Subscription(event.media_format, capacity_ms=1000)
                self.intake = Intake(
                    event.media_format, PCM_16K, frame_ms=20, capacity_ms=1000, track=Track.INBOUND, protocol=self.protocol
                )
        assert self.session.start is not None or isinstance(event, Start), f"{kind} before the start"
        self.seen[kind] += 1
        assert self.seen["Start"] == 1
        if isinstance(event, Audio):
            assert event.payload
            assert not len(event.payload) % self.session.start.media_format.sample_bytes  # type: ignore[union-attr]
            self.heard_bytes += len(event.payload)
        elif isinstance(event, Gap):
            assert event.lost_ms > 0
        elif isinstance(event, Checkpoint):
            assert event.outcome is not None
            assert event.played_ms >= 0
            self.asked[event.name] -= 1
            assert self.asked[event.name] >= 0, "a checkpoint came back that nobody waits for"
        if self.subscription is not None:
            self.subscription.offer(event)

    # --- what goes in ---

    def receive(self, frame: Frame) -> None:
        self.sent.append(frame)
        began = thread_time_ns()
        self.session.receive(frame, self.now)
        took = thread_time_ns() - began
        self.figures.buckets[took >> 8] += 1
        self.figures.worst_ns = max(self.figures.worst_ns, took)

    def perform(self, command: Command) -> None:
        faults = self.session.faults.total()
        playout = self.session.playout
        before = playout.totals(self.now)[0] if playout is not None else 0
        checkpoint = isinstance(command, Checkpoint) and not self.session.over
        if checkpoint:
            self.asked[command.name] += 1  # type: ignore[union-attr]
        self.session.perform(command, self.now)
        if checkpoint and self.session.faults.total() > faults:
            self.asked[command.name] -= 1  # type: ignore[union-attr]
        if playout is not None and isinstance(command, Audio):
            self.accepted_bytes += playout.totals(self.now)[0] - before

    def told(self) -> None:
        """The service says something."""
        message = self.service.frame() if self.random.random() < 0.6 else COMMANDS[int(self.random.random() * len(COMMANDS))]
        try:
            commands = [*self.protocol.decode(message)]
        except MalformedFrame as error:
            self.session.fault(error.reason, str(error))
            return
        for command in commands:
            # A stop would end most calls early.
            if not isinstance(command, Stop) or self.random.random() < 0.05:
                self.perform(command)

    def pump(self) -> None:
        """What may leave now, leaves, and can be read."""
        for _ in range(5000):
            frame = self.session.next_frame(self.now)
            if frame is None:
                break
            assert isinstance(frame, str)
            if '"mark"' in frame or '"checkpoint"' in frame:
                at = frame.find('"name":"') + 8
                self.marks.append(frame[at : frame.find('"', at)])
        else:
            raise AssertionError("the writer would spin")
        if self.subscription is not None and self.intake is not None and self.random.random() < 0.3:
            for event in self.subscription.take_nowait():
                self.intake.take(event, self.now)
            while (entry := self.intake.ring.take(keep=False)) is not None:
                if isinstance(entry, RingFrame):
                    self.forwarded += entry.heard

    def echo(self) -> None:
        """The carrier confirms a mark, maybe twice, maybe one of those cut long ago."""
        if self.marks:
            name = self.marks[int(self.random.random() * len(self.marks))]
            if self.kind == "plivo_audio_streaming":
                self.session.receive(f'{{"event":"playedStream","name":"{name}"}}', self.now)
            else:
                self.session.receive(f'{{"event":"mark","mark":{{"name":"{name}"}}}}', self.now)

    def play(self, steps: int) -> None:
        draw = self.random.random
        upcoming = iter(self.good)
        for _ in range(2):  # mostly a start
            if draw() < 0.8 and (frame := next(upcoming, None)) is not None:
                self.receive(frame)
        for _ in range(steps):
            what = draw()
            if what < 0.6:
                self.receive(self.mutator.frame())
            elif what < 0.65 and (frame := next(upcoming, None)) is not None:
                self.receive(frame)
            elif what < 0.75 and self.session.start is not None:  # there is no service before
                self.told()
            elif 0.75 <= what < 0.8 and self.session.start is not None:
                self.perform(Audio(b"\x55" * SIZES[int(draw() * len(SIZES))]))
            elif what < 0.85:
                self.echo()
            elif what < 0.995:
                self.now += WAITS_SECS[int(draw() * len(WAITS_SECS))]
                self.pump()
            elif what < 0.997:
                self.session.end(StopReason.CARRIER_CLOSED, self.now)
            if self.session.over and draw() < 0.2:
                break
        self.end()

    def end(self) -> None:
        self.session.end(StopReason.DRAIN, self.now)
        self.session.end(StopReason.CARRIER_CLOSED, self.now)
        self.pump()
        session = self.session
        assert session.stop is not None
        assert self.seen["Stop"] == self.seen["Start"] == (session.start is not None)
        assert not +self.asked, f"never came back: {+self.asked}"
        assert session.received_bytes - session.duplicate_bytes == self.heard_bytes
        account = session.stop.account
        assert account is not None
        assert min(account.received, account.queued, account.played, account.cleared, account.lost) >= 0
        assert account.queued == account.played + account.cleared + account.lost
        if session.playout is not None:
            queued, played, cleared, lost = session.playout.totals(self.now)
            assert queued == self.accepted_bytes == played + cleared + lost
            assert min(played, cleared, lost) >= 0
        if self.subscription is not None and self.intake is not None:
            for event in self.subscription.take_nowait():
                self.intake.take(event, self.now)
            while (entry := self.intake.ring.take(keep=False)) is not None:
                if isinstance(entry, RingFrame):
                    self.forwarded += entry.heard
            assert self.subscription.offered_bytes >= self.forwarded + self.subscription.dropped_bytes


def run(name: str, count: int, seed: int, tell: Callable[[int], None] = lambda _: None) -> Figures:
    """`count` bent frames to sessions of the carrier `name`."""
    random, figures = Random(seed), Figures()
    scripts = transcripts(name)
    mutators = [Mutator([line.text for line in each.lines if line.dir == "in"], random) for each in scripts]
    service = Mutator([*COMMANDS, b"\0\0" * 320], random)
    began = perf_counter()
    while figures.frames < count:
        at = int(random.random() * len(scripts))
        call = Call(scripts[at], mutators[at], service, random, figures)
        try:
            call.play(STEPS)
        except Exception as error:
            figures.failures.append(Failure.of("session", name, at, call.sent, seed, error))
            if len(figures.failures) > 20:
                break
        figures.frames += len(call.sent)
        figures.reasons["calls"] += 1
        for reason, times in call.session.bad.items():
            figures.reasons[reason] += times
        tell(figures.frames)
    figures.seconds = perf_counter() - began
    return figures


def replay(script: Any, frames: list[Frame]) -> None:
    """The carrier's frames of a failure again, with a service that says nothing."""
    random = Random(0)
    mutator = Mutator(["{}"], random)
    call = Call(script, mutator, mutator, random, Figures())
    for frame in frames:
        call.receive(frame)
    call.pump()
    call.end()
