"""What was used once and must not be used again, across the processes of one host and over their restarts.

An entry is an empty file whose creation is atomic: whoever creates it has used the nonce first. Files lie in memory where the
system has such a place, in a directory that belongs to nobody else, under names that say nothing to whoever lists them.
Besides there are notes of calls (`gateway.diary`), appended to files that many calls share, for some ten minutes.

Hosts know nothing of each other's ledgers. A `Book` has little to do, so that a store which several hosts ask can do it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import stat
import tempfile
from pathlib import Path
from typing import Protocol

KEEP_SECS = 120
"""How long after its expiry an entry is kept: a stream whose token was read at the last moment may start this much later."""

_BUCKET_SECS = 10  # entries that expire together lie together and are removed together
_MARGIN_SECS = 60  # between the last possible use of an entry and its removal, for processes that disagree about the second
_SWEPT_AT_ONCE = 32  # so that no use waits for a long removal
_PERIOD_SECS = 600  # notes are kept for one to two of these
_SHARD_BYTES = 64 * 1024  # of one of 256 files of notes: 800,000 notes in ten minutes
NOTE_BYTES = 13
_NAME_BYTES = 8
_LINE_BYTES = _NAME_BYTES + NOTE_BYTES
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 — everybody may write there, which is why `opened` looks twice


class Book(Protocol):
    """What a door must remember, and share with every other door that has the same secret. Nothing here raises.

    Whoever keeps it for several hosts answers at once, from memory, or the calls of this process wait.
    """

    problem: str
    """Empty, or a sentence that says why other processes can't be asked: log it."""

    def use(self, nonce: bytes, expires: int, now: float) -> bool:
        """Whether this is the first use of `nonce`; it is used from now on, at least until `expires` and KEEP_SECS."""
        ...

    def used(self, nonce: bytes, expires: int) -> bool:
        """Whether `nonce` was used; uses nothing up."""
        ...

    def note(self, subject: bytes, note: bytes, now: float) -> None:
        """Keep a note on `subject` for at least ten minutes. NOTE_BYTES long."""
        ...

    def notes(self, subject: bytes, now: float) -> list[bytes]:
        """The notes on `subject`, in their order."""
        ...

    def close(self) -> None: ...


