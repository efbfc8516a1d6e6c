"""Who gets in: calls at once, calls a second, connections that have not started, and whose address a connection has.

Pure: `now` is any clock that only goes forward, in seconds; nothing here waits. Every table is bounded by what was let in,
never by what was refused: a flood leaves nothing behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol

Network = IPv4Network | IPv6Network

_MAX_HOPS = 16


class Refusal(StrEnum):
    """Why somebody is not let in; a metric label."""

    MAX_CALLS = "max_calls"
    RATE = "rate"
    PENDING = "pending"


class Others(Protocol):
    """Processes that have the same `max_calls` as this one; it tells what it has, and asks how many there are in all."""

    @property
    def workers(self) -> int:
        """How many processes there are; each has its share of the other limits."""

    def total(self) -> int:
        """Slots taken, in all processes."""

    def set_active(self, calls: int) -> None:
        """So many calls have a stream here."""

    def reserve(self, call_id: str) -> None:
        """A slot is reserved here."""

    def release(self, call_id: str) -> None:
        """That reservation is over, or its call has a stream here."""

    def claim(self, call_id: str) -> bool:
        """Take over the reservation that another process has made for this call, if one has."""

    def claimed(self) -> list[str]:
        """Reservations of this process that others have taken over since the last question."""


class Admission:
    """Counts calls and connections of one process, and with `others` the calls of all of them.

    A call has one slot from the webhook (`reserve`) over its streams (`started`) to the last one's end (`ended`). A connection
    is pending from `connect` until either `started` or `connection_over`: whoever gets None from `connect` calls exactly one
    of the two. A `call_id` is any text that is unique to a call; where carriers may share ids, put the provider before it.
    """

    def __init__(
        self,
        max_calls: int,
        max_calls_per_second: float,
        max_pending_per_address: int,
        reserve_secs: float = 15.0,
        others: Others | None = None,
    ) -> None:
        self._others = others
        self.refused: Counter[Refusal] = Counter()
        """How often each refusal was given."""
        self._tokens = float("inf")
        self.limit(max_calls, max_calls_per_second, max_pending_per_address)
        self._reserve_secs = reserve_secs
        self._filled = 0.0
        self._reserved: dict[str, float] = {}  # call id → when the slot is free again, soonest first
        self._active: dict[str, int] = {}  # call id → its streams
        self._renewed: set[str] = set()  # active calls whose carrier has asked again
        self._pending: dict[str, int] = {}  # neighbourhood → its connections
        self._pending_total = 0

    def limit(self, max_calls: int, max_calls_per_second: float, max_pending_per_address: int) -> None:
        """Other limits from now on. Whoever is in stays in, also above them."""
        workers = self._others.workers if self._others is not None else 1
        self._max_calls = max_calls
        self._rate = max_calls_per_second / workers
        self._burst = max(1.0, self._rate)
        self._tokens = min(self._tokens, self._burst)
        self._max_pending_per_address = max_pending_per_address = -(-max_pending_per_address // workers)
        self._max_pending = max(2 * max_calls, max_pending_per_address)

    @property
    def calls(self) -> int:
        """Slots taken here: reserved ones, as of the last question, and active calls."""
        return len(self._reserved) + len(self._active)

    def held(self, now: float) -> int:
        """Slots taken here at this moment."""
        self._expire(now)
        return self.calls

    @property
    def active(self) -> int:
        """Calls that have a stream."""
        return len(self._active)

    def has_stream(self, call_id: str) -> bool:
        return call_id in self._active

    @property
    def pending(self) -> int:
        """Connections that have not started."""
        return self._pending_total

    def reserve(self, call_id: str, now: float) -> Refusal | None:
        """A webhook asks for a slot. None: it is reserved, for `reserve_secs` or until `started`.

        A call that has a slot keeps it, however often its carrier asks; only a new call counts against the rate.
        """
        if call_id in self._active:
            self._renewed.add(call_id)  # its next stream may be asked for before the last one has ended
            return None
        self._expire(now)
        if not self._unreserve(call_id):
            if self._full():
                return self._refuse(Refusal.MAX_CALLS)
            if not self._take(now):
                return self._refuse(Refusal.RATE)
        self._reserve(call_id, now)
        return None

    def connect(self, address: str, now: float) -> Refusal | None:
        """A connection asks for an upgrade. None: it is pending; call `started` or `connection_over` when it is no longer.

        IPv6 addresses count by their /64: that is what one host has.
        """
        del now  # one shape for all questions
        where = _neighbourhood(address)
        count = self._pending.get(where, 0)
        if count >= self._max_pending_per_address or self._pending_total >= self._max_pending:
            return self._refuse(Refusal.PENDING)
        self._pending[where] = count + 1
        self._pending_total += 1
        return None

    def started(self, call_id: str, address: str, now: float) -> Refusal | None:
        """A pending connection's start frame has come. None: the stream is on; call `ended` with its call id when it is over.

        A call without a reservation (another host answered its webhook, or it took too long) gets a slot if there is one.
        In every case the connection is no longer pending.
        """
        self.connection_over(address)
        self._expire(now)
        streams = self._active.get(call_id, 0)
        if not streams and not self._unreserve(call_id) and self._full():
            return self._refuse(Refusal.MAX_CALLS)
        self._active[call_id] = streams + 1
        self._tell()
        self._renewed.discard(call_id)
        return None

    def connection_over(self, address: str) -> None:
        """A pending connection has closed without a start."""
        where = _neighbourhood(address)
        count = self._pending.get(where, 0)
        if count > 1:
            self._pending[where] = count - 1
        elif count:
            del self._pending[where]
        self._pending_total -= bool(count)

    def ended(self, call_id: str, now: float) -> None:
        """A stream is over; with a call's last stream its slot is free, unless the carrier has asked again meanwhile."""
        streams = self._active.pop(call_id, 0)
        if streams > 1:
            self._active[call_id] = streams - 1
        elif call_id in self._renewed:
            self._renewed.discard(call_id)
            self._reserve(call_id, now)
        self._tell()

    def _reserve(self, call_id: str, now: float) -> None:
        self._reserved[call_id] = now + self._reserve_secs
        if self._others is not None:
            self._others.reserve(call_id)

    def _unreserve(self, call_id: str) -> bool:
        """Whether a slot was reserved for this call, here or by another process; it no longer is."""
        if self._reserved.pop(call_id, None) is None:
            return self._others is not None and self._others.claim(call_id)
        if self._others is not None:
            self._others.release(call_id)
        return True

    def _full(self) -> bool:
        return (self.calls if self._others is None else self._others.total()) >= self._max_calls

    def _tell(self) -> None:
        if self._others is not None:
            self._others.set_active(len(self._active))

    def _refuse(self, refusal: Refusal) -> Refusal:
        self.refused[refusal] += 1
        return refusal

    def _expire(self, now: float) -> None:
        if self._others is not None:
            for call_id in self._others.claimed():
                self._reserved.pop(call_id, None)
        while self._reserved:
            call_id, until = next(iter(self._reserved.items()))
            if until > now:
                return
            self._unreserve(call_id)

    def _take(self, now: float) -> bool:
        """One from the bucket, which holds one second's worth."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._filled) * self._rate)
        self._filled = max(now, self._filled)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """CIDR texts such as `10.0.0.0/8` and `::1`, which a configuration has checked. Raises ValueError."""
    return tuple(ip_network(text) for text in texts)


def client_address(peer: str | None, forwarded_for: str, trusted: Sequence[Network]) -> str:
    """The address of whoever really connects. Never raises.

    `peer` is the socket's other end (None or a path for a Unix socket), `forwarded_for` the value of X-Forwarded-For, several
    headers joined by commas. A hop is believed only if the hop after it is `trusted`, from the peer backwards; the first that
    is not trusted is the client. What can't be read ends the search: then it is the last proxy that was.
    """
    address = _parsed(peer or "")
    if address is None:
        return peer or "unknown"
    if not trusted:
        return str(address)
    for hop in reversed(forwarded_for.rsplit(",", _MAX_HOPS)[-_MAX_HOPS:]):
        if not _within(address, trusted) or (before := _parsed(hop)) is None:
            break
        address = before
    return str(address)


def _within(address: IPv4Address | IPv6Address, trusted: Sequence[Network]) -> bool:
    return any(address in network for network in trusted)


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    """`192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]:80`; an IPv4 address in IPv6 clothing is an IPv4 address."""
    text = text.strip()
    if len(text) > 64 or "%" in text:  # a zone can be any text
        return None
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=4096)
def _neighbourhood(address: str) -> str:
    if ":" not in address:
        return address
    parsed = _parsed(address)
    return str(IPv6Network((int(parsed) >> 64 << 64, 64))) if isinstance(parsed, IPv6Address) else address
