"""Files that are written while calls run: one thread for each directory, so that a slow disk is nobody's but its own."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

EXIT_SECS = 5.0
"""How long a process that ends waits for its files."""

Item_contra = TypeVar("Item_contra", contravariant=True)
Written = TypeVar("Written")


class Paper(Protocol[Item_contra]):
    """What is written; made, used and closed on the thread. What it raises ends it, and it alone."""

    def write(self, item: Item_contra) -> None: ...

    def close(self, failure: Exception | None) -> None:
        """Make the best of what is there; the last call. `failure` is what `write` raised."""
        ...


class Scribe:
    """The thread for one directory. Get it by `at`."""

    _all: dict[Path, Scribe] = {}  # noqa: RUF012 — one per directory of this process, whoever asks

    def __init__(self) -> None:
        self.queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="scribe", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    @classmethod
    def at(cls, directory: Path, first: Callable[[], object] | None = None) -> Scribe:
        """The directory's scribe; a new one does `first` before anything else."""
        place = directory.absolute()
        scribe = cls._all.get(place)
        if scribe is None:
            scribe = cls._all[place] = cls()
            if first is not None:
                scribe.queue.put(first)
        return scribe

    def stop(self, timeout_secs: float = EXIT_SECS) -> None:
        """Write what is queued, then end; the thread of a disk that hangs is left."""
        self.queue.put(None)
        self._thread.join(timeout_secs)

    def _run(self) -> None:
        while (job := self.queue.get()) is not None:
            with suppress(Exception):  # jobs of a pen handle their own
                job()
            del job  # or the last call of the night would stay until the morning


class Pen(Generic[Written]):
    """One file's bounded way to its thread. Make it in a running loop; nothing here ever waits for the disk but `closed`."""

    def __init__(
        self, scribe: Scribe, make: Callable[[], Paper[Written]], *, capacity_bytes: int, failed: Callable[[Exception], None]
    ) -> None:
        """`make` runs on the thread. `failed` is called in the loop, once, with what ended the file before its time."""
        self._scribe = scribe
        self._make = make
        self._failed = failed
        self._capacity = capacity_bytes
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting = 0
        self._paper: Paper[Written] | None = None
        self._over = False  # on the thread: no paper any more, or never
        self._shut = False
        self._closed = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether the disk is behind by all that may wait for it."""
        return self._waiting >= self._capacity

    def put(self, item: Written, size: int) -> bool:
        """Have `item` written. False: it was not taken, for the queue is full."""
        if self.full or self._shut:
            return False
        with self._lock:
            self._waiting += size
        self._scribe.queue.put(lambda: self._write(item, size))
        return True

    def close(self) -> None:
        """Nothing more will come; what was put is written."""
        if not self._shut:
            self._shut = True
            self._scribe.queue.put(self._finish)

    async def closed(self) -> None:
        """Until the file is complete."""
        await self._closed.wait()

    # --- on the thread ---

    def _write(self, item: Written, size: int) -> None:
        try:
            if self._paper is None and not self._over:
                self._paper = self._make()
            if self._paper is not None:
                self._paper.write(item)
        except Exception as error:  # whatever it is, it must end the file and nothing else
            self._end(error)
            self._tell(self._failed, error)
        finally:
            with self._lock:
                self._waiting -= size

    def _finish(self) -> None:
        try:
            self._end(None)
        except Exception as error:
            self._tell(self._failed, error)
        finally:
            self._tell(self._closed.set)

    def _end(self, failure: Exception | None) -> None:
        paper, self._paper, self._over = self._paper, None, True
        if paper is not None:
            if failure is None:
                paper.close(None)
            else:
                with suppress(Exception):  # it has failed already
                    paper.close(failure)

    def _tell(self, function: Callable[..., object], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is over
            self._loop.call_soon_threadsafe(function, *arguments)
