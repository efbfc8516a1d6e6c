"""The configuration read again while calls go on: checked whole, then taken whole for new calls, or refused whole."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import structlog
from msgspec import Struct, structs

import providers
from gateway import config, tls
from gateway.errors import ConfigError
from gateway.provider import Provider
from gateway.server import Server
from gateway.settings import Settings, host_port, is_loopback

APPLIED = frozenset(
    {
        *("providers", "services", "routes", "tls", "trusted_proxies"),
        *("max_calls", "max_calls_per_second", "max_pending_per_address"),
        *("max_cpu_percent", "max_host_cpu_percent", "max_memory_percent", "max_egress_mbit"),
        *("start_timeout_secs", "stall_timeout_secs", "reattach_secs", "capacity_ms", "hold_ms", "drain_secs", "sounds"),
    }
)
"""Keys whose new values count for new calls. Others take a restart: sockets are bound to them, or calls sign by them."""


class Reloaded(Struct, frozen=True):
    """What came of it: `changed` keys, `kept` ones that take a restart, `warnings` of the file. All empty: nothing is new."""

    changed: list[str]
    kept: list[str]
    warnings: list[str]


class Reload:
    """A server and the file that it was started with. Call it as often as you like; several at once take turns."""

    def __init__(self, path: Path, server: Server) -> None:
        self.outcomes: Counter[str] = Counter()
        """How often a reload was `applied` and `refused`."""
        self._path = path
        self._server = server
        self._turn = asyncio.Lock()
        self._log = structlog.get_logger("gateway")

    async def __call__(self, text: str | None = None) -> Reloaded:
        """Read the file and go by it. Raises ConfigError with every finding; then nothing has changed, and the log says why.

        `text` is what stands in the file, if it has been read.
        """
        async with self._turn:
            try:
                # Not here: names and secrets may lie on slow file systems, and calls go on meanwhile.
                new, made, warnings = await asyncio.to_thread(examine, self._path, text)
                old = self._server.settings
                merged, kept = merge(old, new)
            except ConfigError as error:
                self.outcomes["refused"] += 1
                for problem in str(error).splitlines():
                    self._log.error("configuration_refused", problem=problem)
                raise
            changed = [*_differences(old, merged)]
            self._server.reload(merged, made)
            self.outcomes["applied"] += 1
            for warning in warnings:
                self._log.warning("configuration_doubtful", problem=warning)
            if kept:
                self._log.warning("configuration_kept", keys=kept, hint="these take a restart")
            self._log.info("configuration_reloaded", changed=changed, live_streams=len(self._server.streams))
            return Reloaded(changed, kept, warnings)


def load_providers(settings: Settings) -> dict[str, Provider]:
    """Every configured account."""
    return {name: providers.load(entry.kind)(entry.config) for name, entry in settings.providers.items()}


def merge(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """(`new` as far as it can be taken without a restart, the keys that can't). Raises ConfigError where that makes no whole."""
    kept = [key for key in Settings.__struct_fields__ if key not in APPLIED and getattr(old, key) != getattr(new, key)]
    if (old.tls is None) != (new.tls is None):
        kept.append("tls")
    merged = structs.replace(new, **{key: getattr(old, key) for key in kept})
    problems = []
    for name, entry in merged.providers.items():
        if entry.auth == "none" and not is_loopback(host_port(merged.listen)[0]):
            problems.append(f"providers.{name}: `auth: none` on {merged.listen}, which only a restart can change")
        for key in ("secret", "public_url"):
            if entry.auth is None and getattr(merged, key) is None:
                problems.append(f"providers.{name}: needs `{key}`, which only a restart can set")
    if problems:
        raise ConfigError("\n".join(problems))
    return merged, kept


def examine(path: Path, text: str | None = None) -> tuple[Settings, dict[str, Provider], list[str]]:
    """What a file (or its `text`) says, its providers made, and warnings. Raises ConfigError for whatever could not be served."""
    settings, warnings = config.examine_text(config.read_file(path) if text is None else text, source=str(path))
    if settings.tls is not None:
        tls.load(settings.tls)
    try:
        return settings, load_providers(settings), warnings
    except Exception as error:  # one from outside this tree may fail in any way, with anything in its words
        raise ConfigError(f"{path}: a provider can't be made: {type(error).__name__}") from None


def _differences(old: Settings, new: Settings) -> Iterator[str]:
    """Keys, and of providers and services their names."""
    for key in Settings.__struct_fields__:
        before, after = getattr(old, key), getattr(new, key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from (f"{key}.{name}" for name in {**before, **after} if before.get(name) != after.get(name))
        elif before != after:
            yield key
