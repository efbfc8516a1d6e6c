"""One stream's promises: start first, stop last and once, checkpoints once, gaps told, faults answered.

Pure: `now` is an argument (seconds, monotonic). Events leave through `emit`, remarks for the operator through `note`; frames
for the carrier are fetched one at a time with `next_frame`, so that a clear overtakes everything that has not left.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import assert_never

from gateway.errors import LocalError, MalformedFrame, NotStarted, UnsupportedCommand
from gateway.events import (
    COMMAND_NAMES,
    Account,
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
    FlowState,
    Gap,
    Language,
    Message,
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
from gateway.media import Track
from gateway.playout import CONFIRM_SECS, MOST_PENDING, Playout
from gateway.provider import Codec, Numbered
from gateway.recital import Recital
from gateway.reorder import WINDOW, Reorder
from gateway.timeline import Timeline

HELD_FRAMES = 25
"""Audio before the start frame is held, up to half a second of it."""

BAD_FRAMES, BAD_FRAMES_SECS = 50, 10.0
"""A carrier that sends more bad frames than this in this time is cut off."""

REMARKED_KINDS = 20
"""Kinds of bad or unknown frames that are remarked on, once each; the rest is only counted."""


MOST_FRAMES = 1000
"""Frames that may wait for a carrier that does not read."""

NOT_STARTED = "the stream has not started: nothing can be carried out yet"
STOPPING = "the stream ends once the queue has played: nothing can be added"


class Crowded(LocalError):
    """The carrier does not take what is sent to it."""

    code = "carrier_stalled"


class Session:
    """One stream between its codec and whoever listens.

    Feed it with `receive` (a carrier's frame) and `perform` (a service's command); after each, and at `next_due`, send what
    `next_frame` returns until it returns None. When `over`, send the rest and close the socket with `close_code`. Call `end` when
    the socket is gone; it is idempotent. It never raises on what a peer sends.
    """

    __slots__ = (
        "_bad_recently", "_bad_since", "_capacity_ms", "_codec", "_disorder", "_drained", "_early", "_emit", "_ending",
        "_frames", "_full", "_last_audio", "_last_dropped", "_last_number", "_last_other", "_note", "_number", "_paused",
        "_rate", "_rests", "_sample_bytes", "_timelines", "_told", "_unconfirmed", "bad", "close_code", "duplicate_bytes",
        "farewell", "faults", "frames_in", "frames_out", "gap_ms", "outcomes", "playout", "received_bytes", "recital", "start",
        "stop", "unknown",
    )  # fmt: skip

    def __init__(
        self,
        codec: Codec,
        *,
        emit: Callable[[Event], None],
        note: Callable[[str, dict[str, object]], None],
        capacity_ms: int = 120_000,
    ) -> None:
        self._codec = codec
        self._emit = emit
        self._note = note
        self._capacity_ms = capacity_ms
        self._frames: deque[str | bytes] = deque()
        self._early: list[Audio] = []
        self._timelines: dict[Track, Timeline] = {}
        self._number = codec.number if isinstance(codec, Numbered) else None
        self._last_audio: str | bytes = ""  # the last frame with audio that was not late
        self._last_other: str | bytes = ""
        self._last_dropped: str | bytes = ""  # the last frame with audio that had been there before
        self._last_number = -1  # of the frame that ended the last disorder
        self._disorder: Reorder[Audio | None] | None = None  # None in it: a frame that was no audio
        self._sample_bytes = self._rate = 1
        self._rests: dict[Track, bytes] = {}  # the first bytes of a sample whose others are in the next chunk
        self._bad_since = float("-inf")
        self._bad_recently = 0
        self._paused = False
        self._full = self._drained = 0  # bytes in the playout queue at which the service is to pause, and to go on
        self._told: set[str] = set()
        self._unconfirmed = False
        self._ending: Stop | None = None
        self.start: Start | None = None
        self.stop: Stop | None = None
        self.playout: Playout | None = None
        self.recital: Recital | None = None
        self.close_code = 1000
        self.farewell = False
        """Whether the carrier was told to end the session and closes the socket itself."""
        self.frames_in = 0
        self.frames_out = 0
        self.received_bytes = 0
        self.duplicate_bytes = 0
        self.gap_ms = 0
        self.bad: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.outcomes: Counter[Outcome] = Counter()
        self.faults: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        """Whether the stream has ended: nothing more is told, and the socket should be closed."""
        return self.stop is not None

    @property
    def waiting(self) -> int:
        """Frames that could be sent at once; audio that waits for its time is in `playout`."""
        return len(self._frames)

    @property
    def settled(self) -> bool:
        """Whether nothing is to be sent, now or later, unless something happens: no need to ask what, and when."""
        playout = self.playout
        return playout is not None and playout.settled and not self._frames and self._ending is None and self.stop is None

    # --- from the carrier ---

    def receive(self, frame: str | bytes, now: float) -> None:
        """Take one frame of the carrier."""
        self.frames_in += 1
        if self.stop is not None:
            return
        try:
            events = self._codec.decode(frame)
        except MalformedFrame as error:
            self._malformed(error, now)
            self._pass(frame)
            return
        if (playout := self.playout) is not None and playout.outbound is not None:
            self.tell_heard(now)
        for event in events:
            if type(event) is Audio:
                self._hear(event, frame)
            else:
                self._tell(event, now)
                self._pass(frame)
        if (playout := self.playout) is not None and playout.outbound is not None and self.received_bytes:
            placed = self.received_bytes - self.duplicate_bytes
            playout.outbound.sync(playout.media_format.duration_ms(placed) + self.gap_ms, now)

    def end(self, reason: StopReason, now: float) -> None:
        """The stream is over, by whichever side: tell what was lost, then stop. Only the first reason counts."""
        self._finish(Stop(reason), now)

    def release(self) -> None:
        """After the end: nothing is told any more, and whoever was told is not held by us."""
        self._emit = self._note = _tell_nobody

    # --- from the service ---

    def perform(self, command: Command, now: float) -> None:
        """Carry out one command. What can't be done comes back as a fault with the command's `ref`."""
        if self.stop is not None:
            return
        try:
            if type(command) is Audio:
                self._play(command, now)
            else:
                self.tell_heard(now)
                self._obey(command, now)
        except LocalError as error:
            self.fault(error.code, str(error), _ref(command))

    def follow_playout(self, now: float) -> None:
        """From now on tell what the caller hears as well: audio of the outbound track, unless the carrier sends that itself."""
        if self.playout is not None and Audio in self._codec.accepts:
            self.playout.follow(now)

    def tell_heard(self, now: float) -> None:
        """The outbound track up to now, so that it stands before whatever is told next."""
        if self.playout is not None and self.playout.outbound is not None:
            for event in self.playout.outbound.take(self.playout.position(now), now):
                self._emit(event)

    def fault(self, code: str, message: str, ref: str | int | None = None) -> None:
        """Tell the service that something was refused. Nothing is told once the stream is over."""
        if self.stop is None:
            self.faults[code] += 1
            self._emit(Fault(code, message, ref))

    # --- to the carrier ---

    def next_frame(self, now: float) -> str | bytes | None:
        """The next frame to send, or None for now; then look at `next_due` and `over`."""
        if not self._frames and self.stop is None and (playout := self.playout) is not None:
            if playout.outbound is not None and playout.outbound.due <= now:
                self.tell_heard(now)
            if playout.awaited:
                self._tell_overdue(playout, now)
            if (item := playout.next_frame(now)) is not None:
                self._frames.extend(self._codec.encode(item))
                if self._paused:
                    self._watch_level(playout)
        if self._frames:
            self.frames_out += 1
            return self._frames.popleft()
        if self._ending is not None and self.stop is None and self._quiet(now):
            self._stop(self._ending, now)
            return self.next_frame(now)
        return None

    def next_due(self) -> float | None:
        """When `next_frame` should be called again if nothing else happens; None: not before then."""
        if self.stop is not None:
            return None
        if self.playout is not None:
            due, outbound = self.playout.next_due(), self.playout.outbound
            if outbound is not None:
                return outbound.due if due is None else min(due, outbound.due)
            return due
        return self.recital.next_due() if self.recital is not None else None

    # --- inside: upwards ---

    def _hear(self, audio: Audio, frame: str | bytes | None = None) -> None:
        """Take what the carrier sent. With its `frame` it may be held until those before it are here."""
        if self._disorder is not None and frame is not None:
            self._sort(audio, frame)
            return
        if self.start is None:
            if len(self._early) < HELD_FRAMES:
                self._early.append(audio)
            else:
                self.bad["before_start"] += 1
            return
        if self._rests or len(audio.payload) % self._sample_bytes:
            audio = self._whole(audio)
        size = len(audio.payload)
        if not size:
            return
        self.received_bytes += size
        if audio.timestamp_ms is not None:
            timeline = self._timelines.get(audio.track)
            if timeline is None:
                if frame is not None and self._overtook(frame):
                    self._hold(audio, frame)
                    return
                timeline = self._timelines[audio.track] = Timeline()
            lost = timeline.place(audio.timestamp_ms, audio.payload, size * 1000 / self._rate)
            if lost is None:
                self.duplicate_bytes += size
                self._last_dropped = frame or ""
                return
            if lost:
                if frame is not None and self._overtook(frame):
                    timeline.take_back()
                    self._hold(audio, frame)
                    return
                self.gap_ms += lost
                self._emit(Gap(lost, audio.track))
            if frame is not None:
                self._last_audio = frame
        self._emit(audio)

    def _pass(self, frame: str | bytes) -> None:
        """A frame that is no audio has its place in the order too."""
        if self._disorder is not None or self._overtook(frame):
            self._sort(None, frame)
        self._last_other = frame

    def _overtook(self, frame: str | bytes) -> bool:
        """Whether the frames that are missing before this one may still come: by its number, not if the carrier left time out."""
        if self._number is None or self._rests:
            return False
        last = (self._last_audio, self._last_other, self._last_dropped)
        seen = (self._last_number, *map(self._number, last))
        missing = 1 + max(number for number in seen if number is not None)
        number = self._number(frame)
        if not missing or number is None or not missing < number <= missing + WINDOW:
            return False
        self._disorder = Reorder(missing)
        return True

    def _hold(self, audio: Audio, frame: str | bytes) -> None:
        self.received_bytes -= len(audio.payload)  # it is counted when it is heard
        self._sort(audio, frame)

    def _sort(self, audio: Audio | None, frame: str | bytes) -> None:
        """One more frame while there is a disorder."""
        number = self._number(frame) if self._number is not None else None
        if self._disorder is None or (number is None and audio is None):
            return
        if number is None:
            self.settle()
            self._put(audio)
            return
        for each in self._disorder.put(number, audio):
            self._put(each)
        if not self._disorder.holds:
            self.settle()

    def settle(self) -> None:
        """Wait no longer for frames that others have overtaken. For whoever sees that nothing more comes."""
        if self._disorder is not None:
            disorder, self._disorder = self._disorder, None
            for audio in disorder.give_up():
                self._put(audio)
            self._last_number = disorder.missing - 1

    def _put(self, audio: Audio | None) -> None:
        if audio is not None:
            self._hear(audio)

    def _tell_overdue(self, playout: Playout, now: float) -> None:
        for result in playout.overdue(now):
            if not self._unconfirmed:
                # Once per stream: a carrier that confirms nothing would fill the log.
                self._unconfirmed = True
                self._note("checkpoint_unconfirmed", {"name": result.name, "waited_secs": CONFIRM_SECS})
            self._report(result)

    def _whole(self, audio: Audio) -> Audio:
        """Whole samples only: a byte too many is carried over to the track's next chunk."""
        payload = self._rests.pop(audio.track, b"") + audio.payload
        over = len(payload) % self._sample_bytes
        if over:
            self._rests[audio.track] = payload[-over:]
            payload = payload[:-over]
        return Audio(payload, audio.track, audio.timestamp_ms)

    def _tell(self, event: Event, now: float) -> None:
        match event:
            case Start():
                self._begin(event)
            case Stop():
                self._finish(event, now)
            case Checkpoint():
                if self.playout is not None:
                    for result in self.playout.confirm(event.name, now):
                        self._report(result)
            case Clear():
                pass  # only an acknowledgement: the session told the service when it cut
            case Unknown():
                self._remark(self.unknown, "unknown_frame", event.kind, "")
                if self.start is not None:
                    self._emit(event)
            case Fault():
                self.faults[event.code] += 1
                self._note("carrier_fault", {"code": event.code, "message": event.message})
                if self.start is not None:
                    self._emit(event)
            case Dtmf() | Transcript() | Spoken() | BargeIn() | Speech() | Gap() | Flow() | Audio():
                if self.start is None:
                    self.bad["before_start"] += 1
                    return
                if isinstance(event, Speech) and event.who is Party.AGENT and self.recital is not None:
                    self.recital.speech(event.active, now)
                if isinstance(event, Spoken) and self.recital is not None and self.recital.is_tones(event.text):
                    event = Spoken(event.text, tones=True)
                self._emit(event)
                if self.recital is not None and isinstance(event, (Spoken, BargeIn)):
                    heard = self.recital.spoken(event.text) if isinstance(event, Spoken) else self.recital.interrupted()
                    for result in heard:
                        self._report(result)
            case _ as never:
                assert_never(never)

    def _begin(self, start: Start) -> None:
        self.start = start
        if start.media_format is None:
            self.recital = Recital()
        else:
            self.playout = Playout(start.media_format, self._codec.limits, capacity_ms=self._capacity_ms)
            self._sample_bytes = start.media_format.sample_bytes
            self._rate = start.media_format.bytes_per_second
            self._full = start.media_format.bytes_for(self._capacity_ms // 2)
            self._drained = start.media_format.bytes_for(self._capacity_ms // 4)
        self._emit(start)
        early, self._early = self._early, []
        for audio in early:
            self._hear(audio)

    def _finish(self, stop: Stop, now: float) -> None:
        if self.stop is not None:
            return
        self.settle()
        self.tell_heard(now)
        if self.playout is not None:
            hung_up = stop.reason in (StopReason.CALLER_HANGUP, StopReason.CARRIER_CLOSED)
            for result in self.playout.finish(now, hung_up=hung_up):
                self._report(result)
        if self.recital is not None:
            for result in self.recital.finish():
                self._report(result)
        self.stop = Stop(stop.reason, stop.handoff, account=self.account(now))
        if self.start is not None:
            self._emit(self.stop)

    def pending(self, now: float) -> tuple[int, tuple[str, ...]]:
        """Milliseconds of audio that the caller has yet to hear, and the names of the checkpoints not yet resolved."""
        if self.playout is not None:
            return self.playout.queued_ms + round(self.playout.ahead_ms(now)), self.playout.pending
        return 0, self.recital.pending if self.recital is not None else ()

    def account(self, now: float) -> Account:
        """Where the audio went, in milliseconds. Forwarded and dropped are known only to the service's link."""
        if self.playout is None:
            return Account()
        duration_ms = self.playout.media_format.duration_ms
        _, played, cleared, lost = (round(duration_ms(size)) for size in self.playout.totals(now))
        received = round(duration_ms(self.received_bytes))
        # Each figure is rounded; the sum is made of what is told, so that it balances.
        return Account(received=received, queued=played + cleared + lost, played=played, cleared=cleared, lost=lost)

    def _malformed(self, error: MalformedFrame, now: float) -> None:
        self._remark(self.bad, "bad_frame", error.reason, str(error))
        if error.reason == "second_start":  # of another stream: whose audio comes after it, nobody could tell
            self.close_code = 1008
            self.end(StopReason.PROTOCOL_ERROR, now)
            return
        if now - self._bad_since > BAD_FRAMES_SECS:
            self._bad_since, self._bad_recently = now, 0
        self._bad_recently += 1
        if self._bad_recently > BAD_FRAMES:
            self._note("too_many_bad_frames", {"frames": self._bad_recently, "within_secs": BAD_FRAMES_SECS})
            self.close_code = 1008
            self.end(StopReason.PROTOCOL_ERROR, now)

    def _remark(self, counter: Counter[str], what: str, kind: str, detail: str) -> None:
        """Count, and remark on it the first time."""
        if kind not in counter and len(counter) >= REMARKED_KINDS:
            kind = "other"
        counter[kind] += 1
        if counter[kind] == 1:
            self._note(what, {"kind": kind, "detail": detail[:200]})

    def _report(self, checkpoint: Checkpoint) -> None:
        if checkpoint.outcome is not None:
            self.outcomes[checkpoint.outcome] += 1
        self._emit(checkpoint)

    # --- inside: downwards ---

    def _play(self, audio: Audio, now: float) -> None:
        playout = self.playout
        if Audio not in self._codec.accepts:
            self._refuse_audio("unsupported_command", str(self._unsupported(Audio)))
        elif playout is None:
            self._refuse_audio(NotStarted.code, NOT_STARTED)
        elif self._ending is not None:
            self._refuse_audio("stopping", STOPPING)
        elif len(audio.payload) % playout.sample_bytes:
            self._refuse_audio("malformed_audio", f"{len(audio.payload)} bytes are no whole number of samples")
        else:
            if playout.push(audio.payload, now):
                message = f"the playout queue holds {self._capacity_ms} ms and is full: the newest audio was refused"
                self._refuse_audio("playout_overflow", message)
            if playout.queued_bytes >= self._full:
                self._watch_level(playout)

    def _refuse_audio(self, code: str, message: str) -> None:
        """Tell it once, not once a frame; for a full queue, once until it has drained."""
        if code not in self._told:
            self._told.add(code)
            self.fault(code, message)

    def _obey(self, command: Command, now: float) -> None:
        kind = type(command)
        if kind not in self._codec.accepts and kind is not Stop:
            raise self._unsupported(kind)
        if self.start is None:
            raise NotStarted(NOT_STARTED)
        if self._ending is not None and not isinstance(command, (Clear, Stop)):
            self.fault("stopping", STOPPING, _ref(command))
            return
        match command:
            case Checkpoint():
                if self.playout is not None:
                    if not self.playout.checkpoint(command.name):
                        self.fault("too_many_checkpoints", f"{MOST_PENDING} checkpoints are pending already", command.ref)
                elif self.recital is not None:
                    for result in self.recital.checkpoint(command.name):
                        self._report(result)
            case Clear():
                if self.playout is not None:
                    self._clear(command, self.playout, now)
            case Stop():
                if command.after is After.PLAYED:
                    self._ending = command
                    if self.playout is not None:
                        self.playout.end()
                    elif self.recital is not None:
                        self.recital.end()
                else:
                    self._stop(command, now)
            case Say():
                self._queue(command)
                if self.recital is not None:
                    self.recital.say(command.text, now)
            case Dtmf():
                self._queue(command)
                if self.recital is not None:
                    self.recital.say(command.digits, now, tones=True)
            case Play():
                self._queue(command)
                if self.recital is not None:
                    self.recital.play(now)
            case Language():
                self._queue(command)
            case Audio():
                self._play(command, now)
            case _ as never:
                assert_never(never)

    def _queue(self, command: Command) -> None:
        """For the carrier, at once. Raises Crowded when it takes nothing."""
        if len(self._frames) >= MOST_FRAMES:
            raise Crowded(f"{MOST_FRAMES} frames wait for the carrier already")
        self._frames.extend(self._codec.encode(command))

    def _clear(self, command: Clear, playout: Playout, now: float) -> None:
        frames = list(self._codec.encode(command))
        tell_carrier, results = playout.clear(now)
        if tell_carrier:
            self._frames.extend(frames)
        for result in results:
            if isinstance(result, Checkpoint):
                self._report(result)
            else:
                self._emit(result)
        self._watch_level(playout)

    def _stop(self, command: Stop, now: float) -> None:
        frames = list(self._codec.encode(command))
        self.farewell = bool(frames)
        self._frames.extend(frames)
        self._finish(Stop(StopReason.SERVICE_STOP, command.handoff), now)

    def _quiet(self, now: float) -> bool:
        if self.playout is not None:
            return self.playout.idle(now)
        return self.recital is None or self.recital.idle(now)

    def _unsupported(self, kind: type[Message]) -> UnsupportedCommand:
        accepted = ", ".join(sorted(COMMAND_NAMES[each] for each in self._codec.accepts)) or "nothing"
        return UnsupportedCommand(f"this stream can't carry out {COMMAND_NAMES[kind]!r}; it accepts: {accepted}")

    def _watch_level(self, playout: Playout) -> None:
        if not self._paused and playout.queued_bytes >= self._full:
            self._paused = True
            self._emit(Flow(FlowState.PAUSE, playout.queued_ms))
        elif self._paused and playout.queued_bytes <= self._drained:
            self._paused = False
            self._told.discard("playout_overflow")
            self._emit(Flow(FlowState.RESUME, playout.queued_ms))


def _tell_nobody(*_: object) -> None:
    pass


def _ref(command: Command) -> str | int | None:
    return None if isinstance(command, Audio) else command.ref
