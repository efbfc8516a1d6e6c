"""What became of a call, as far as its webhooks must know it: a signed request that is sent again by somebody who has captured
it wins nothing. Pure: entries and times are arguments; where entries are kept is `gateway.ledger`'s business.

No signature is bound to a time, so the call is asked. Whoever says the same twice is the carrier, whose request or whose answer
was lost, as long as no stream has come of it; afterwards only a call that has come back (`after:` led it here again) says again
what it said before, and only where the carrier signs no nonce. Nothing of the kind is known of a call that is forgotten, or that
another host has answered: there the same request is answered once more, with a stream that the account's carrier alone can open.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

RETRY_SECS = 60.0
"""A carrier's own retry comes within this: a request's time is up after 15 s with Twilio, after 55 s with Plivo."""

FINGERPRINT_BYTES = 8

_FORM = struct.Struct(f">BI{FINGERPRINT_BYTES}s")
ENTRY_BYTES = _FORM.size


class Kind(IntEnum):
    """What happened."""

    ANSWERED = 1
    """The request with this fingerprint was answered."""
    ENTERED = 2
    """A stream of the call has started: its token is used."""
    LEFT = 3
    """The last stream of the call is over."""
    OVER = 4
    """The whole call is over, as far as the carrier or our own answer says."""


_KINDS = frozenset(map(int, Kind))


class Entry(NamedTuple):
    """One thing that happened, at a whole second since 1970."""

    kind: Kind
    at: int
    fingerprint: bytes = bytes(FINGERPRINT_BYTES)

    def pack(self) -> bytes:
        return _FORM.pack(self.kind, self.at, self.fingerprint)


class Verdict(IntEnum):
    """What a signed request is."""

    FRESH = 1
    """Answer it, and note that it was answered."""
    RETRY = 2
    """Answer it, and note nothing."""
    EARLY = 3
    """A replay, unless the call's stream is just ending: ask again in a moment."""
    REPLAY = 4
    """Refuse it."""


def unpack(entries: Sequence[bytes]) -> list[Entry]:
    """What `Entry.pack` has made, in its order; kinds that a later version knows are left out."""
    read = [_FORM.unpack(each) for each in entries]
    return [Entry(Kind(kind), at, fingerprint) for kind, at, fingerprint in read if kind in _KINDS]


def judge(diary: Sequence[Entry], fingerprint: bytes, now: float, *, asks_for_stream: bool, nonce: bool) -> Verdict:
    """What a request of this call is, by what has happened to the call, oldest first.

    `asks_for_stream`: it is the one that a call begins with. `nonce`: the carrier's signature covers one, so that two requests
    of it never look alike.
    """
    over = any(entry.kind is Kind.OVER for entry in diary)
    if over and asks_for_stream:
        return Verdict.REPLAY
    same = [number for number, entry in enumerate(diary) if entry.kind is Kind.ANSWERED and entry.fingerprint == fingerprint]
    if not same:
        return Verdict.FRESH
    since = [entry.kind for entry in diary[same[-1] :]]
    if Kind.ENTERED not in since:
        return Verdict.RETRY if now - diary[same[-1]].at < RETRY_SECS else Verdict.REPLAY
    if nonce or over:
        return Verdict.REPLAY
    stays = max(number for number, kind in enumerate(since) if kind is Kind.ENTERED)
    return Verdict.FRESH if Kind.LEFT in since[stays:] else Verdict.EARLY
