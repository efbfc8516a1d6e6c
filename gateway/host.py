"""What the host grants this process: file descriptors, memory, processors, bandwidth, an event loop; and how much is used."""

from __future__ import annotations

import asyncio
import os
import resource
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from structlog.typing import FilteringBoundLogger

from gateway.settings import Settings

LOOK_SECS = 1.0
"""How often it is looked at."""

MEAN_SECS = 5.0
"""Processor time and bandwidth are means of so long: a burst refuses nobody."""

CALL_FDS = 3
"""A call's: the carrier's socket, the service's, and what it would leave behind."""

OTHER_FDS = 100
"""Listeners, logs, name servers, operators, handshakes that come to nothing."""


Result = TypeVar("Result")


def cores() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def run(main_coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run on uvloop where there is one: a fifth less CPU per frame."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None
    try:
        import uvloop  # noqa: PLC0415  absent where it can't run
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main_coroutine)


def raise_fd_limit(max_calls: int, log: FilteringBoundLogger) -> int:
    """Raise the soft limit of file descriptors to the hard one; warn where `max_calls` needs more. Returns what is in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:  # some systems have a lower limit behind the hard one
            log.warning("fd_limit_not_raised", limit=soft, problem=str(error))
    needed = max_calls * CALL_FDS + max_calls * CALL_FDS // 10 + OTHER_FDS
    if soft != resource.RLIM_INFINITY and soft < needed:
        hint = f"raise the limit (ulimit -n, LimitNOFILE=), or lower max_calls to {max(1, (soft - OTHER_FDS) * 10 // 33)}"
        log.warning("fd_limit_low", limit=soft, needed=needed, max_calls=max_calls, hint=hint)
    return soft


class _Look(NamedTuple):
    """What only ever grows, at one time; None where it can't be known."""

    at: float
    spent: float
    """Seconds of processor time, of this process."""
    host: tuple[float, float] | None
    """Busy and all time of the processors; of a control group with a quota, its own and what it may have."""
    sent: int | None
    """Bytes, by all interfaces but loopback."""


class Meter:
    """How much of what there is is used. `look` every second or so, from any one thread; then `used` and `over` say it."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root` is for tests: where `proc` and `sys` are."""
        self.used: Mapping[str, float] = {}
        """Shares from 0 to 1 of what can be known: `cpu` (by this process, of one processor), `host_cpu`, `memory`."""
        self.egress_mbit: float | None = None
        """Megabits a second that leave the host or its container."""
        self._proc = root / "proc"
        self._groups = root / "sys/fs/cgroup"
        self._looks: deque[_Look] = deque()

    def look(self, now: float, spent: float) -> None:
        """Read everything. `now` is any clock that only goes forward, `spent` the process's seconds of processor time."""
        look = _Look(now, spent, self._host_cpu(now), self._sent())
        while self._looks and self._looks[0].at < now - MEAN_SECS - LOOK_SECS:
            self._looks.popleft()
        self._looks.append(look)
        first, used = self._looks[0], {}
        if (elapsed := now - first.at) >= MEAN_SECS:
            used["cpu"] = max(0.0, (look.spent - first.spent) / elapsed)
            if look.host is not None and first.host is not None and (whole := look.host[1] - first.host[1]) > 0:
                used["host_cpu"] = max(0.0, (look.host[0] - first.host[0]) / whole)
            if look.sent is not None and first.sent is not None:
                self.egress_mbit = max(0.0, (look.sent - first.sent) * 8e-6 / elapsed)
        if (memory := self._memory()) is not None:
            used["memory"] = memory
        self.used = used  # at once, for whoever reads it in another thread

    def over(self, settings: Settings) -> Iterator[tuple[str, str]]:
        """Of what more is used than new calls are let in at: which, and a sentence."""
        limits = {
            "cpu": settings.max_cpu_percent,
            "host_cpu": settings.max_host_cpu_percent,
            "memory": settings.max_memory_percent,
        }
        for which, share in self.used.items():
            limit = limits[which]
            if limit < 100 and share * 100 >= limit:
                yield which, f"{_WORDS[which]}: {share:.0%} used (max_{which}_percent: {limit})"
        most, egress = settings.max_egress_mbit, self.egress_mbit
        if most is not None and egress is not None and egress >= most:
            yield "egress", f"{egress:.1f} Mbit/s leave this host (max_egress_mbit: {most:g})"

    # --- what Linux tells; elsewhere nothing is known ---

    def _memory(self) -> float | None:
        """Of the tightest limit of the control groups that this process is in; without one, of the host's memory."""
        shares = []
        for group in self._of_group("memory"):
            new = bool(_text(group / "memory.max"))
            limit = _number(group / ("memory.max" if new else "memory.limit_in_bytes"))
            current = _number(group / ("memory.current" if new else "memory.usage_in_bytes"))
            if limit is not None and current is not None and 0 < limit < 2**60:  # the old kind's "unlimited" is above
                stat, prefix = _fields(group / "memory.stat"), "" if new else "total_"
                cache = sum(stat.get(f"{prefix}{which}_file", 0) for which in ("active", "inactive"))  # of recordings, say
                shares.append(max(0, current - cache) / limit)
        if shares:
            return max(shares)
        fields = _fields(self._proc / "meminfo")
        total, available = fields.get("MemTotal:"), fields.get("MemAvailable:")
        return None if not total or available is None else 1 - available / total

    def _host_cpu(self, now: float) -> tuple[float, float] | None:
        for group in self._of_group("cpu"):
            quota, _, period = _text(group / "cpu.max").partition(" ")
            spent = _fields(group / "cpu.stat").get("usage_usec")
            if quota.isdecimal() and period.strip().isdecimal() and int(period) and spent is not None:
                return spent / 1e6, now * int(quota) / int(period)
        words = _text(self._proc / "stat").partition("\n")[0].split()
        if len(words) < 9 or words[0] != "cpu" or not all(word.isdecimal() for word in words[1:]):
            return None
        user, _nice, system, _idle, _wait, irq, softirq, steal = map(int, words[1:9])
        return user + system + irq + softirq + steal, sum(map(int, words[1:9]))

    def _sent(self) -> int | None:
        found = None
        for line in _text(self._proc / "net/dev").splitlines():
            name, colon, numbers = line.partition(":")
            fields = numbers.split()
            if colon and name.strip() != "lo" and len(fields) > 8 and fields[8].isdecimal():
                found = (found or 0) + int(fields[8])
        return found

    def _of_group(self, controller: str) -> Iterator[Path]:
        """Directories of the control groups of this process that govern `controller`, its own first, then their parents."""
        for line in _text(self._proc / "self/cgroup").splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            if controllers and controller not in controllers.split(","):
                continue
            base = self._groups / controller if controllers else self._groups
            group = base / path.lstrip("/")
            if ".." in group.parts or not os.path.isdir(group):  # noqa: PTH112 — which never raises
                group = base  # in a container the path is the host's
            while True:
                yield group
                if group == base:
                    break
                group = group.parent


_WORDS = {"cpu": "this process's processor", "host_cpu": "processors", "memory": "memory"}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
