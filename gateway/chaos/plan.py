"""What is to go wrong, in which direction, and when: the proxy's script. Pure."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

Direction = Literal["up", "down"]
Deed = Literal["stall", "resume", "half_open", "reset"]


class Faults(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens in one direction. Shares are of 1 and of data messages, each message meets one accident at most.

    `latency_ms` ± `jitter_ms`, order kept; `rate` in bit/s (0: no limit); `slice` — bytes in one write (0: as they come).
    `match` — only messages that contain this text meet accidents; control frames never do.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    rate: float = 0.0
    slice: int = 0
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    match: str = ""

    def __post_init__(self) -> None:
        shares = (self.drop, self.duplicate, self.reorder, self.corrupt)
        if min(self.latency_ms, self.jitter_ms, self.rate, self.slice, *shares) < 0 or sum(shares) > 1:
            raise ValueError("nothing is below 0, and drop, duplicate, reorder and corrupt are at most 1 together")

    @property
    def accidents(self) -> bool:
        return bool(self.drop or self.duplicate or self.reorder or self.corrupt)


class Step(Struct, frozen=True, forbid_unknown_fields=True):
    """`at` seconds after a connection began: other faults from now on (fields not named stay as they are), or a deed.

    `stall` — nothing is read any more, until `resume`; `half_open` — everything vanishes and neither end is told, for good;
    `reset` — both connections end by RST. A stall is of one `direction` if that is given.
    """

    at: float
    up: dict[str, Any] = {}
    down: dict[str, Any] = {}
    do: Deed | None = None
    direction: Direction | None = None


class Plan(Struct, frozen=True):
    """What a proxy does to every connection. `reset_after` — bytes forwarded in one direction, then RST (0: never)."""

    up: Faults = Faults()
    down: Faults = Faults()
    steps: tuple[Step, ...] = ()
    reset_after: int = 0
    seed: int = 0

    @classmethod
    def read(cls, steps: object, **options: Any) -> Plan:
        """With a script: a list of steps as in YAML or JSON. Raises ValueError."""
        try:
            read = msgspec.convert(steps, tuple[Step, ...], str_keys=True)
            plan = cls(steps=tuple(sorted(read, key=lambda step: step.at)), **options)
            for step in plan.steps:
                changed(plan.up, step.up)
                changed(plan.down, step.down)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None
        return plan


def changed(faults: Faults, changes: dict[str, Any]) -> Faults:
    return msgspec.convert(msgspec.structs.asdict(faults) | changes, Faults)
