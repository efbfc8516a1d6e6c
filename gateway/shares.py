"""How many calls the workers of one host have together, and the slots that one has reserved and another one's stream takes.

A memory that they share, with a cell for each worker: it alone writes there, but for a reservation that another worker takes
over by wiping it out. There are no locks, so that nobody waits for a worker that is stopped or dies: two workers that give away
the last slot in the same microseconds both do.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets

import numpy as np
import numpy.typing as npt

CELLS = 256
"""Workers at once, those that are leaving among them."""

RESERVED = 1023
"""Reservations of one worker that others can take over; further ones are counted."""

_WORDS = 1 + RESERVED  # of a cell: calls that are counted, then keys of reservations
_HEAD = 64
_WORKERS, _BOUND = 4, 5  # words of the head behind the secret: workers, and the first cell that never had one
_SIZE = _HEAD + CELLS * _WORDS * 8


def create() -> int:
    """The descriptor of a new memory, with a new secret in it."""
    descriptor = os.memfd_create("telephony-gateway shares")
    os.ftruncate(descriptor, _SIZE)
    os.pwrite(descriptor, secrets.token_bytes(32), 0)
    return descriptor


class Shares:
    """The memory behind a descriptor of `create`, as the worker with this cell sees it."""

    def __init__(self, descriptor: int, cell: int) -> None:
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._table: npt.NDArray[np.uint64] = np.frombuffer(self._memory, np.uint64, offset=_HEAD).reshape(CELLS, _WORDS)
        self._head = np.frombuffer(self._memory, np.uint64, count=_HEAD // 8)
        self._counted, self._keys = self._table[cell, :1], self._table[cell, 1:]
        self._mine = np.zeros(RESERVED, np.bool_)
        self._names: dict[int, str] = {}
        self._places: dict[str, int] = {}
        self._free = [*range(RESERVED)]
        self._active = 0
        self._unlisted: set[str] = set()

    @property
    def secret(self) -> str:
        """The same for all workers of this memory: for a configuration without one."""
        return self._memory[:32].hex()

    @property
    def workers(self) -> int:
        """How many take calls."""
        return int(self._head[_WORKERS]) or 1

    @workers.setter
    def workers(self, count: int) -> None:
        self._head[_WORKERS] = count

    def clear(self, cell: int, *, used: bool = True) -> None:
        """A worker is gone, or is about to come (`used`): nothing is in its cell."""
        if not used and cell >= int(self._head[_BOUND]):
            return
        self._table[cell] = 0
        self._head[_BOUND] = max(int(self._head[_BOUND]), cell + 1)

    def calls(self, cell: int) -> int:
        """Calls with a stream that the worker with this cell has, and reservations that could not be listed."""
        return int(self._table[cell, 0])

    def total(self) -> int:
        """Calls and reservations of all workers."""
        table = self._table[: int(self._head[_BOUND])]
        return int(table[:, 0].sum()) + int(np.count_nonzero(table[:, 1:]))

    def set_active(self, calls: int) -> None:
        """This worker has so many calls with a stream."""
        self._active = calls
        self._counted[0] = self._active + len(self._unlisted)

    def reserve(self, call_id: str) -> None:
        if not self._free:
            self._unlisted.add(call_id)
            self.set_active(self._active)
            return
        place = self._free.pop()
        self._names[place], self._places[call_id] = call_id, place
        self._mine[place] = True
        self._keys[place] = _key(call_id)

    def release(self, call_id: str) -> None:
        """A reservation of this worker is over, or its call has a stream here."""
        place = self._places.pop(call_id, None)
        if place is None:
            self._unlisted.discard(call_id)
            self.set_active(self._active)
            return
        del self._names[place]
        self._mine[place] = False
        self._keys[place] = 0
        self._free.append(place)

    def claim(self, call_id: str) -> bool:
        """Whether another worker had reserved a slot for this call; then it is given up there."""
        found = np.argwhere(self._table[: int(self._head[_BOUND]), 1:] == _key(call_id))
        for cell, place in found:
            self._table[cell, 1 + place] = 0
        return len(found) > 0

    def claimed(self) -> list[str]:
        """Reservations of this worker that another one has taken over; they are released."""
        gone = [self._names[int(place)] for place in np.flatnonzero(self._mine & (self._keys == 0))]
        for call_id in gone:
            self.release(call_id)
        return gone


def _key(call_id: str) -> np.uint64:
    """Never 0."""
    return np.uint64(int.from_bytes(hashlib.blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()) | 1)
