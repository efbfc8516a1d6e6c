"""The wheel, installed into an environment of its own, does what the README says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(arguments: list[object], cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(argument) for argument in arguments], cwd=cwd, check=True, capture_output=True, timeout=100)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`telephony-gateway` of the built wheel. Its dependencies are borrowed from this environment, the package is not."""
    directory = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory], cwd=ROOT)
    (wheel,) = directory.glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"])
    python = directory / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    run(install)
    packages = next((directory / "venv" / "lib").glob("python*/site-packages"))
    # A plain path is added; the editable install's own .pth files in it are not run.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run([python, "-c", "import gateway; print(gateway.__file__)"], cwd=directory)
    assert str(directory) in where.stdout.decode()
    return directory / "venv" / "bin" / "telephony-gateway"


def test_the_demo_carries_a_call_on_every_carrier(command: Path, tmp_path: Path) -> None:
    done = subprocess.run([command, "demo"], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    reports = {line["provider"]: line["report"] for line in lines if "report" in line}
    assert {"plivo-audio", "twilio-conversation", "twilio-media"} == set(reports)
    assert all(report["ok"] for report in reports.values())
    assert ["plivo-audio.wav", "twilio-media.wav"] == sorted(path.name for path in (tmp_path / "demo-out").iterdir())
    assert b"" == done.stderr


async def test_serve_answers_a_simulated_call_and_stops_cleanly(command: Path, tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(
        'listen: "127.0.0.1:0"\n'
        "providers: {plivo: {kind: plivo_audio_streaming, auth: none}}\n"
        "services: {echo: {kind: echo}}\n"
        "routes: [{service: echo}]\n"
    )
    process = await asyncio.create_subprocess_exec(
        command, "serve", "--config", config, stderr=asyncio.subprocess.PIPE, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}
    )
    assert process.stderr is not None
    try:
        listening: dict[str, Any] = {}
        while listening.get("event") != "listening":
            listening = json.loads(await asyncio.wait_for(process.stderr.readline(), 20))
        caller = await asyncio.create_subprocess_exec(
            *(command, "simulate", "plivo_audio_streaming", "--url", f"http://{listening['address']}/plivo/answer"),
            *("--save", tmp_path / "heard.wav", "--dtmf", "1", "--calls", "2"),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(caller.communicate(), 60)
        assert 0 == caller.returncode, out.decode()
        assert 2 == len(out.splitlines())
        assert all(json.loads(line)["heard_ms"] > 4000 for line in out.splitlines())
        assert (tmp_path / "heard-1.wav").stat().st_size > 60_000
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = await asyncio.wait_for(process.stderr.read(), 20), await process.wait()
    assert 0 == process.returncode
    events = [json.loads(line)["event"] for line in rest.splitlines()]
    assert 2 == events.count("stream_ended")
    assert "stopping" == events[-1]


def test_an_impossible_configuration_exits_78_with_file_line_and_key(command: Path, tmp_path: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(
        "providers: {twilio: {kind: twilio_media_stream, auth: none}}\nservices: {echo: {kind: echo}}\nroutes: []\n"
    )
    for arguments in (("serve", "--config", config), ("check", config)):
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=20, check=False)
        assert 78 == done.returncode
        assert f"{config}:1:" in done.stderr
        assert "providers.twilio.kind" in done.stderr
        assert "twilio_media_streams" in done.stderr, "did you mean"
        assert "Traceback" not in done.stderr
