"""Frames that come out of order are put in order, as far as a short window allows."""

from __future__ import annotations

from bisect import insort
from operator import itemgetter
from typing import Generic, TypeVar

T = TypeVar("T")

WINDOW = 3
"""Frames that may overtake another one. At 20 ms each, a real loss holds live audio back for 60 ms, and none other for any."""

_number = itemgetter(0)


class Reorder(Generic[T]):
    """One hole in a carrier's numbers, from where it is seen until it is filled or given up; in order there is none of these.

    `put` returns what is next in order: nothing while a number is missing that could still come, what is late at once. It never
    loses or doubles anything, and holds WINDOW frames at most.
    """

    __slots__ = ("_held", "missing")

    def __init__(self, missing: int) -> None:
        self.missing = missing
        """The number that is waited for."""
        self._held: list[tuple[int, T]] = []

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def put(self, number: int, frame: T) -> list[T]:
        """Take the frame of this number, whichever it is."""
        insort(self._held, (number, frame), key=_number)
        if len(self._held) > WINDOW:
            self.missing = max(self.missing, self._held[0][0])
        ready = []
        while self._held and self._held[0][0] <= self.missing:
            at, frame = self._held.pop(0)
            self.missing = max(self.missing, at + 1)
            ready.append(frame)
        return ready

    def give_up(self) -> list[T]:
        """What was held, in order; nothing is waited for any more."""
        held, self._held = self._held, []
        if held:
            self.missing = held[-1][0] + 1
        return [frame for _, frame in held]
