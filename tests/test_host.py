"""O6: the limit of file descriptors, and what happens at it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway import host
from tests.doubles import TwilioMedia
from tests.test_end_to_end import MULAW, played


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, *, refuse: bool = False) -> list[tuple[int, int]]:
    done: list[tuple[int, int]] = []

    def raise_it(_: int, to: tuple[int, int]) -> None:
        if refuse:
            raise OSError(22, "Invalid argument")
        done.append(to)

    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", raise_it)
    return done


def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    done = limits(monkeypatch, 1024, 65536)
    assert 65536 == host.raise_fd_limit(500, structlog.get_logger())
    assert [(65536, 65536)] == done
    assert [] == log


def test_a_limit_that_is_too_low_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    limits(monkeypatch, 1024, 1024)
    assert 1024 == host.raise_fd_limit(500, structlog.get_logger())
    (warning,) = log
    assert ("fd_limit_low", 1024, 1200) == (warning["event"], warning["limit"], warning["needed"])
    assert "max_calls to 420" in warning["hint"]
    log.clear()
    host.raise_fd_limit(420, structlog.get_logger())
    assert [] == log


def test_a_system_that_does_not_let_it_be_raised(monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    limits(monkeypatch, 256, 65536, refuse=True)
    assert 256 == host.raise_fd_limit(10, structlog.get_logger())
    assert ["fd_limit_not_raised"] == [entry["event"] for entry in log]


async def test_o6_calls_go_on_when_descriptors_run_out(tmp_path: Path) -> None:
    config, errors = tmp_path / "gateway.yaml", tmp_path / "log"
    config.write_text(
        'listen: "127.0.0.1:0"\nmax_calls: 40\nmax_pending_per_address: 1000\n'
        "providers: {twilio: {kind: twilio_media_streams, auth: none}}\n"
        "services: {echo: {kind: echo}}\nroutes: [{service: echo}]\n"
    )
    script = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); from gateway.cli import main; main()"
    with errors.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, "serve", "--config", config), stderr=file, env={**os.environ, "NO_COLOR": "1"}
        )
    try:
        while (port := listening(errors)) is None:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)
        idle: list[socket.socket] = []
        async with TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream") as call:
            await call.speak(MULAW[:800])
            for _ in range(300):
                one = socket.socket()
                one.setblocking(False)
                with suppress(BlockingIOError):
                    one.connect(("127.0.0.1", port))
                idle.append(one)
            await call.speak(MULAW[800:8000])
            await asyncio.sleep(0.3)
            assert MULAW[:8000] == played(call)
            for one in idle:
                one.close()
            async with asyncio.timeout(4), TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream", seed=2) as next_call:
                await next_call.speak(MULAW[:800])
                await next_call.hangup()
            await call.hangup()
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
    assert 0 == process.returncode
    lines = errors.read_text().splitlines()
    assert len(lines) < 100
    assert "Traceback" not in "".join(lines)


def listening(errors: Path) -> int | None:
    """The port, once the log tells it."""
    entries = [json.loads(line) for line in errors.read_text().splitlines()]
    return next((int(entry["address"].rpartition(":")[2]) for entry in entries if entry["event"] == "listening"), None)
