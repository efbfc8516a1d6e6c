"""One track's time axis: the carrier's timestamps rule, and audio that should be there and is not is told as a gap."""

from __future__ import annotations

JITTER_MS = 15
"""Less than a frame: a shorter hole is the carrier's rounding, not a loss."""

LARGEST_SURPLUS_MS = 10_000
"""Audio ahead of its timestamps (a burst stamped by arrival) is kept whole and later gaps are set off against it, up to this."""


CLOCK_SET_BACK_MS = 1000
"""A timestamp so far before the last one is a clock set back; one less far before it is an old chunk once more."""


class Timeline:
    """Compares the audio of one track with its timestamps. Milliseconds; nothing here knows a wall clock.

    The sum of audio and told gaps is as long as the timestamps say, within JITTER_MS.
    """

    __slots__ = ("_ahead", "_before", "_last_payload", "_last_timestamp")

    def __init__(self) -> None:
        self._last_timestamp: int | None = None
        self._last_payload = b""
        self._ahead = 0.0  # milliseconds of audio (and told gaps) beyond the time of the last timestamp
        self._before = (0, b"", 0.0)  # all three, before the last gap

    def place(self, timestamp_ms: int, payload: bytes, duration_ms: float) -> int | None:
        """Put a chunk on the axis. Returns the milliseconds missing before it, or None if it is a duplicate to be dropped."""
        last = self._last_timestamp
        if last is None:
            self._begin(timestamp_ms, payload, duration_ms)
            return 0
        step = timestamp_ms - last
        if step <= -CLOCK_SET_BACK_MS:
            # Another time altogether: begin anew rather than invent or drop.
            self._begin(timestamp_ms, payload, duration_ms)
            return 0
        if step < -JITTER_MS or (step == 0 and payload == self._last_payload):
            return None
        ahead = self._ahead - step
        lost = 0
        if ahead < -JITTER_MS:
            self._before = (last, self._last_payload, self._ahead)
            lost = round(-ahead)
            ahead += lost  # the rest of the rounding counts towards the next gap
        self._last_timestamp = timestamp_ms
        self._last_payload = payload
        ahead += duration_ms
        self._ahead = ahead if ahead < LARGEST_SURPLUS_MS else LARGEST_SURPLUS_MS
        return lost

    def take_back(self) -> None:
        """The chunk before which something was missing was not to be placed yet. Right after `place`, once."""
        self._last_timestamp, self._last_payload, self._ahead = self._before

    def _begin(self, timestamp_ms: int, payload: bytes, duration_ms: float) -> None:
        self._last_timestamp = timestamp_ms
        self._last_payload = payload
        self._ahead = duration_ms
