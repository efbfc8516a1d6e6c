"""One of several processes that take calls, and the nursery that they are forked from, so that a new one is there in no time.

`python -m gateway.worker N` is the nursery: it imports everything, waits at descriptor N, and forks. A worker lives on if its
supervisor dies: it goes on taking calls, and lets the next supervisor find it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from gateway import config, control, garbage, logs
from gateway.control import Beat, Drain, Failed, Fork, Hello, Idle, Leaving, Message, Ready, Reloaded, Retire, Stop, Take, Warm
from gateway.errors import ConfigError
from gateway.host import run
from gateway.reload import Reload, load_providers, merge
from gateway.server import Place, Server
from gateway.shares import Shares

EXIT_CONFIG = 78
BEAT_SECS = 5.0
"""How often a worker says that its event loop turns."""


def nursery(peer: socket.socket) -> int:
    """Fork a worker whenever that is asked for, until the supervisor is gone."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):  # a terminal's are for the supervisor
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers are buried by the system: they may outlive us
    gc.collect()
    gc.freeze()
    control.send(peer, Warm())
    while (got := control.receive(peer)) is not None:
        message, descriptors = got
        if not isinstance(message, Fork):
            continue
        if os.fork() == 0:
            peer.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return work(socket.socket(fileno=descriptors[0]))
        control.close(descriptors)
    return 0


def work(peer: socket.socket) -> int:
    """A worker's whole life. Returns the exit code."""
    got = control.receive(peer)
    if got is None:
        return 1
    take, descriptors = got
    if not isinstance(take, Take):
        return 1
    control.send(peer, Hello(os.getpid(), take.slot, take.cell))
    memory, *texts = descriptors[:3]
    listening = descriptors[3:]
    try:
        base_settings, newer = (config.examine_text(control.read_text(each), source=take.path)[0] for each in texts)
        settings, _ = merge(base_settings, newer)
    except ConfigError as error:
        control.send(peer, Failed(EXIT_CONFIG, str(error)[:50_000]))
        return EXIT_CONFIG
    control.close(texts)
    logs.configure(level=settings.log_level, worker=take.slot)
    sockets = [socket.socket(fileno=each) for each in listening]
    base = Path(take.directory) / f"{os.getpid()}"
    place = Place(sockets, Shares(memory, take.cell), f"{base}.http")
    try:
        server = Server(settings, load_providers(settings), config.dialect, place)
    except Exception as error:  # a provider from outside this tree may fail in any way, with anything in its words
        control.send(peer, Failed(EXIT_CONFIG, f"{take.path}: a provider can't be made: {type(error).__name__}"))
        return EXIT_CONFIG
    try:
        return run(Worker(peer, take, server, memory, sockets, f"{base}.sock").live())
    finally:
        for path in (f"{base}.sock", f"{base}.http"):
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108


class Worker:
    """A server, whoever supervises it."""

    def __init__(
        self, peer: socket.socket, take: Take, server: Server, memory: int, sockets: Sequence[socket.socket], path: str
    ) -> None:
        self._peer: socket.socket | None = peer
        self._take = take
        self._server = server
        self._memory = memory
        self._sockets = sockets
        self._spares = [each.dup() for each in sockets]  # the server closes its own when it retires
        self._path = path
        self._log = structlog.get_logger("gateway")
        self._over = asyncio.Event()
        self._leaving: asyncio.Task[None] | None = None
        self._idle = False
        self._tasks: asyncio.TaskGroup
        self._reload = Reload(Path(take.path), server)

    async def live(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._told_to_go)
        try:
            await self._server.start()
        except ConfigError as error:
            self._tell(Failed(EXIT_CONFIG, str(error)[:50_000]))
            return EXIT_CONFIG
        except OSError as error:
            self._tell(Failed(1, f"can't serve {error.filename or self._server.settings.listen}: {error.strerror or error}"))
            return 1
        self._server.watchdog.start()
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.setblocking(False)
        door.bind(self._path)
        door.listen(8)
        loop.add_reader(door, self._found, door)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._attend()
            meanwhile = [
                tasks.create_task(self._beat()),
                tasks.create_task(garbage.tidy(lambda: len(self._server.streams))),
            ]
            garbage.settle()
            self._tell(Ready())
            await self._over.wait()
            for task in meanwhile:
                task.cancel()
            if self._leaving is not None:
                self._leaving.cancel()
        self._log.info("stopping", live_streams=len(self._server.streams))
        await self._server.stop()
        loop.remove_reader(door)
        door.close()
        return 0

    # --- the supervisor ---

    def _attend(self) -> None:
        assert self._peer is not None  # noqa: S101 — there is one at first
        self._peer.setblocking(False)
        asyncio.get_running_loop().add_reader(self._peer, self._heard)

    def _tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        if self._peer is not None:
            control.send(self._peer, message, descriptors)

    def _heard(self) -> None:
        if self._peer is None:
            return
        try:
            got = control.receive(self._peer)
        except BlockingIOError:
            return
        if got is None:
            self._orphaned()
            return
        message, descriptors = got
        match message:
            case control.Reload():
                self._tasks.create_task(self._take_over(control.read_text(descriptors[0])))
            case Drain():
                self._server.drain()
                if message.leave:
                    self._leave()
            case Retire():
                self._retire()
            case Stop():
                self._over.set()
            case _:
                pass
        control.close(descriptors)

    def _orphaned(self) -> None:
        """Calls go on, and new ones are taken, until another supervisor has found us."""
        if self._peer is not None:
            asyncio.get_running_loop().remove_reader(self._peer)
            self._peer.close()
            self._peer = None
        self._log.warning("supervisor_lost", live_streams=len(self._server.streams))
        if self._idle:
            self._over.set()
        elif not self._take.findable:
            self._retire()

    def _found(self, door: socket.socket) -> None:
        """Another supervisor. There is one at a time, for it holds a lock."""
        with suppress(OSError):
            peer, _ = door.accept()
            if self._peer is not None:
                asyncio.get_running_loop().remove_reader(self._peer)
                self._peer.close()
            self._peer = peer
            leaving, accepts = self._leaving is not None, not self._server.retired
            hello = Hello(os.getpid(), self._take.slot, self._take.cell, accepts, leaving, self._server.hooks.draining)
            self._tell(hello, [self._memory, *(each.fileno() for each in self._spares if accepts)])
            self._attend()
            if self._idle:
                self._tell(Idle())

    async def _take_over(self, text: str) -> None:
        try:
            await self._reload(text)
        except ConfigError as error:
            self._tell(Reloaded(str(error)[:50_000]))
        else:
            self._tell(Reloaded())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECS)
            self._tell(Beat())

    # --- the end ---

    def _told_to_go(self) -> None:
        """Somebody sent SIGTERM to this very process: the supervisor shall put another one in its place first."""
        if self._leaving is not None:
            self._over.set()
        elif self._peer is not None:
            self._tell(Leaving())
        else:
            self._retire()

    def _retire(self) -> None:
        self._server.retire()
        for each in self._spares:
            each.close()
        self._spares = []
        self._leave()

    def _leave(self) -> None:
        if self._leaving is None:
            self._log.info("worker_leaving", live_streams=len(self._server.streams))
            self._leaving = self._tasks.create_task(self._finish())

    async def _finish(self) -> None:
        await self._server.finish(self._server.settings.drain_secs)
        self._idle = True
        if self._peer is None:
            self._over.set()
        else:
            self._tell(Idle())


def main() -> None:
    """See above."""
    sys.exit(nursery(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
