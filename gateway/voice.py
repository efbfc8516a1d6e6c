"""The speech synthesis of a carrier of text: what reaches the caller, and what the carrier tells of it.

Pure: time is an argument. The counterpart for sound is `gateway.ear`.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from gateway.events import BargeIn, Event, Party, Play, Say, Speech, Spoken


class _Utterance(Struct):
    text: str
    cycle: int
    interruptible: bool
    preemptible: bool
    language: str | None


class _Tones(Struct):
    digits: str


class _Clip(Struct):
    play: Play


class Voice:
    """A text carrier's mouth: speaks queued text at a constant pace and tells what was spoken, in pieces of its own.

    Pieces end where a sentence pauses or after about forty characters; over a turn that was spoken whole they add up to the
    text exactly. Digits wait behind speech and are confirmed like words. Same time rules as `Ear`.
    """

    def __init__(self, *, chars_per_sec: float = 15.0, latency_secs: float = 0.3, clip_secs: float = 1.0) -> None:
        self.spoken = ""
        """All text the caller heard."""
        self.digits = ""
        """All tones the caller heard."""
        self.clips: list[str] = []
        """Sources of the media URLs the caller heard, each once."""
        self.first_heard_at: float | None = None
        self._pace = chars_per_sec
        self._latency = latency_secs
        self._clip_secs = clip_secs
        self._queue: deque[_Utterance | _Tones | _Clip] = deque()
        self._events: list[Event] = []
        self._now = float("-inf")
        self._head_at = 0.0  # when the first of the queue began, or begins
        self._done = 0  # characters of it that are told
        self._piece = ""
        self._piece_at = 0.0
        self._cycle = 0
        self._active = False

    def say(self, say: Say, now: float) -> list[Event]:
        """Text arrives. A new talk cycle cuts what is still queued or spoken of preemptible earlier ones."""
        self._run(now)
        kept = [
            item for item in self._queue if not (isinstance(item, _Utterance) and item.preemptible and item.cycle < self._cycle)
        ]
        if say.text and len(kept) < len(self._queue):
            if self._queue[0] is not (kept[0] if kept else None):
                self._cut_head()
                self._head_at, self._done = self._now, 0
            self._queue = deque(kept)
        if say.text:
            interruptible, preemptible = say.interruptible is not False, say.preemptible is True
            self._enqueue(_Utterance(say.text, self._cycle, interruptible, preemptible, say.language))
        if say.final:
            self._cycle += 1
        return self.advance(now)

    def tones(self, digits: str, now: float) -> list[Event]:
        """Digits to send: after the speech before them, confirmed by `Spoken`."""
        self._run(now)
        self._enqueue(_Tones(digits))
        return self.advance(now)

    def play(self, play: Play, now: float) -> list[Event]:
        """A media URL to play; nothing confirms it."""
        self._run(now)
        self._enqueue(_Clip(play))
        return self.advance(now)

    def interrupt(self, now: float) -> list[Event]:
        """The caller speaks or presses a key. Cuts interruptible speech: `Spoken` fragment, `BargeIn`, `Speech` off.

        They come in this order. Nothing comes back, and speech goes on, when the line is silent or must not be interrupted.
        """
        events = self.advance(now)
        head = self._queue[0] if self._queue else None
        if not isinstance(head, _Utterance) or not head.interruptible or self._now < self._head_at:
            return events
        fragment, after_ms = self._cut_head()
        self._queue.clear()
        self._events.append(BargeIn(fragment, after_ms))
        return events + self._hush()

    def end(self, now: float) -> None:
        """The stream is over: what was not spoken never is, and nothing is told of it."""
        self._run(now)
        if self._queue and self._now >= self._head_at:
            self._cut_head()
        self._queue.clear()
        self._events.clear()
        self._piece, self._active = "", False

    def advance(self, now: float) -> list[Event]:
        """What the carrier has to say by `now`."""
        self._run(now)
        events, self._events = self._events, []
        return events

    def next_event(self) -> float | None:
        """When `advance` will next have something to say; None if not before more arrives."""
        if self._events:
            return self._now
        if not self._queue:
            return None
        return self._head_at if not self._active or self._now < self._head_at else self._next_boundary()[0]

    def speaking(self, now: float) -> bool:
        """The agent is being heard at this moment."""
        self._run(now)
        return self._active

    def sounding(self, now: float) -> bool:
        """The agent is being heard at this moment, or is about to be."""
        self._run(now)
        return bool(self._queue)

    def _enqueue(self, item: _Utterance | _Tones | _Clip) -> None:
        if not self._queue:
            self._head_at = self._now + (0.0 if self._active else self._latency)
            self._done = 0
        self._queue.append(item)

    def _run(self, now: float) -> None:
        self._now = max(self._now, now)
        while self._queue and self._head_at <= self._now:
            if not self._active:
                self._active = True
                self._events.append(Speech(Party.AGENT, True))
                if self.first_heard_at is None:
                    self.first_heard_at = self._head_at
            at, done = self._next_boundary()
            if at > self._now:
                return
            self._reach(at, done)

    def _next_boundary(self) -> tuple[float, int]:
        """Time and character of the next thing to tell: the end of a piece, or of the queue's head."""
        head = self._queue[0]
        match head:
            case _Utterance(text=text):
                length = len(self._piece)
                for index in range(self._done, len(text)):
                    length += 1
                    if text[index] in ".!?,;:" or (length >= 40 and text[index] == " "):
                        return self._head_at + (index + 1) / self._pace, index + 1
                return self._head_at + len(text) / self._pace, len(text)
            case _Tones(digits=digits):
                return self._head_at + 0.1 * len(digits), len(digits)
            case _Clip():
                return self._head_at + self._clip_secs, 0

    def _reach(self, at: float, done: int) -> None:
        head = self._queue[0]
        ended = True
        if isinstance(head, _Utterance):
            if not self._piece:
                self._piece_at = self._head_at + self._done / self._pace
            self._piece += head.text[self._done : done]
            self.spoken += head.text[self._done : done]
            self._done = done
            ended = done == len(head.text)
            last = ended and (len(self._queue) == 1 or not isinstance(self._queue[1], _Utterance))
            if last or self._piece[-1:] in tuple(".!?,;:") or (len(self._piece) >= 40 and self._piece.endswith(" ")):
                self._events.append(Spoken(self._piece))
                self._piece = ""
        elif isinstance(head, _Tones):
            self.digits += head.digits
            self._events.append(Spoken(head.digits))
        else:
            self.clips.append(head.play.source)
        if ended:
            self._queue.popleft()
            self._head_at, self._done = at, 0
            if not self._queue:
                self._events += self._off()

    def _cut_head(self) -> tuple[str, int]:
        """Stops the head in mid-word and tells what was heard of the current piece, in whole words."""
        head = self._queue[0]
        if not isinstance(head, _Utterance):
            return "", 0
        position = min(len(head.text), max(self._done, int((self._now - self._head_at) * self._pace + 1e-6)))
        while (
            self._done < position < len(head.text) and not head.text[position].isspace() and not head.text[position - 1].isspace()
        ):
            position -= 1
        started = self._piece_at if self._piece else self._head_at + self._done / self._pace
        heard = head.text[self._done : position]
        self.spoken += heard
        fragment, self._piece = self._piece + heard, ""
        if fragment:
            self._events.append(Spoken(fragment))
        return fragment.strip(), max(0, round((self._now - started) * 1000))

    def _hush(self) -> list[Event]:
        self._events += self._off()
        events, self._events = self._events, []
        return events

    def _off(self) -> list[Event]:
        if not self._active:
            return []
        self._active = False
        return [Speech(Party.AGENT, False)]