class Ledger:
    """Nonces used with one secret. `problem` is empty, or a sentence that says why other processes can't be asked: log it."""

    def __init__(self, secret: str, *, directory: Path | None = None, capacity: int = 100_000) -> None:
        """`directory` is for tests. `capacity` bounds the entries of this process; uses beyond it are refused."""
        master = secret.encode("utf-8", "surrogatepass")
        self._key = hmac.digest(master, b"telephony-gateway: used nonces, version 1", hashlib.sha256)
        self.directory = directory or shared_directory(self._key)
        self.problem = ""
        self._capacity = capacity
        self._descriptor = -1
        self._seen: dict[int, set[bytes]] = {}
        self._next_sweep = 0.0
        self._dead: list[str] = []
        self._notes: dict[tuple[int, int], bytearray] = {}  # what could not be written: period and first byte → lines
        try:
            self._open()
        except OSError as error:
            self._failed(error)

    def use(self, nonce: bytes, expires: int, now: float) -> bool:
        """Whether this is the first use of `nonce` anywhere on this host; it is used from now on.

        `expires` is the ticket's, seconds since 1970 like `now`; a nonce always comes with the same one. False also for what
        expired more than KEEP_SECS ago. Where the directory can't be used, `problem` says so and the answer is this process's
        alone. Never raises.
        """
        if now > expires + KEEP_SECS:
            return False
        bucket, name = expires // _BUCKET_SECS, hmac.digest(self._key, nonce, hashlib.sha256)[:16]
        for old in [each for each in self._seen if _is_dead(each, now)]:
            del self._seen[old]
        if name in self._seen.get(bucket, ()):
            return False
        if sum(map(len, self._seen.values())) >= self._capacity:
            self.problem = f"{self._capacity} stream tokens were used within minutes; further ones are refused"
            return False
        self._seen.setdefault(bucket, set()).add(name)
        try:
            first = self._create(str(bucket), name.hex())
        except OSError as error:
            self._failed(error)
            return True
        self.problem = ""
        with contextlib.suppress(OSError):  # what is left lying is removed another time
            self._sweep(now)
        return first

    def used(self, nonce: bytes, expires: int) -> bool:
        """Whether `nonce` was used anywhere on this host, as far as can be told; uses nothing up. Never raises."""
        bucket, name = expires // _BUCKET_SECS, hmac.digest(self._key, nonce, hashlib.sha256)[:16]
        if name in self._seen.get(bucket, ()):
            return True
        if self._descriptor < 0:
            return False
        try:
            os.stat(f"{bucket}/{name.hex()}", dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def note(self, subject: bytes, note: bytes, now: float) -> None:
        """Keep a note on `subject` for ten to twenty minutes; forgotten at once where there are too many. Never raises.

        Where the directory can't be used, only this process knows it.
        """
        if len(note) != NOTE_BYTES:
            raise ValueError(f"a note has {NOTE_BYTES} bytes, not {len(note)}")
        name = hmac.digest(self._key, subject, hashlib.sha256)[:_NAME_BYTES]
        period = int(now) // _PERIOD_SECS
        bucket = _notes_bucket(period)
        try:
            self._append(str(bucket), f"{name[0]:02x}", name + note)
        except OSError as error:
            self._failed(error)
            for old in [each for each in self._notes if each[0] < period - 1]:
                del self._notes[old]
            kept = self._notes.setdefault((period, name[0]), bytearray())
            if len(kept) < _SHARD_BYTES:
                kept += name + note

    def notes(self, subject: bytes, now: float) -> list[bytes]:
        """The notes on `subject`, in their order. Never raises."""
        name = hmac.digest(self._key, subject, hashlib.sha256)[:_NAME_BYTES]
        period = int(now) // _PERIOD_SECS
        found = []
        for each in (period - 1, period):
            text = self._read(f"{_notes_bucket(each)}/{name[0]:02x}") + self._notes.get((each, name[0]), b"")
            at = text.find(name)
            while at >= 0:
                if at % _LINE_BYTES == 0:
                    found.append(text[at + _NAME_BYTES : at + _LINE_BYTES])
                at = text.find(name, at + 1)
        return [note for note in found if len(note) == NOTE_BYTES]

    def close(self) -> None:
        """Give the directory back. Entries stay, for whoever comes after us."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _failed(self, error: OSError) -> None:
        self.problem = f"used stream tokens are known to this process only: {self.directory}: {error.strerror or error}"

    def _open(self) -> None:
        self.close()
        self._descriptor = opened(self.directory)

    def _create(self, bucket: str, name: str) -> bool:
        try:
            os.close(self._made(bucket, name, os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _append(self, bucket: str, name: str, line: bytes) -> None:
        descriptor = self._made(bucket, name, os.O_APPEND)
        try:
            if os.fstat(descriptor).st_size < _SHARD_BYTES:
                os.write(descriptor, line)
            else:
                self.problem = "there are too many calls to remember; a webhook that is sent again may be answered again"
        finally:
            os.close(descriptor)

    def _read(self, path: str) -> bytes:
        if self._descriptor < 0:
            return b""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._descriptor)
        except OSError:
            return b""
        try:
            return os.read(descriptor, 2 * _SHARD_BYTES)
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    def _made(self, bucket: str, name: str, how: int) -> int:
        """A descriptor of the file, made if need be. Raises OSError."""
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | how
        if self._descriptor < 0:
            self._open()
        for _ in range(4):
            try:
                return os.open(f"{bucket}/{name}", flags, 0o600, dir_fd=self._descriptor)
            except FileNotFoundError:
                try:
                    os.mkdir(bucket, 0o700, dir_fd=self._descriptor)
                except FileExistsError:
                    continue
                except FileNotFoundError:  # somebody has removed the whole directory
                    self._open()
        raise FileNotFoundError("it is removed again and again")

    def _sweep(self, now: float) -> None:
        """Remove a few entries that nobody can use any more."""
        if not self._dead:
            if now < self._next_sweep:
                return
            self._next_sweep = now + _BUCKET_SECS
            for bucket in os.listdir(self._descriptor):  # noqa: PTH208 — a descriptor, not a path
                if bucket.isdecimal() and bucket.isascii() and _is_dead(int(bucket), now):
                    self._dead += [f"{bucket}/{name}" for name in self._list(bucket)]
                    self._dead.append(bucket)
            self._dead.reverse()
        for _ in range(min(_SWEPT_AT_ONCE, len(self._dead))):
            path = self._dead.pop()
            with contextlib.suppress(OSError):  # another process was faster
                (os.unlink if "/" in path else os.rmdir)(path, dir_fd=self._descriptor)

    def _list(self, bucket: str) -> list[str]:
        try:
            descriptor = os.open(bucket, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._descriptor)
        except OSError:
            return []
        try:
            return os.listdir(descriptor)  # noqa: PTH208
        finally:
            os.close(descriptor)


def _notes_bucket(period: int) -> int:
    """Where the notes of a period lie: with nonces that expire when nobody asks for them any more."""
    return (period + 2) * _PERIOD_SECS // _BUCKET_SECS


def _is_dead(bucket: int, now: float) -> bool:
    return (bucket + 1) * _BUCKET_SECS + KEEP_SECS + _MARGIN_SECS < now


def shared_directory(key: bytes) -> Path:
    """Where what belongs to this key lies: in memory if the system has such a place, for this user alone."""
    place = hmac.digest(key, b"directory", hashlib.sha256)[:8].hex()
    base = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return base / f"telephony-gateway-{os.geteuid()}-{place}"


def opened(directory: Path) -> int:
    """A descriptor of `directory`, made if need be. Raises OSError if others could plant or remove entries in it."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(0o700)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        os.close(descriptor)
        raise PermissionError(
            f"it belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):04o}; remove it, or make it ours alone"
        )
    return descriptor
