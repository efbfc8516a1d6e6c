"""One stream in numbers: a live one for operators; one that has ended in its log line, and in the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.bus import Subscription
from gateway.events import StopReason
from gateway.listeners import ListenerFigures
from gateway.services import Link, LinkFigures
from gateway.session import Session
from gateway.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Figures:
    """One stream at one moment. Audio is counted in samples at `sample_rate`; both are 0 for a stream of text."""

    provider: str
    started: bool
    entered: bool
    """Whether it was let in as a call: its start frame has come and was not refused."""
    duration_secs: float
    setup_secs: float | None
    """From the carrier's connection until a service took the call."""
    reason: StopReason | None
    link: LinkFigures | None
    links: Sequence[LinkFigures]
    """All links that the stream has had, the present one last."""
    listeners: Sequence[ListenerFigures]
    stopwatch: Stopwatch
    frames_in: int
    frames_out: int
    bad: Mapping[str, int]
    unknown: Mapping[str, int]
    faults: Mapping[str, int]
    outcomes: Mapping[str, int]
    gap_ms: int
    sample_rate: int
    received: int
    forwarded: int
    held: int
    """Samples of the caller that are still on their way to the service."""
    queued: int
    played: int
    cleared: int
    lost: int
    """Before the end: those that are still to be played."""
    refused: int
    underruns: int
    queued_ms: int
    """Audio that waits here to be played."""
    ahead_ms: float
    """Audio that the carrier has and still has to play."""
    pending: int
    """Checkpoints that are not resolved."""

    @property
    def dropped(self) -> int:
        """Samples of the caller that no service got and none will get."""
        return self.received - self.forwarded - self.held

    def line(self) -> dict[str, object]:
        """The canonical log line's values."""
        link, watch = self.link, self.stopwatch
        return {
            "reason": self.reason,
            "duration_secs": round(self.duration_secs, 3),
            "setup_ms": round(self.setup_secs * 1000) if self.setup_secs is not None else None,
            "service": link.service if link is not None else None,
            "reconnects": sum(outage.count for each in self.links for outage in each.outages.values()),
            "listeners": [
                {
                    "name": each.name,
                    "track": each.track,
                    "state": each.state,
                    "lag_ms": round(each.lag_ms),
                    "dropped_ms": round(each.dropped_ms),
                }
                for each in self.listeners
            ],
            "frames_in": self.frames_in,
            "frames_out": self.frames_out,
            "bad_frames": dict(self.bad),
            "unknown_frames": dict(self.unknown),
            "gap_ms": self.gap_ms,
            "faults": dict(self.faults),
            "checkpoints": dict(self.outcomes),
            "latency_to_service_ms": latency(watch, "to_service"),
            "latency_to_caller_ms": latency(watch, "to_caller"),
            "time_to_silence_ms": latency(watch, "to_silence"),
            "received_samples": self.received,
            "forwarded_samples": self.forwarded,
            "dropped_samples": self.dropped,
            "queued_samples": self.queued,
            "played_samples": self.played,
            "cleared_samples": self.cleared,
            "lost_samples": self.lost,
            "underruns": self.underruns,
            "refused_samples": self.refused,
        }


def latency(watch: Stopwatch, way: str) -> dict[str, float] | None:
    """The median and the 99th percentile in milliseconds, to within a bucket; None where nothing was timed."""
    buckets = getattr(watch, way)
    half, most = buckets.quantile(0.5), buckets.quantile(0.99)
    return None if half is None else {"p50": round(half * 1000, 2), "p99": round(most * 1000, 2)}


def measure(
    provider: str,
    session: Session,
    links: Sequence[Link],
    subscription: Subscription | None,
    stopwatch: Stopwatch,
    listeners: Sequence[ListenerFigures],
    *,
    entered: bool,
    began: float,
    now: float,
) -> Figures:
    """The figures of a stream now."""
    playout, start = session.playout, session.start
    media_format = start.media_format if start is not None else None
    size = media_format.sample_bytes if media_format is not None else 1
    queued, played, cleared, lost = playout.totals(now) if playout is not None else (0, 0, 0, 0)
    fared = [link.figures() for link in links]
    over = session.stop is not None
    held = 0 if over or subscription is None else subscription.audio_bytes + (fared[-1].unsent_bytes if fared else 0)
    took_at = next((each.took_at for each in fared if each.took_at is not None), None)
    return Figures(
        provider=provider,
        started=start is not None,
        entered=entered,
        duration_secs=now - began,
        setup_secs=took_at - began if took_at is not None else None,
        reason=session.stop.reason if session.stop is not None else None,
        link=fared[-1] if fared else None,
        links=fared,
        listeners=listeners,
        stopwatch=stopwatch,
        frames_in=session.frames_in,
        frames_out=session.frames_out,
        bad=session.bad,
        unknown=session.unknown,
        faults=session.faults,
        outcomes={str(outcome): count for outcome, count in session.outcomes.items()},
        gap_ms=session.gap_ms,
        sample_rate=media_format.sample_rate if media_format is not None else 0,
        received=(subscription.offered_bytes if subscription is not None else session.received_bytes) // size,
        forwarded=sum(link.forwarded_bytes for link in links) // size,
        held=held // size,
        queued=queued // size,
        played=played // size,
        cleared=cleared // size,
        lost=lost // size,
        refused=playout.refused // size if playout is not None else 0,
        underruns=playout.underruns if playout is not None else 0,
        queued_ms=playout.queued_ms if playout is not None else 0,
        ahead_ms=playout.ahead_ms(now) if playout is not None else 0.0,
        pending=len(session.pending(now)[1]),
    )
