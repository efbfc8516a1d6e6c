"""What systemd likes to be told (sd_notify): ready, stopping, and that the event loop still turns. Elsewhere nobody is told."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

_MICROSECONDS = 1_000_000


class Systemd:
    """The supervisor of this process, if it is systemd and wants to know (`Type=notify`). No method raises or waits."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = environ.get("WATCHDOG_USEC", "")
        self.watchdog_secs = int(limit) / _MICROSECONDS if mine and limit.isascii() and limit.isdigit() else 0.0
        """Without a word for so long, systemd restarts us; 0: it does not watch."""

    def ready(self) -> None:
        """Listening. Go on with `watch`, and end with `stopping`."""
        self._tell("READY=1")

    def stopping(self, within_secs: float = 0.0) -> None:
        """On the way out, for so long that more patience than the unit's may be needed (0: it will do)."""
        more = f"\nEXTEND_TIMEOUT_USEC={round(within_secs * _MICROSECONDS)}" if within_secs else ""
        self._tell(f"STOPPING=1{more}")

    async def watch(self, status: Callable[[], str]) -> None:
        """Forever, in a task: while the event loop turns, say so, and what `systemctl status` shows."""
        if not self._address:
            return
        pause = self.watchdog_secs / 3 or 10.0
        while True:
            self._tell(f"WATCHDOG=1\nSTATUS={status()}")
            await asyncio.sleep(pause)

    def _tell(self, text: str) -> None:
        if self._address:
            # Whoever does not listen is told nothing; a full socket is no reason to wait.
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                notify.setblocking(False)
                notify.sendto(text.encode(), self._address)
