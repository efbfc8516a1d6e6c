"""What a stream leaves behind when its process dies: enough for another process of this host to go on with the call.

One file per call, in memory where the system has such a place: a head of numbers and two sealed slots, then a ring of the
caller's latest audio as it came. Written in place with every frame, so that nothing is lost with the process; sealed with a key
that comes of the shared secret, so that it says nothing to whoever reads it; bounded by `replay_ms` and by the number of calls,
and removed soon after the call. `Journal` is the seam where a store shared by several machines would go.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import mmap
import os
import secrets
from enum import IntEnum
from pathlib import Path
from struct import Struct as Layout
from time import monotonic, time

import msgspec
from msgspec import Struct

from gateway.ledger import opened, shared_directory

MOST_ATTEMPTS = 10
"""How often a call may be asked for again: a call that kills whoever takes it must not kill them all."""

MOST_ANNOUNCED = 2
"""The same for one whose stream has never come: whatever keeps it away is likely to stay."""

KEEP_SECS = 120.0
"""How long what a dead process has left, or a call that has ended, is remembered."""

_SWEEP_SECS = 20.0
_SWEPT_AT_ONCE = 64
_SALT_BYTES = 16
_MAC_BYTES = 16
_HEAD_BYTES = 8192
_SLOT_BYTES = 3584
_SLOTS = (512, 512 + _SLOT_BYTES)
_PAD_BYTES = 8192  # of keystream, made in one go
_MOST_STANDING = _SLOT_BYTES - 64
_SEAL_SECS = 0.01
_MOST_BYTES = 2**40
_MAGIC = b"TGJ1"

_IDENTITY = Layout("<4sBBHI16s")  # magic, state, attempts, slot in use, owner's process, salt
_STATE_AT, _ATTEMPTS_AT, _SLOT_AT = 4, 5, 6
_HEARD = Layout("<dQ")  # when (the system's monotonic clock), bytes of input so far
_HEARD_AT, _TAKEN_AT, _ACKED_AT, _SKIPPED_AT, _BASE_AT = 32, 48, 56, 64, 72
_NUMBER = Layout("<q")
_LENGTH = Layout("<I")


class State(IntEnum):
    """How a call stands."""

    LIVE = 1
    ENDED = 2
    """On purpose: nobody takes it up again."""
    LOST = 3
    """Ended because of its service."""
    ANNOUNCED = 4
    """Its stream has been asked for, and has not come yet."""


_GOING_ON = frozenset({State.LIVE, State.ANNOUNCED})


class Word(Struct, frozen=True, array_like=True):
    """A control text for the service that it has not acknowledged: its number, and that of the frame it stands before."""

    number: int
    text: str
    before: int


class Standing(Struct, frozen=True, array_like=True):
    """What changes now and then. `shape` tells whether a service's frames can be made again from the audio; empty: they can't."""

    session: str
    route: str
    service: str = ""
    shape: str = ""
    next_number: int = 0
    checkpoints: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()


class Legacy(Struct, frozen=True):
    """What the last stream of a call has left.

    `audio` is the latest input of the service's frames; `heard` bytes there were in all since frame 0 began.

    `silent_since` is the system's monotonic clock; `acked` and `next_out` are the link's, `skipped` samples of the service's.
    """

    standing: Standing
    audio: bytes
    heard: int
    acked: int
    next_out: int
    skipped: int
    silent_since: float


class Journal:
    """The entries of all calls of this host that go by one secret. Nothing here raises OSError: `problem` says what is wrong."""

    def __init__(self, secret: str, *, directory: Path | None = None) -> None:
        """`directory` is for tests."""
        master = secret.encode("utf-8", "surrogatepass")
        self._key = hmac.digest(master, b"telephony-gateway: journal of calls, version 1", hashlib.sha256)
        self.directory = directory or shared_directory(self._key)
        self.problem = ""
        self.unwritten = 0
        """Calls that have no entry because there was no room, or no place, for one."""
        self._next_sweep = 0.0
        self._to_sweep: list[str] = []

    def begin(self, provider: str, call_id: str, standing: Standing, *, capacity: int) -> tuple[Entry | None, Legacy | None]:
        """A stream of this call begins. Returns its entry, and what the call's last stream has left unless that ended.

        The entry goes on from there, under the same session. `capacity` is bytes of audio. No entry if there is no room for
        one: then the call is carried like any other, and ends with its process.
        """
        self.sweep()
        name = self._name(provider, call_id)
        attempts, legacy = 0, None
        with contextlib.suppress(OSError, ValueError), self._open(name) as old:
            if old.state in _GOING_ON:
                attempts = old.attempts
            if old.state is State.LIVE:
                legacy = old.read()
        entry = self._made(name, standing, State.LIVE, attempts, capacity)
        if entry is None:
            return None, None
        if legacy is not None:
            entry.inherit(legacy)
        return entry, legacy

    def announce(self, provider: str, call_id: str, route: str) -> None:
        """The carrier has been told to connect a stream: it may ask again, should its connection be lost before it starts."""
        self.sweep()
        if self.ask(provider, call_id) not in _GOING_ON:
            entry = self._made(self._name(provider, call_id), Standing("", route), State.ANNOUNCED, 0, 0)
            if entry is not None:
                entry.close()

    def _made(self, name: str, standing: Standing, state: State, attempts: int, capacity: int) -> Entry | None:
        try:
            entry = Entry(self._key, self.directory, name, standing, state, attempts, capacity)
        except OSError as error:
            self.unwritten += 1
            self.problem = f"{self.directory}: {error.strerror or error}"
            return None
        self.problem = ""
        return entry

    def ask(self, provider: str, call_id: str) -> State | None:
        """How a call stands, without touching it; None: nothing is known of it."""
        try:
            with self._open(self._name(provider, call_id)) as entry:
                return entry.state
        except (OSError, ValueError):
            return None

    def attempt(self, provider: str, call_id: str) -> str | None:
        """The carrier is to be asked for a stream of the call again: the label of its route, or None if that must not be."""
        try:
            with self._open(self._name(provider, call_id)) as entry:
                most = {State.LIVE: MOST_ATTEMPTS, State.ANNOUNCED: MOST_ANNOUNCED}.get(entry.state, 0)
                if entry.attempts >= most:
                    return None
                entry.attempts += 1
                return entry.standing().route
        except (OSError, ValueError):
            return None

    def conclude(self, provider: str, call_id: str) -> None:
        """The carrier says that the call is over: it won't come back, wherever its stream was."""
        with contextlib.suppress(OSError, ValueError), self._open(self._name(provider, call_id)) as entry:
            entry.conclude()

    def sweep(self, *, everything: bool = False) -> None:
        """Remove a few of the entries that nobody needs any more."""
        now = monotonic()
        with contextlib.suppress(OSError):
            if not self._to_sweep and now >= self._next_sweep:
                self._next_sweep = now + _SWEEP_SECS
                self._to_sweep = [path.name for path in self.directory.iterdir() if path.suffix in (".call", ".new")]
        for _ in range(len(self._to_sweep) if everything else min(_SWEPT_AT_ONCE, len(self._to_sweep))):
            path = self.directory / self._to_sweep.pop()
            with contextlib.suppress(OSError):
                try:
                    with _Opened(self._key, path) as entry:
                        stale = now - entry.silent_since > KEEP_SECS and (
                            entry.state is not State.LIVE or not _lives(entry.owner)
                        )
                except ValueError:  # somebody may be about to write it
                    stale = time() - path.stat().st_mtime > KEEP_SECS
                if stale:
                    path.unlink()

    def close(self) -> None:
        """Nothing is removed that another process may need."""
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _open(self, name: str) -> _Opened:
        return _Opened(self._key, self.directory / name)

    def _name(self, provider: str, call_id: str) -> str:
        text = f"{provider}\0{call_id}".encode("utf-8", "surrogatepass")
        return f"{hmac.digest(self._key, text, hashlib.sha256)[:16].hex()}.call"


