"""What is measured: a process that takes carriers' streams and carries them to a service."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct, field

import gateway
from gateway.bench import TICK_MS
from gateway.bench.host import family, pss_bytes, start
from gateway.errors import GatewayError
from gateway.media import MULAW_8K, Encoding, MediaFormat

START_SECS, STOP_SECS = 20.0, 5.0
SETTLE_SECS = 0.3
"""Until a process that has just begun to listen is idle."""


class BenchError(GatewayError):
    """Nothing can be measured. `str(error)` says why."""


class Ports(Struct, frozen=True):
    listen: int
    admin: int
    service: int


class Subject(Struct, frozen=True, kw_only=True):
    """Any relay: how it is started, and what load suits it."""

    name: str
    kind: str
    command: tuple[str, ...] = ()
    """Its arguments; `{listen}` and `{service}` are replaced by the ports."""
    environment: Mapping[str, str] = field(default_factory=dict)
    path: str = "/"
    carrier_format: MediaFormat = MULAW_8K
    service_format: MediaFormat | None = MediaFormat(Encoding.PCM_S16LE, 16000)
    """None: it sends callers their own words."""
    framed: bool = False
    frame_ms: int = TICK_MS
    listeners: int = 0
    held_frames: int = 0

    def arguments(self, ports: Ports, calls: int, directory: Path) -> list[str]:
        """What to run. May write into `directory`."""
        return [each.format(listen=ports.listen, service=ports.service) for each in self.command]

    def ready(self, ports: Ports) -> bool:
        """Whether it takes calls, once it listens."""
        return True

    def underruns(self, ports: Ports) -> int | None:
        """Its own count of holes in playout, if it has one."""
        return None


class Gateway(Subject, frozen=True, kw_only=True):
    """This gateway, as `serve` runs it."""

    name: str = "this gateway"
    path: str = "/carrier/stream"
    workers: int = 1
    idle_routes: int = 0
    idle_services: int = 0
    options: Mapping[str, object] = field(default_factory=dict)
    """More of the configuration."""

    def arguments(self, ports: Ports, calls: int, directory: Path) -> list[str]:
        path = directory / "gateway.yaml"
        path.write_text(json.dumps(self.document(ports, calls)))
        return [sys.executable, "-m", "gateway", "serve", "--config", str(path), "--workers", str(self.workers)]

    def document(self, ports: Ports, calls: int) -> dict[str, object]:
        """The configuration: nothing is turned off, and no limit of calls is in the way."""
        url = f"ws://127.0.0.1:{ports.service}/"
        echo: dict[str, object] = {"kind": "echo"}
        agent = echo
        if self.service_format is not None:
            form = {"encoding": self.service_format.encoding, "sample_rate": self.service_format.sample_rate}
            agent = {"kind": "websocket", "url": url, "media_format": form, "frame_ms": self.frame_ms}
        # A carrier that is not asked for a signature is not asked for one once: at its handshake.
        account: dict[str, object] = {"kind": self.kind, "auth": "none"}
        idle = [{"called": f"99{number:06}", "service": "agent"} for number in range(self.idle_routes)]
        return {
            "listen": f"127.0.0.1:{ports.listen}",
            "admin": f"127.0.0.1:{ports.admin}",
            "max_calls": calls + 10,
            "max_calls_per_second": 10_000,
            "max_pending_per_address": 10_000,
            "providers": {"carrier": account},
            "services": {
                "agent": agent,
                **{f"listener-{number}": agent for number in range(self.listeners)},
                **{f"idle-{number}": agent for number in range(self.idle_services)},
            },
            "routes": [*idle, {"service": "agent", "listeners": [f"listener-{number}" for number in range(self.listeners)]}],
            **self.options,
        }

    def ready(self, ports: Ports) -> bool:
        with suppress(OSError):
            return bool(_get(f"http://127.0.0.1:{ports.admin}/readyz"))
        return False

    def underruns(self, ports: Ports) -> int | None:
        found = 0.0
        for line in _get(f"http://127.0.0.1:{ports.admin}/metrics").splitlines():
            if line.startswith("telephony_underruns_total"):
                found += float(line.rsplit(" ", 1)[1])
        return int(found)


class Running:
    """A subject's process; a context that ends it."""

    def __init__(self, subject: Subject, calls: int, directory: Path) -> None:
        self._subject = subject
        self.ports = Ports(*free_ports(3))
        self._log = directory / "subject.log"
        with self._log.open("wb") as log:
            self._process = start(
                subject.arguments(self.ports, calls, directory),
                cwd=Path(gateway.__file__).parent.parent if isinstance(subject, Gateway) else None,
                env={**_environment(), **subject.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to hand on
            )
        self.pid = self._process.pid

    def __enter__(self) -> Running:
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise BenchError(f"{self._subject.name} ended at once: {self.last_words()}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.ports.listen)) == 0 and self._subject.ready(self.ports):
                    time.sleep(SETTLE_SECS)
                    return
            time.sleep(0.05)
        raise BenchError(f"{self._subject.name} did not listen within {START_SECS:g} s: {self.last_words()}")

    def memory_bytes(self) -> int:
        return sum(pss_bytes(pid) for pid in family(self.pid))

    def underruns(self) -> int | None:
        with suppress(OSError, ValueError):
            return self._subject.underruns(self.ports)
        return None

    def last_words(self) -> str:
        """The end of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "it said nothing"


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in free]
    for each in free:
        each.close()
    return ports


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 our own listener
        return str(answer.read().decode())
