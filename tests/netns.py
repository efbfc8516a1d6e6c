"""A network namespace of a test's own, and lines in it: TCP over packets that are lost, late and few.

Whoever dials a line's `far` address reaches who listens on its `near` one, as if from another host: the packets go out by a TUN
device, and a process of its own sends them back in by the same after their delay, with source and destination exchanged (which
leaves every checksum right). They are lost by nftables, at random, and are slowed down by a token bucket (sch_tbf). All of it is
in 127.0.0.0/8 and in the namespace; the host's own network is never touched.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
from collections import deque
from functools import cache
from pathlib import Path
from random import Random
from time import monotonic
from types import TracebackType

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_TRY = (
    "ip link set lo up && nft add table inet x && ip tuntap add dev try0 mode tun && ss -t > /dev/null && "
    "tc qdisc add dev try0 root tbf rate 1mbit burst 3kb limit 3kb"
)


def command(*words: str) -> list[str]:
    """As the root of a new namespace: of the host's root, or of a user who is nobody outside. What it starts ends with it."""
    return ["unshare", "-n" if os.geteuid() == 0 else "-rn", "--pid", "--fork", "--kill-child", *words]


@cache
def missing() -> str:
    """Why there can be no such namespace here. Empty where there can."""
    try:
        found = subprocess.run(command("sh", "-c", _TRY), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no network namespace: {error}"
    return f"no network namespace with nft and tbf: {found.stderr.strip() or found.returncode}" if found.returncode else ""


def prepare() -> None:
    """Of the namespace that this process is in, before its first line."""
    _do("ip link set lo up")
    _do("ip route del local 127.0.0.0/8 dev lo table local")  # 127.0.0.1 has a route of its own
    _do("nft add table inet lines")
    _do("nft add chain inet lines input { type filter hook input priority 0 ; }")
    Path("/proc/sys/net/ipv4/conf/all/route_localnet").write_text("1")


def _do(line: str) -> str:
    return subprocess.run(line.split(), check=True, stdout=subprocess.PIPE, text=True, timeout=10).stdout


class Line:
    """One of a namespace. `rate` is in bit/s, of both directions together (0: no limit); its queue is long."""

    def __init__(self, number: int, *, delay_ms: float = 0.0, jitter_ms: float = 0.0, rate: int = 0) -> None:
        self.name = f"line{number}"
        self.near, self.far = f"127.9.{number}.1", f"127.9.{number}.2"
        self._delay_ms, self._jitter_ms, self._rate = delay_ms, jitter_ms, rate
        self._pump: subprocess.Popen[bytes]

    def __enter__(self) -> Line:
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", self.name.encode(), IFF_TUN | IFF_NO_PI))
        _do(f"ip address add {self.near}/24 dev {self.name}")
        _do(f"ip link set dev {self.name} up")
        if self._rate:
            _do(f"tc qdisc add dev {self.name} root tbf rate {self._rate}bit burst 3kb limit 1mb")
        arguments = map(str, (device, self._delay_ms / 1000, self._jitter_ms / 1000))
        self._pump = subprocess.Popen([sys.executable, "-m", "tests.netns", *arguments], pass_fds=[device], stdin=subprocess.PIPE)
        os.close(device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._pump.stdin is not None
        self._pump.stdin.close()
        self._pump.wait(10)


def lose(lines: list[Line], percent: int) -> None:
    """Of all packets on these lines, at random, from now on."""
    _do("nft flush chain inet lines input")
    for line in lines:
        _do(f"nft add rule inet lines input iifname {line.name} counter")
        _do(f"nft add rule inet lines input iifname {line.name} numgen random mod 100 < {percent} counter drop")


def packets() -> tuple[int, int]:
    """That came, and of these that were dropped, since the last `lose`."""
    counts = [int(count) for count in re.findall(r"counter packets (\d+)", _do("nft list chain inet lines input"))]
    return sum(counts[::2]), sum(counts[1::2])


def tcp_counter(name: str) -> int:
    """One of this namespace's: `RetransSegs`, `TCPTimeouts`."""
    for table in ("snmp", "netstat"):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            if name in names.split():
                return int(values.split()[names.split().index(name)])
    raise KeyError(name)


def timeout_ms(line: Line) -> float:
    """Of the line's connections, before a retransmission, as the kernel has it now: the median."""
    told = _do(f"ss -tinH src {line.near}") + _do(f"ss -tinH src {line.far}")
    found = sorted(float(value) for value in re.findall(r"\brto:([\d.]+)", told))
    return found[len(found) // 2]


def carry(device: int, delay_secs: float, jitter_secs: float) -> None:
    """Every packet back in where it came from, later and in order, until standard input is closed."""
    random = Random(0)
    waiting: deque[tuple[float, bytes]] = deque()
    last = 0.0
    while True:
        timeout = max(0.0, waiting[0][0] - monotonic()) if waiting else None
        readable, _, _ = select.select([device, sys.stdin], [], [], timeout)
        if sys.stdin in readable:
            return
        now = monotonic()
        if device in readable:
            packet = bytearray(os.read(device, 65536))
            if packet[0] >> 4 == 4:
                packet[12:16], packet[16:20] = packet[16:20], packet[12:16]
                last = max(last, now + max(0.0, delay_secs + random.uniform(-jitter_secs, jitter_secs)))
                waiting.append((last, packet))
        while waiting and waiting[0][0] <= now:
            os.write(device, waiting.popleft()[1])


if __name__ == "__main__":
    carry(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
