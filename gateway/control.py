"""What a supervisor and its workers say to each other: small messages, with descriptors, over Unix sockets."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

import msgspec
from msgspec import Struct

MOST_BYTES = 64 * 1024
MOST_DESCRIPTORS = 64


class Fork(Struct, frozen=True, tag=True):
    """To the nursery, with a socket: have a worker at its other end."""


class Take(Struct, frozen=True, tag=True):
    """To a new worker, with descriptors: the shares; the configuration's text at the start, and now; listening sockets."""

    slot: int
    cell: int
    path: str
    """Where the configuration came from."""
    directory: str
    """Where to be found by others."""
    findable: bool
    """Whether a supervisor after this one would look there."""


class Reload(Struct, frozen=True, tag=True):
    """To a worker, with a configuration's text, which has been checked."""


class Drain(Struct, frozen=True, tag=True):
    """To a worker: take no new calls. `leave`: say Idle once none is left, or `drain_secs` are over."""

    leave: bool


class Retire(Struct, frozen=True, tag=True):
    """To a worker: another one has your place. Accept no more, and say Idle once no call is left."""


class Stop(Struct, frozen=True, tag=True):
    """To a worker: end at once."""


class Warm(Struct, frozen=True, tag=True):
    """From the nursery: everything is imported."""


class Hello(Struct, frozen=True, tag=True):
    """From a worker: who it is; to a supervisor that has found it with the shares and, if it accepts, its listening sockets."""

    pid: int
    slot: int
    cell: int
    accepts: bool = False
    leaving: bool = False
    draining: bool = False


class Ready(Struct, frozen=True, tag=True):
    """From a worker: it takes calls."""


class Failed(Struct, frozen=True, tag=True):
    """From a worker that can't start: the process's exit code, and why."""

    code: int
    text: str


class Reloaded(Struct, frozen=True, tag=True):
    """From a worker: it goes by the configuration; `problem` is empty, or why it does not."""

    problem: str = ""


class Leaving(Struct, frozen=True, tag=True):
    """From a worker: it was told to go by somebody else, and would like to be replaced."""


class Idle(Struct, frozen=True, tag=True):
    """From a worker that drains or has retired: no call is left."""


class Beat(Struct, frozen=True, tag=True):
    """From a worker: its event loop turns."""


Message = Fork | Take | Reload | Drain | Retire | Stop | Warm | Hello | Ready | Failed | Reloaded | Leaving | Idle | Beat

_decoder = msgspec.json.Decoder(Message)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(peer: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> bool:
    """Whether it is on its way; not if the other end is gone or reads nothing. Never raises OSError."""
    try:
        socket.send_fds(peer, [msgspec.json.encode(message)], [*descriptors])
    except OSError:
        return False
    return True


def receive(peer: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors, which are the caller's to close; None: the other end is gone.

    Raises BlockingIOError from a socket that does not block.
    """
    try:
        data, descriptors, _, _ = socket.recv_fds(peer, MOST_BYTES, MOST_DESCRIPTORS)
    except BlockingIOError:
        raise
    except OSError:
        return None
    if not data:
        return None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return _decoder.decode(data), descriptors


def close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def text_descriptor(text: str) -> int:
    """A descriptor from which `read_text` reads this."""
    descriptor = os.memfd_create("telephony-gateway configuration")
    data = text.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(descriptor, data) :]
    return descriptor


def read_text(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode("utf-8", "surrogatepass")
