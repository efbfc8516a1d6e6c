"""Load on a gateway, and what it costs: `telephony-gateway bench`.

Two processes are measured against each other on one machine: a subject (the gateway as it is served, or any other relay) and a
load generator, which plays all carriers and their services. This page has the words that both sides and the reports share.

A **frame** is 20 ms of one call's audio carried in one direction: in at one socket and out at the other. A duplex call is 100
frames a second. **Cost** of a frame is the CPU time of the subject's processes, the kernel's share for their sockets included,
through the frames that arrived meanwhile. **Added latency** of a frame is the time from just before it is written by the one
end until it has been read by the other; both times are one process's. Frames are told apart by counting their samples, so the
delay of a sample-rate filter within them is not in it: it is measured apart, by comparing what was said with what arrived.
"""

from __future__ import annotations

from msgspec import Struct, field

from gateway.media import MULAW_8K, MediaFormat

TICK_MS = 20
TICK_SECS = TICK_MS / 1000

MOST_CPU, MOST_P99_MS = 0.90, 20.0
"""What `--find` takes as carried well: share of one core, and added latency at the 99th percentile in both directions."""

LATE_MS, BUSY, FOREIGN = 2.0, 0.85, 0.10
"""A generator whose 99th percentile of lateness is beyond this, or that used more of a core, measures itself; where others used
more of a core, them."""


class Load(Struct, frozen=True, kw_only=True):
    """One round's load: what the generator is told."""

    calls: int
    port: int
    """Where the subject takes carriers' streams."""
    path: str
    kind: str
    """The carriers' protocol."""
    carrier_format: MediaFormat = MULAW_8K
    service_port: int = 0
    """Where the generator plays the service; 0: there is none, and carriers hear themselves."""
    service_format: MediaFormat = MULAW_8K
    framed: bool = False
    """Whether the service asks for numbered frames and acknowledges them."""
    frame_ms: int = TICK_MS
    """Audio in each message to the service."""
    held_frames: int = 0
    """What a subject's own filter may keep back of each direction, and be lacking at the end."""
    ramp_per_sec: float = 100.0
    warm_up_secs: float = 2.0
    seconds: float = 5.0
    pid: int = 0
    """The subject's process, whose CPU time and that of its children is taken."""
    seed: int = 1
    """Of the phases: when within 20 ms each end of each call sends."""


class Latency(Struct, frozen=True):
    """Of added latencies, milliseconds."""

    frames: int
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Sound(Struct, frozen=True):
    """One call's audio, compared with what was said: how alike (1 is a perfect copy) and how much later within the stream."""

    correlation: float
    delay_ms: float


class Measured(Struct, frozen=True, kw_only=True):
    """What the generator saw in one round."""

    seconds: float
    up_frames: int
    down_frames: int
    subject_cpu_secs: float
    own_cpu_secs: float
    foreign_cpu_secs: float
    """What everybody else used meanwhile."""
    up: Latency | None
    down: Latency | None
    lateness: Latency
    """How much later than due the generator sent."""
    missing_frames: int
    """Sent and not arrived when the round ended."""
    listened_frames: int = 0
    """That arrived at listeners."""
    sound_up: Sound | None = None
    sound_down: Sound | None = None
    memory_bytes: int = 0
    """The subject's at the end of the round: its share of resident pages (PSS)."""
    trouble: list[str] = field(default_factory=list)
    """What went wrong, in sentences."""


class Round(Struct, frozen=True, kw_only=True):
    """One round of one subject at one number of calls."""

    subject: str
    calls: int
    measured: Measured
    underruns: int | None = None
    """Holes in playout by the subject's own count; None where it has none."""
    idle_memory_bytes: int = 0
    trouble: list[str] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return self.measured.up_frames + self.measured.down_frames

    @property
    def cpu(self) -> float:
        """Share of one core."""
        return self.measured.subject_cpu_secs / self.measured.seconds

    @property
    def frame_us(self) -> float:
        """Microseconds of CPU for each frame."""
        return self.measured.subject_cpu_secs * 1e6 / max(1, self.frames)

    @property
    def p99_ms(self) -> float:
        """The worse of both directions."""
        return max((each.p99 for each in (self.measured.up, self.measured.down) if each is not None), default=float("inf"))

    @property
    def call_bytes(self) -> float:
        """Memory for each call."""
        return (self.measured.memory_bytes - self.idle_memory_bytes) / self.calls

    @property
    def valid(self) -> bool:
        return not self.trouble

    @property
    def carried_well(self) -> bool:
        """Whether `--find` may go on to more calls. A generator that is late makes latencies worse, never better."""
        lost = self.measured.missing_frames > 0.001 * self.frames
        return self.cpu <= MOST_CPU and self.p99_ms <= MOST_P99_MS and not lost and not self.measured.trouble
