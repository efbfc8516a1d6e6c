"""The process that has the listening sockets of all workers and takes no call itself.

Each slot has one SO_REUSEPORT socket, which stays open here whoever accepts from it: handshakes wait in it while a worker is
away. A worker that dies is replaced by one that the nursery forks; on an upgrade all are replaced one by one, by a new nursery's.
Workers outlive a supervisor that dies, and the next one finds them by the directory that is named after the address.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import structlog
from msgspec import structs

from gateway import config, control, shares
from gateway.control import Beat, Drain, Failed, Fork, Hello, Idle, Leaving, Message, Ready, Reloaded, Retire, Stop, Take
from gateway.errors import ConfigError
from gateway.metrics import Packed, Sums, join_processes
from gateway.reload import examine, merge
from gateway.server import BACKLOG
from gateway.settings import Settings, host_port
from gateway.shares import CELLS, Shares
from gateway.systemd import Systemd

STARTS_SECS = 30.0
"""What a worker may take until it is ready."""

SILENT_SECS = 30.0
"""A worker whose event loop has not turned for so long never will."""

SHORT_LIFE_SECS = 1.0
"""A worker that dies within so long has not proved that it can live: each next one waits longer, up to LONGEST_PAUSE_SECS."""

FIRST_PAUSE_SECS = 0.1
LONGEST_PAUSE_SECS = 10.0

TICK_SECS = 1.0
ASK_SECS = 2.0
"""How long a worker may take to answer what its `Admin` is asked."""

UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError)
STOP_SECS = 10.0
"""What the end takes at most once calls have been told to end."""

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 — everybody may write there; the directory is ours, or we don't start


class NotStarted(Exception):
    """The supervisor can't start: exit with `code` and say this."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(eq=False)