class _Sealed:
    """Sealing with one entry's keys: no two bytes of it are ever sealed with the same part of a keystream."""

    __slots__ = ("_audio_key", "_slot_key")

    def __init__(self, key: bytes, name: str, salt: bytes) -> None:
        mine = hmac.digest(key, name.encode() + salt, hashlib.sha256)
        self._slot_key = hmac.digest(mine, b"standing", hashlib.sha256)
        self._audio_key = hmac.digest(mine, b"audio", hashlib.sha256)

    def seal(self, text: bytes) -> bytes:
        nonce = secrets.token_bytes(_SALT_BYTES)
        sealed = _xor(text, hashlib.shake_256(self._slot_key + nonce).digest(len(text)))
        return nonce + hmac.digest(self._slot_key, nonce + sealed, hashlib.sha256)[:_MAC_BYTES] + sealed

    def unseal(self, sealed: bytes) -> bytes:
        """Raises ValueError for what was not sealed with this key."""
        nonce, mac, text = (
            sealed[:_SALT_BYTES],
            sealed[_SALT_BYTES : _SALT_BYTES + _MAC_BYTES],
            sealed[_SALT_BYTES + _MAC_BYTES :],
        )
        if not hmac.compare_digest(hmac.digest(self._slot_key, nonce + text, hashlib.sha256)[:_MAC_BYTES], mac):
            raise ValueError("sealed by somebody else, or half written")
        return _xor(text, hashlib.shake_256(self._slot_key + nonce).digest(len(text)))

    def pad(self, block: int) -> bytes:
        """The keystream for the audio's bytes from `block * _PAD_BYTES` on."""
        return hashlib.shake_128(self._audio_key + block.to_bytes(8)).digest(_PAD_BYTES)


