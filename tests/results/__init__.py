"""Figures of the long forms, one file each, for the fault table: written by the commands that measured them."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

RESULTS = Path(__file__).parent


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """What a command measured: `figures` as `name: value`, and whether it passed its own bar."""

    name: str
    command: str
    date: str
    machine: str
    passed: bool
    figures: dict[str, Any]


def machine() -> str:
    """Cores, processor, Python: what figures depend on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{len(os.sched_getaffinity(0))} cores, {model}, Python {platform.python_version()}"


def store(name: str, figures: dict[str, Any], *, passed: bool, module: str) -> Path:
    """Write `tests/results/<name>.json`."""
    command = " ".join(["python -m", module, *sys.argv[1:]])
    result = Result(name, command, datetime.now(UTC).date().isoformat(), machine(), passed, figures)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(msgspec.to_builtins(result), indent=2) + "\n")
    return path


def load() -> dict[str, Result]:
    """All results by name."""
    return {path.stem: msgspec.json.decode(path.read_bytes(), type=Result) for path in sorted(RESULTS.glob("*.json"))}