class Hand:
    """A worker as its supervisor sees it."""

    peer: socket.socket
    slot: int
    cell: int
    directory: Path
    born: float
    pid: int = 0
    ready: bool = False
    leaving: bool = False
    idle: bool = False
    failed: Failed | None = None
    beat: float = 0.0
    seen: Packed | None = None
    """What it had counted when it was asked last."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """It is ready, or gone."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    reloaded: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """What came of reloads: nothing, or why not."""

    @property
    def admin(self) -> str:
        """Where its `Admin` listens."""
        return str(self.directory / f"{self.pid}.http")

    async def ask(self, path: str, secs: float = ASK_SECS) -> Any:
        """What its `Admin` answers, as JSON knows it. Raises aiohttp.ClientError, OSError, TimeoutError."""
        async with asyncio.timeout(secs), self.session() as http, http.get(f"http://worker{path}") as response:
            return msgspec.json.decode(await response.read())

    def session(self) -> aiohttp.ClientSession:
        """For requests to its `Admin`, at whatever host name."""
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.admin), auto_decompress=False)

    async def look(self) -> bool:
        """Whether it said what it has counted; see `seen`."""
        try:
            self.seen = msgspec.convert(await self.ask("/sums"), Packed)
        except UNREACHABLE:
            return False
        return True


@dataclass(eq=False)
class Slot:
    """One place for a worker, and its listening sockets: one, or one for each address that a name stands for."""

    number: int
    sockets: list[socket.socket]
    hand: Hand | None = None
    successor: Hand | None = None
    failures: int = 0


class Nursery:
    """The process that workers are forked from."""

    def __init__(self, lost: Callable[[Nursery], None]) -> None:
        self.peer, theirs = control.pair()
        self.warm = asyncio.Event()
        """Everything is imported, or the process is gone."""
        self.gone = False
        self._lost = lost
        # The path that we found our modules on, and no other. More threads than one would only be in the way of forks.
        options = [] if {"", os.getcwd()} & {*sys.path} else ["-P"]  # noqa: PTH109
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 — ourselves
                [sys.executable, *options, "-m", "gateway.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self.peer.setblocking(False)
        asyncio.get_running_loop().add_reader(self.peer, self._heard)

    def fork(self, end: socket.socket) -> None:
        """A worker, soon, at the other end of `end`, which is closed if there will be none."""
        with end:
            control.send(self.peer, Fork(), [end.fileno()])

    def close(self) -> None:
        if not self.gone:
            self.gone = True
            asyncio.get_running_loop().remove_reader(self.peer)
            self.peer.close()
            self.warm.set()

    def _heard(self) -> None:
        with suppress(BlockingIOError):
            if control.receive(self.peer) is not None:
                self.warm.set()
                return
            self.close()
            self._lost(self)


class Supervisor:
    """`run` it; it returns the process's exit code."""

    def __init__(self, path: Path, text: str, settings: Settings, workers: int) -> None:
        self.settings = settings
        self.port = 0
        self.draining = False
        self.departed = Sums()
        """What workers that are gone had counted, and whatever belongs to no worker."""
        self.departed_process: dict[str, float] = {}
        self.slots: list[Slot] = []
        self.leaving: list[Hand] = []
        """Workers that have been replaced, and whose calls go on."""
        self._path = path
        self._base = self._text = text
        self._workers = workers
        self._log = structlog.get_logger("gateway")
        self._systemd = Systemd()
        self._tasks: asyncio.TaskGroup
        self._nursery: Nursery
        self._turn = asyncio.Lock()
        self._over = asyncio.Event()
        self._serving = False
        self._ending = False
        self._stopping = False
        self._memory = -1
        self._shares: Shares
        self._directory: Path
        self._findable = host_port(settings.listen)[1] != 0
        self._lock = -1

    @property
    def hands(self) -> list[Hand]:
        """All workers, those that are leaving last."""
        return [each for slot in self.slots for each in (slot.hand, slot.successor) if each is not None] + self.leaving

    @property
    def ready(self) -> list[Hand]:
        """Workers that take calls."""
        return [slot.hand for slot in self.slots if slot.hand is not None and slot.hand.ready]

    async def run(self, started: Callable[[], Awaitable[Callable[[], Awaitable[None]]]]) -> int:
        """Until it is over. `started` opens what else there is to be opened, and returns how to close it."""
        close: Callable[[], Awaitable[None]] | None = None
        loop, code = asyncio.get_running_loop(), 0
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            meanwhile = [tasks.create_task(self._tick())]
            try:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self.end)
                loop.add_signal_handler(signal.SIGHUP, lambda: tasks.create_task(self._try(self.reload())))
                loop.add_signal_handler(signal.SIGUSR2, lambda: tasks.create_task(self._try(self.replace())))
                adopted = await self._start()
                close = await started()
                scheme = "https" if self.settings.tls is not None else "http"
                address = f"{host_port(self.settings.listen)[0]}:{self.port}"
                self._log.info(
                    "listening", address=address, scheme=scheme, providers=[*self.settings.providers], workers=len(self.slots)
                )
                self._serving = True
                if not self._ending:
                    self._systemd.ready()
                meanwhile.append(tasks.create_task(self._systemd.watch(self._status)))
                if adopted:
                    tasks.create_task(self._try(self.replace()))
                await self._over.wait()
                self._log.info("stopping")
            except NotStarted as failure:
                sys.stderr.write(f"{failure}\n")
                code = failure.code
            finally:
                self._stop_all()
                if close is not None:
                    await close()
                await self._all_gone(STOP_SECS)
                self._nursery_closed()
                for task in meanwhile:
                    task.cancel()
                self._tidy()
        return code

    def end(self) -> None:
        """Asked to end: take no new calls, and wait for those that there are. Asked again: at once."""
        if self._ending:
            self._stop_all()
            return
        self._ending = True
        live = sum(self._shares.calls(hand.cell) for hand in self.hands) if self._memory >= 0 else 0
        self.drain(leave=True)
        self._log.info("draining", live_calls=live)
        within = self.settings.drain_secs + 2 * STOP_SECS
        self._systemd.stopping(within)
        asyncio.get_running_loop().call_later(within, self._stop_all)
        self._end_if_idle()

    def drain(self, *, leave: bool = False) -> None:
        """No new calls, and not ready for any."""
        self.draining = True
        for hand in self.hands:
            if not hand.leaving:
                control.send(hand.peer, Drain(leave))

    async def reload(self) -> dict[str, list[str]]:
        """Have all workers go by the file. Raises ConfigError, and then nothing has changed."""
        async with self._turn:
            try:
                text = await asyncio.to_thread(config.read_file, self._path)
                new, _, warnings = await asyncio.to_thread(examine, self._path, text)
                merged, kept = merge(self.settings, new)
            except ConfigError as error:
                self._refuse(error)
                raise
            hands = self.ready
            for hand in hands:
                control.send(hand.peer, control.Reload(), [descriptor := control.text_descriptor(text)])
                os.close(descriptor)
            problems = [await self._reloaded(hand) for hand in hands]
            for hand, problem in zip(hands, problems, strict=True):
                if problem:
                    self._log.error("configuration_refused", worker=hand.slot, problem=problem)
            self._text, self.settings = text, merged
            self.departed.count("telephony_reloads", "applied")
            return {"kept": kept, "warnings": warnings}

    async def replace(self) -> bool:
        """Put a new worker in the place of each, one by one; each new one is a fresh interpreter's, and reads the file.

        Whether all were replaced. Raises ConfigError. Calls of the old ones go on for `drain_secs`.
        """
        async with self._turn:
            try:
                text = await asyncio.to_thread(config.read_file, self._path)
                new, _, _ = await asyncio.to_thread(examine, self._path, text)
            except ConfigError as error:
                self._refuse(error)
                raise
            fresh = Nursery(self._nursery_lost)
            with suppress(TimeoutError):
                await asyncio.wait_for(fresh.warm.wait(), STARTS_SECS)
            if fresh.gone or not fresh.warm.is_set():
                fresh.close()
                self._log.error("replacement_failed", problem="a new process does not start")
                return False
            before = self._nursery, self._base, self._text, self.settings
            self._nursery, self._base, self._text = fresh, text, text
            self.settings = structs.replace(new, listen=self.settings.listen, admin=self.settings.admin)
            for slot in self.slots:
                if not await self._renew(slot):
                    if slot.number == 0:
                        fresh.close()
                        self._nursery, self._base, self._text, self.settings = before
                    return False
            before[0].close()
            self._log.info("workers_replaced", workers=len(self.slots))
            return True

    # --- the beginning ---

    async def _start(self) -> bool:
        """Sockets, and a worker for each. Whether there were workers already. Raises NotStarted."""
        self._open_directory()
        self._nursery = Nursery(self._nursery_lost)
        found = [each for each in [await self._find(path) for path in sorted(self._directory.glob("*.sock"))] if each is not None]
        if self._memory < 0:
            self._memory = shares.create()
        self._shares = Shares(self._memory, CELLS - 1)
        for cell in {*range(CELLS)} - {hand.cell for hand, _ in found}:
            self._shares.clear(cell, used=False)
        taken = self._seat(found)
        for number in range(max(self._workers, len(taken))):
            self.slots.append(taken.get(number) or Slot(number, self._bind()))
        self.port = int(self.slots[0].sockets[0].getsockname()[1])
        self._shares.workers = len(self.slots)
        if self._ending:
            return False
        for slot in self.slots:
            if slot.hand is None:
                slot.hand = self._hire(slot)
        for hand in [slot.hand for slot in self.slots if slot.hand is not None]:
            with suppress(TimeoutError):
                await asyncio.wait_for(hand.settled.wait(), STARTS_SECS)
            if not hand.ready and not self._ending:
                failed = hand.failed or Failed(1, "a worker process does not start")
                raise NotStarted(failed.code, failed.text)
        return bool(taken)

    def _open_directory(self) -> None:
        base = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        name = f"telephony-gateway-{os.geteuid()}-workers"
        try:
            if not self._findable:
                self._directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))
                return
            self._directory = base / f"{name}-{hashlib.sha256(self.settings.listen.encode()).hexdigest()[:16]}"
            while True:
                with suppress(FileExistsError):
                    self._directory.mkdir(0o700)
                about = self._directory.lstat()
                if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
                    raise NotStarted(1, f"{self._directory} belongs to somebody else, or is open to others; remove it")
                self._lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._lock), self._directory.lstat()):
                        break
                os.close(self._lock)  # the one before us has removed it just now
        except BlockingIOError:
            raise NotStarted(1, f"can't listen on {self.settings.listen}: another gateway of this user does") from None
        except OSError as error:
            raise NotStarted(1, f"{error.filename}: {error.strerror}") from None

    async def _find(self, path: Path) -> tuple[Hand, list[socket.socket]] | None:
        """The worker that a supervisor before us has left here."""
        loop = asyncio.get_running_loop()
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.setblocking(False)
        try:
            async with asyncio.timeout(ASK_SECS):
                await loop.sock_connect(peer, str(path))
                while True:
                    with suppress(BlockingIOError):
                        got = control.receive(peer)
                        break
                    await asyncio.sleep(0.005)
        except (OSError, TimeoutError):
            got = None
        hello, descriptors = got or (Beat(), [])
        if not isinstance(hello, Hello):
            peer.close()
            control.close(descriptors)
            _unlink(path)
            return None
        memory, *sockets = descriptors
        if self._memory < 0:
            self._memory = memory
        else:
            os.close(memory)
        hand = Hand(peer, hello.slot, hello.cell, self._directory, loop.time(), hello.pid, ready=True, beat=loop.time())
        hand.leaving = hello.leaving or not hello.accepts
        self.draining |= hello.draining and not hand.leaving
        loop.add_reader(peer, self._heard, hand)
        self._log.info("worker_found", slot=hand.slot, pid=hand.pid, leaving=hand.leaving)
        return hand, [socket.socket(fileno=each) for each in sockets]

    def _seat(self, found: list[tuple[Hand, list[socket.socket]]]) -> dict[int, Slot]:
        """Slots for workers that were found, by number from 0; of two in one slot the one that is not needed leaves."""
        slots: dict[int, Slot] = {}
        for hand, sockets in sorted(found, key=lambda each: each[0].slot):
            hand.settled.set()
            if hand.leaving or not sockets:
                self.leaving.append(hand)
            elif any(slot.hand is not None and slot.hand.slot == hand.slot for slot in slots.values()):
                self._let_go(hand)
            else:
                slots[len(slots)] = Slot(len(slots), sockets, hand)
        return slots

    def _bind(self) -> list[socket.socket]:
        host, port = host_port(self.settings.listen)
        port = self.slots[0].sockets[0].getsockname()[1] if self.slots else port
        made = []
        try:
            for family, kind, protocol, _, address in socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                each = socket.socket(family, kind, protocol)
                made.append(each)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                each.bind(address)
                each.listen(BACKLOG)
                each.setblocking(False)
        except OSError as error:
            raise NotStarted(1, f"can't listen on {self.settings.listen}: {error.strerror or error}") from None
        return made

    # --- workers ---

    def _hire(self, slot: Slot) -> Hand:
        loop = asyncio.get_running_loop()
        peer, theirs = control.pair()
        peer.setblocking(False)
        used = {hand.cell for hand in self.hands}
        cell = next(each for each in range(CELLS) if each not in used)
        self._shares.clear(cell)
        hand = Hand(peer, slot.number, cell, self._directory, loop.time(), beat=loop.time())
        self._nursery.fork(theirs)
        texts = [control.text_descriptor(self._base), control.text_descriptor(self._text)]
        take = Take(slot.number, cell, str(self._path), str(self._directory), self._findable)
        control.send(peer, take, [self._memory, *texts, *(each.fileno() for each in slot.sockets)])
        control.close(texts)
        loop.add_reader(peer, self._heard, hand)
        return hand

    async def _renew(self, slot: Slot) -> bool:
        """Whether a new worker has taken the place of the one in this slot."""
        if slot.successor is not None or self._ending:
            return False
        successor = slot.successor = self._hire(slot)
        with suppress(TimeoutError):
            await asyncio.wait_for(successor.settled.wait(), STARTS_SECS)
        slot.successor = None
        if not successor.ready or successor.gone.is_set():
            problem = successor.failed.text if successor.failed is not None else "a worker process does not start"
            self._log.error("replacement_failed", slot=slot.number, problem=problem)
            if not successor.gone.is_set():
                self._let_go(successor)
            self._fill(slot)
            return False
        old, slot.hand = slot.hand, successor
        if old is not None:
            self._let_go(old)
        return True

    def _let_go(self, hand: Hand) -> None:
        hand.leaving = True
        self.leaving.append(hand)
        control.send(hand.peer, Retire())

    def _heard(self, hand: Hand) -> None:
        while not hand.gone.is_set():
            try:
                got = control.receive(hand.peer)
            except BlockingIOError:
                return
            if got is None:
                self._died(hand)
                return
            control.close(got[1])
            self._understand(hand, got[0])

    def _understand(self, hand: Hand, message: Message) -> None:
        hand.beat = asyncio.get_running_loop().time()
        match message:
            case Hello():
                hand.pid = message.pid
            case Ready():
                hand.ready = True
                hand.settled.set()
                if self.draining:
                    control.send(hand.peer, Drain(self._ending))
                self._log.info("worker_ready", slot=hand.slot, pid=hand.pid, after_ms=round((hand.beat - hand.born) * 1000))
            case Failed():
                hand.failed = message
            case Reloaded():
                hand.reloaded.put_nowait(message.problem)
            case Leaving():
                slot = next((slot for slot in self.slots if slot.hand is hand), None)
                if slot is not None:
                    self._tasks.create_task(self._renew(slot))
            case Idle():
                hand.idle = True
                if hand.leaving:
                    self._tasks.create_task(self._dismiss(hand))
                self._end_if_idle()
            case Beat() | _:
                pass

    async def _dismiss(self, hand: Hand) -> None:
        await hand.look()
        control.send(hand.peer, Stop())

    def _died(self, hand: Hand) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(hand.peer)
        hand.peer.close()
        hand.gone.set()
        hand.settled.set()
        hand.reloaded.put_nowait("")
        self._shares.clear(hand.cell)
        if hand.seen is not None:
            self.departed.merge(Sums.unpack(hand.seen), gauges=False)
            counted = {name: value for name, value in hand.seen.process.items() if name.endswith("_total")}
            join_processes(self.departed_process, counted)
        _unlink(self._directory / f"{hand.pid}.sock", Path(hand.admin))
        asked = hand.idle or self._stopping
        self.departed.count("telephony_worker_exits", "asked" if asked else "died")
        if hand in self.leaving:
            self.leaving.remove(hand)
        if self._stopping:
            pass
        elif asked:
            self._log.info("worker_gone", slot=hand.slot, pid=hand.pid)
        elif self._serving or hand.failed is None:
            self._log.error("worker_died", slot=hand.slot, pid=hand.pid, problem=hand.failed.text if hand.failed else None)
        for slot in self.slots:
            if slot.hand is hand:
                slot.hand = None
                short = not hand.ready or loop.time() - hand.born < SHORT_LIFE_SECS
                slot.failures = slot.failures + 1 if short else 0
                pause = min(LONGEST_PAUSE_SECS, FIRST_PAUSE_SECS * 2 ** (slot.failures - 1)) if slot.failures else 0.0
                if self._serving:
                    loop.call_later(pause, self._fill, slot)
        if not self.hands:
            self._end_if_idle()

    def _fill(self, slot: Slot) -> None:
        """A new worker where one has died, also while we drain: connections wait there."""
        if slot.hand is None and slot.successor is None and not self._stopping:
            slot.hand = self._hire(slot)

    def _nursery_lost(self, nursery: Nursery) -> None:
        if nursery is self._nursery and not self._stopping:
            self._log.error("nursery_lost")
            asyncio.get_running_loop().call_later(LONGEST_PAUSE_SECS / 10, self._new_nursery)

    def _new_nursery(self) -> None:
        if self._nursery.gone and not self._stopping:
            self._nursery = Nursery(self._nursery_lost)

    # --- the end ---

    def _end_if_idle(self) -> None:
        """Once nobody has a call any more: it is over."""
        if self._ending and all(hand.idle for hand in self.hands):
            self._over.set()

    def _stop_all(self) -> None:
        self._stopping = True
        for hand in self.hands:
            control.send(hand.peer, Stop())
        self._over.set()

    async def _all_gone(self, secs: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(secs):
                for hand in self.hands:
                    await hand.gone.wait()
        for hand in self.hands:
            self._kill(hand)

    def _nursery_closed(self) -> None:
        with suppress(AttributeError):  # there was none yet
            self._nursery.close()

    def _tidy(self) -> None:
        """Remove the directory, unless some worker is there still. We hold its lock; whoever comes next sees that it is gone."""
        with suppress(AttributeError, OSError):
            self._directory.rmdir()

    # --- meanwhile ---

    async def _tick(self) -> None:
        """Forever: who does not live any more, though he is there."""
        while True:
            await asyncio.sleep(TICK_SECS)
            now = asyncio.get_running_loop().time()
            for hand in self.hands:
                if now - hand.beat > (SILENT_SECS if hand.ready else STARTS_SECS):
                    self._log.error("worker_silent", slot=hand.slot, pid=hand.pid)
                    self._kill(hand)
            _bury()

    def _kill(self, hand: Hand) -> None:
        if hand.pid and not hand.gone.is_set():
            with suppress(ProcessLookupError):
                os.kill(hand.pid, signal.SIGKILL)

    def _status(self) -> str:
        calls = sum(self._shares.calls(hand.cell) for hand in self.hands) if self._memory >= 0 else 0
        return f"{len(self.ready)} of {len(self.slots)} workers, {calls} live calls"

    async def _reloaded(self, hand: Hand) -> str:
        try:
            return await asyncio.wait_for(hand.reloaded.get(), STARTS_SECS)
        except TimeoutError:
            return "no answer"

    def _refuse(self, error: ConfigError) -> None:
        self.departed.count("telephony_reloads", "refused")
        for problem in str(error).splitlines():
            self._log.error("configuration_refused", problem=problem)

    async def _try(self, what: Coroutine[Any, Any, object]) -> None:
        with suppress(ConfigError):  # it is in the log
            await what


def _bury() -> None:
    """Nurseries that have ended; and where nobody else does it, workers that they have left."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
