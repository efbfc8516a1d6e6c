"""Processes: how they are started, and what the system says of them: CPU time, memory, children. Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process. Who is interrupted while it starts has ended it before KeyboardInterrupt is raised: Popen would forget it."""
    came: list[int] = []
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    ours = {each: handler for each, handler in handlers.items() if callable(handler)}
    for each in ours:
        signal.signal(each, lambda number, _: came.append(number))
    try:
        process = subprocess.Popen(arguments, **options)  # noqa: S603 our own programs
    finally:
        for each, handler in ours.items():
            signal.signal(each, handler)
    if came:
        process.kill()
        process.wait()
        raise KeyboardInterrupt
    return process


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