class Entry:
    """One live stream's entry. Whoever holds it is its only writer, until another stream has begun one for the same call.

    `hear`, `took` and `acked` are made for every frame; the rest changes now and then. After `end` or `close` all do nothing.
    """

    __slots__ = (
        "_acked", "_capacity", "_heard", "_inode", "_map", "_over", "_pad", "_pad_begins", "_path", "_sealed", "_sealed_at",
        "_slot", "_unsealed", "standing",
    )  # fmt: skip

    def __init__(
        self, key: bytes, directory: Path, name: str, standing: Standing, state: State, attempts: int, capacity: int
    ) -> None:
        """Raises OSError when there is no room for it."""
        os.close(opened(directory))
        self._path = directory / name
        fresh = directory / f"{name}.{secrets.token_hex(4)}.new"
        salt = secrets.token_bytes(_SALT_BYTES)
        self._sealed = _Sealed(key, name, salt)
        self._capacity = capacity
        self._over = False
        self._heard = 0
        self._pad_begins = 0
        self._pad = b""
        self._slot = 0
        self._acked = -1
        self._unsealed = False
        self._sealed_at = 0.0
        self.standing = standing
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(fresh, flags, 0o600)
        try:
            # All of it now: memory that is missing later would be a signal that ends the process.
            os.posix_fallocate(descriptor, 0, _HEAD_BYTES + capacity)
            self._map = mmap.mmap(descriptor, _HEAD_BYTES + capacity)
            self._inode = os.fstat(descriptor).st_ino
            _IDENTITY.pack_into(self._map, 0, _MAGIC, state, attempts, 0, os.getpid(), salt)
            _HEARD.pack_into(self._map, _HEARD_AT, monotonic(), 0)
            _NUMBER.pack_into(self._map, _ACKED_AT, -1)
            self._seal(monotonic())
            fresh.replace(self._path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    # --- with every frame ---

    def hear(self, payload: bytes) -> None:
        """The next bytes of the service's input."""
        if self._over:
            return
        begin, capacity = self._heard, self._capacity
        end = begin + len(payload)
        if capacity:
            within, place = begin - self._pad_begins, begin % capacity
            if within + end - begin <= len(self._pad) and place + end - begin <= capacity:
                at = _HEAD_BYTES + place
                self._map[at : at + end - begin] = _xor(payload, self._pad[within : within + end - begin])
            else:
                self._hear_in_pieces(payload)
        now = monotonic()
        self._heard = end
        _HEARD.pack_into(self._map, _HEARD_AT, now, end)
        if self._unsealed:
            self._seal(now)

    def _hear_in_pieces(self, payload: bytes) -> None:
        """Past the end of the keystream that is made, or of the ring."""
        at, size = 0, len(payload)
        while at < size:
            block, within = divmod(self._heard + at, _PAD_BYTES)
            if block * _PAD_BYTES != self._pad_begins or not self._pad:
                self._pad_begins, self._pad = block * _PAD_BYTES, self._sealed.pad(block)
            place = (self._heard + at) % self._capacity
            piece = min(size - at, _PAD_BYTES - within, self._capacity - place)
            sealed = _xor(payload[at : at + piece], self._pad[within : within + piece])
            self._map[_HEAD_BYTES + place : _HEAD_BYTES + place + piece] = sealed
            at += piece

    def took(self, next_out: int) -> None:
        """The service's frames below this number were taken."""
        if not self._over:
            _NUMBER.pack_into(self._map, _TAKEN_AT, next_out)

    def acked(self, seq: int) -> None:
        """The service has its frames up to this one."""
        if not self._over:
            self._acked = seq
            _NUMBER.pack_into(self._map, _ACKED_AT, seq)

    # --- now and then ---

    def skipped(self, samples: int) -> None:
        """Samples of the service's by which positions are ahead of frames, all in all."""
        if not self._over:
            _NUMBER.pack_into(self._map, _SKIPPED_AT, samples)

    def serve(self, service: str, shape: str) -> None:
        """This service has the call. Without a `shape` its frames can't be made again, and no audio is kept."""
        if not shape and self._capacity and not self._over:
            self._map.resize(_HEAD_BYTES)
            self._capacity = 0
        if (service, shape) != (self.standing.service, self.standing.shape):
            self._note(msgspec.structs.replace(self.standing, service=service, shape=shape))

    def restart(self) -> None:
        """The service's frames begin anew: with the next byte begins the one that has the number 0."""
        if not self._over:
            _NUMBER.pack_into(self._map, _BASE_AT, self._heard)  # not 0: no part of a keystream is used twice
            self.took(0)
            self.acked(-1)
            self.skipped(0)
            self._note(msgspec.structs.replace(self.standing, service="", shape="", words=(), next_number=0))

    def say(self, word: Word) -> None:
        """A control text is on its way to the service."""
        kept = (*(each for each in self.standing.words if each.before > self._acked), word)
        self._note(msgspec.structs.replace(self.standing, words=kept, next_number=word.number + 1))

    def pending(self, checkpoints: tuple[str, ...]) -> None:
        """The checkpoints that are not resolved."""
        if checkpoints != self.standing.checkpoints:
            self._note(msgspec.structs.replace(self.standing, checkpoints=checkpoints))

    def inherit(self, legacy: Legacy) -> None:
        """Go on from what the call's last stream has left. Before anything else."""
        self.standing = msgspec.structs.replace(legacy.standing, route=self.standing.route, checkpoints=())
        self._heard = legacy.heard - len(legacy.audio)
        self.hear(legacy.audio)
        self.took(legacy.next_out)
        self.acked(legacy.acked)
        self.skipped(legacy.skipped)
        if not self._over:
            self._seal(monotonic())

    @property
    def superseded(self) -> bool:
        """Whether another stream has taken the call over."""
        try:
            return self._path.stat().st_ino != self._inode
        except OSError:
            return True

    @property
    def concluded(self) -> bool:
        """Whether the carrier has told one of the processes that the call is over."""
        return self._over or self._map[_STATE_AT] != State.LIVE

    def end(self, state: State) -> None:
        """The call has ended: nobody shall take it up."""
        if self._over:
            return
        self._map[_STATE_AT] = state
        _HEARD.pack_into(self._map, _HEARD_AT, monotonic(), self._heard)
        self.close()
        if not self.superseded:
            with contextlib.suppress(OSError):
                os.truncate(self._path, _HEAD_BYTES)

    def close(self) -> None:
        """Leave it to whoever takes the call over."""
        if not self._over:
            self._over = True
            self._map.close()

    def _note(self, standing: Standing) -> None:
        self.standing = standing
        now = monotonic()
        if self._capacity and now - self._sealed_at < _SEAL_SECS:
            self._unsealed = True  # with the next frame, which is soon
        elif not self._over:
            self._seal(now)

    def _seal(self, now: float) -> None:
        """Write how things stand; of more than there is room for, the oldest words and names are left out."""
        standing = self.standing
        text = msgspec.msgpack.encode(standing)
        while len(text) > _MOST_STANDING and (standing.words or standing.checkpoints):
            words, names = standing.words, standing.checkpoints
            standing = msgspec.structs.replace(
                standing, words=words[(len(words) + 1) // 2 :], checkpoints=names[(len(names) + 1) // 2 :]
            )
            text = msgspec.msgpack.encode(standing)
        sealed = self._sealed.seal(text[:_MOST_STANDING])
        slot = 1 - self._slot
        self._map[_SLOTS[slot] : _SLOTS[slot] + _LENGTH.size + len(sealed)] = _LENGTH.pack(len(sealed)) + sealed
        self._map[_SLOT_AT] = self._slot = slot  # whole before it counts
        self._sealed_at, self._unsealed = now, False


class _Opened:
    """An entry as whoever comes later sees it."""

    def __init__(self, key: bytes, path: Path) -> None:
        """Raises OSError when it is not there, ValueError when it is none."""
        self._key = key
        self._name = path.name
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        if len(self._map) < _HEAD_BYTES or self._map[: len(_MAGIC)] != _MAGIC:
            self._map.close()
            raise ValueError("no entry")
        _, state, self._attempts, _, self.owner, self._salt = _IDENTITY.unpack_from(self._map, 0)
        self.state = State(state)
        self.silent_since, self._heard = _HEARD.unpack_from(self._map, _HEARD_AT)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    @property
    def attempts(self) -> int:
        return int(self._attempts)

    @attempts.setter
    def attempts(self, count: int) -> None:
        self._attempts = self._map[_ATTEMPTS_AT] = count

    def conclude(self) -> None:
        if self.state in _GOING_ON:
            self._map[_STATE_AT] = State.ENDED

    def standing(self) -> Standing:
        """Raises ValueError."""
        at = _SLOTS[self._map[_SLOT_AT] & 1]
        (size,) = _LENGTH.unpack_from(self._map, at)
        text = _Sealed(self._key, self._name, self._salt).unseal(self._map[at + _LENGTH.size : at + _LENGTH.size + size])
        try:
            return msgspec.msgpack.decode(text, type=Standing)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from None

    def read(self) -> Legacy:
        """Raises ValueError."""
        capacity = len(self._map) - _HEAD_BYTES
        sealed = _Sealed(self._key, self._name, self._salt)
        (base,) = _NUMBER.unpack_from(self._map, _BASE_AT)
        if not base <= self._heard < _MOST_BYTES:
            raise ValueError("no count of bytes")
        begin = max(base, self._heard - capacity)
        pieces, at = [], begin
        while at < self._heard:
            block, within = divmod(at, _PAD_BYTES)
            place = at % capacity
            piece = min(self._heard - at, _PAD_BYTES - within, capacity - place)
            hidden = self._map[_HEAD_BYTES + place : _HEAD_BYTES + place + piece]
            pieces.append(_xor(hidden, sealed.pad(block)[within : within + piece]))
            at += piece
        next_out, acked, skipped = (_NUMBER.unpack_from(self._map, each)[0] for each in (_TAKEN_AT, _ACKED_AT, _SKIPPED_AT))
        if not (0 <= next_out < 2**32 and -1 <= acked < 2**32 and 0 <= skipped < _MOST_BYTES):
            raise ValueError("no numbers of frames")
        return Legacy(self.standing(), b"".join(pieces), self._heard - base, acked, next_out, skipped, self.silent_since)


def _xor(text: bytes, pad: bytes) -> bytes:
    return (int.from_bytes(text, "little") ^ int.from_bytes(pad, "little")).to_bytes(len(text), "little")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
