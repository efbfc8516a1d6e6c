"""Publish and subscribe inside the process. A subscriber can never slow a call: its queue is bounded and sheds its own audio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.events import Audio, Event, Gap, GapReason, Stop
from gateway.media import MediaFormat, Track

MOST_EVENTS = 10_000
"""Events other than audio that one queue may hold: more than a stream can have checkpoints pending."""

Watcher = Callable[[str, Event], None]
"""Called with the session's id and each event but audio. Must be quick and must not raise."""


class Subscription:
    """One consumer's bounded queue of one stream's events, audio of one track only, or of both with `both`.

    `offer` never blocks: beyond `capacity_ms` the oldest audio is dropped, counted, and told as one `Gap` in its place.
    """

    __slots__ = (
        "_capacity", "_chunks", "_events", "_format", "_hear", "_notify", "_queued", "_shed", "_waiting", "audio_bytes", "both",
        "dropped_bytes", "dropped_events", "taken_bytes", "track",
    )  # fmt: skip

    def __init__(self, media_format: MediaFormat | None, *, capacity_ms: int, track: Track = Track.INBOUND) -> None:
        self._events: deque[Event] = deque()
        self._waiting = asyncio.Event()
        self._notify: Callable[[], None] = self._waiting.set
        self._hear: Callable[[bytes], bool] | None = None
        self._format = media_format
        self._capacity = media_format.bytes_for(capacity_ms) if media_format is not None else 0
        self.track = track
        self.both = False
        """Whether audio of the other track is queued as well; figures are of `track` alone."""
        self._chunks = 0  # of audio in the queue
        self._queued = 0  # bytes of audio in the queue, of whichever track
        self._shed: dict[Track, int] = {}  # bytes dropped and not yet told
        self.audio_bytes = 0
        """Bytes of audio in the queue."""
        self.taken_bytes = 0
        self.dropped_bytes = 0
        self.dropped_events = 0

    @property
    def offered_bytes(self) -> int:
        """Bytes of audio that came this way, whatever became of them."""
        return self.taken_bytes + self.dropped_bytes + self.audio_bytes

    def offer(self, event: Event) -> None:
        """Queue an event, shedding the oldest audio if there is no room."""
        if type(event) is Audio:
            size = len(event.payload)
            if event.track is self.track:
                if self._hear is not None and not self._events and self._hear(event.payload):
                    self.taken_bytes += size
                    return
                self.audio_bytes += size
            elif not self.both:
                return
            self._queued += size
            self._chunks += 1
            self._events.append(event)
            if self._queued > self._capacity:
                self._make_room()
        else:
            if len(self._events) - self._chunks >= MOST_EVENTS and type(event) is not Stop:
                self.dropped_events += 1
                return
            self._events.append(event)
        self._notify()

    def notify(self, whom: Callable[[], None] | None, hear: Callable[[bytes], bool] | None = None) -> None:
        """Have this called after each event, which must not raise, in place of ending a `wait`; None: no longer.

        `hear` is offered audio of the track before it is queued, while nothing is, and returns whether it has taken it.
        """
        self._notify = whom if whom is not None else self._waiting.set
        self._hear = hear

    def nudge(self) -> None:
        """End a `wait`: whoever takes has something else to do."""
        self._waiting.set()

    async def wait(self) -> None:
        """Until something is queued, or a nudge."""
        await self._waiting.wait()

    async def take(self) -> list[Event]:
        """Everything queued, oldest first; waits until there is something."""
        await self._waiting.wait()
        return self.take_nowait()

    def take_nowait(self) -> list[Event]:
        """Everything queued, oldest first; maybe nothing."""
        self._waiting.clear()
        events = list(self._events)
        self._events.clear()
        self.taken_bytes += self.audio_bytes
        self.audio_bytes = self._chunks = self._queued = 0
        if self._shed and self._format is not None:
            # What was shed was the oldest: it is missing before the first audio left.
            at = next((i for i, event in enumerate(events) if type(event) is Audio), len(events))
            for track, size in self._shed.items():
                events.insert(at, Gap(round(self._format.duration_ms(size)), track, GapReason.OVERFLOW))
            self._shed.clear()
        return events

    def _make_room(self) -> None:
        while self._queued > self._capacity * (2 if self.both else 1) and self._chunks > 1:  # the newest chunk is never too much
            # Audio is near the front: everything before it is a handful of other events.
            at = next(i for i, event in enumerate(self._events) if type(event) is Audio)
            event = self._events[at]
            del self._events[at]
            if not isinstance(event, Audio):
                raise TypeError(type(event))
            size = len(event.payload)
            self._queued -= size
            self._chunks -= 1
            self._shed[event.track] = self._shed.get(event.track, 0) + size
            if event.track is self.track:
                self.audio_bytes -= size
                self.dropped_bytes += size


class Channel:
    """The events of one stream, fanned out."""

    __slots__ = ("_subscriptions", "_watchers", "session_id")

    def __init__(self, session_id: str, watchers: list[Watcher]) -> None:
        self.session_id = session_id
        self._watchers = watchers
        self._subscriptions: list[Subscription] = []

    def publish(self, event: Event) -> None:
        """Give an event to every subscriber of this stream, and to the watchers of all streams unless it is audio."""
        for subscription in self._subscriptions:
            subscription.offer(event)
        if type(event) is not Audio:
            for watcher in self._watchers:
                watcher(self.session_id, event)

    def subscribe(self, subscription: Subscription) -> None:
        self._subscriptions.append(subscription)

    def unsubscribe(self, subscription: Subscription) -> None:
        """It gets nothing any more."""
        self._subscriptions = [each for each in self._subscriptions if each is not subscription]


class Bus:
    """All streams of this process."""

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []

    def channel(self, session_id: str) -> Channel:
        """A channel for a new stream."""
        return Channel(session_id, self._watchers)

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """See every event but audio of every stream from now on. Returns what ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)
