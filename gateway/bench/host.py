"""What the system says of processes: CPU time, memory, children. Linux only."""

from __future__ import annotations

import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and its descendants; those that are gone are left out."""
    pids = [pid]
    for each in pids:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            pids += map(int, _text(children).split())
    return pids


def pss_bytes(pid: int) -> int:
    """Its resident memory; pages that it shares with others count in part."""
    for line in _text(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def busy_secs() -> float:
    """CPU time that the whole machine has used, whoever did, and what its host kept from it."""
    fields = [int(each) for each in _text(Path("/proc/stat")).split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _waiting, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
