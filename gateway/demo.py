"""`telephony-gateway demo`: a whole gateway, the echo service and a simulated caller per carrier, in one process on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic

import msgspec

import providers
from gateway import wav
from gateway.callreport import CallReport
from gateway.display import DemoCall, refused
from gateway.events import Audio, Checkpoint, Command, Event, Outcome
from gateway.provider import Provider
from gateway.server import Server
from gateway.settings import EchoService, ProviderEntry, Route, Settings
from gateway.simulator import simulate
from gateway.speech import HELLO_TEXT, hello

KEYS = "12"
"""What the caller presses: the echo service answers each key with a checkpoint."""

Tell = Callable[[float, str, str, Event | Command], None]
"""Seconds since the demo began, the provider's name, `up` or `down`, the message."""


def kinds() -> dict[str, str]:
    """Every provider's name in the demo and its kind."""
    return {"-".join(kind.split("_")[:2]): kind for kind in providers.names()}


async def run(tell: Tell) -> list[DemoCall]:
    """Places one call on each provider through a gateway on a free port. `tell` sees every message but audio."""
    entries = {}
    classes: dict[str, type[Provider]] = {}
    for name, kind in kinds().items():
        classes[name] = providers.load(kind)
        config = msgspec.convert({"auth": "none"}, classes[name].Config)
        entries[name] = ProviderEntry(kind=kind, config=config, auth="none")
    settings = Settings(
        listen="127.0.0.1:0", providers=entries, services={"echo": EchoService()}, routes=(Route(service=("echo",)),)
    )
    server = Server(settings, {name: cls(entries[name].config) for name, cls in classes.items()})
    port = await server.start()
    began = monotonic()
    names: dict[str, str] = {}  # session id to provider
    outcomes: dict[str, Counter[Outcome]] = {name: Counter() for name in classes}

    def watch(session_id: str, event: Event) -> None:
        if session_id in server.streams:
            names[session_id] = server.streams[session_id].provider
        name = names[session_id]
        if isinstance(event, Checkpoint) and event.outcome is not None:
            outcomes[name][event.outcome] += 1
        tell(monotonic() - began, name, "up", event)

    server.bus.watch(watch)
    try:
        async with asyncio.TaskGroup() as tasks:
            calls = [(name, tasks.create_task(_call(name, cls, port, began, tell))) for name, cls in classes.items()]
        reports = [(name, call.result()) for name, call in calls]
        return [DemoCall(name, report, dict(outcomes[name]), _failures(report, outcomes[name])) for name, report in reports]
    finally:
        await server.stop()


async def _call(name: str, cls: type[Provider], port: int, began: float, tell: Tell) -> CallReport:
    clip = hello()
    first_heard = False

    def on_event(_at: float, direction: str, message: Event | Command) -> None:
        nonlocal first_heard
        if direction == "down" and (not isinstance(message, Audio) or not first_heard):
            first_heard = first_heard or isinstance(message, Audio)
            tell(monotonic() - began, name, "down", message)

    return await simulate(
        cls,
        url=f"http://127.0.0.1:{port}/{name}/answer",
        audio=clip.pcm,
        audio_format=clip.media_format,
        dtmf=KEYS,
        say=[HELLO_TEXT],
        hold_secs=1.0,
        on_event=on_event,
    )


def save(calls: list[DemoCall], directory: Path) -> None:
    """Writes what each caller heard as WAV files in `directory`. Raises WavError, OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    for call in calls:
        recording = call.report.recording
        if recording is not None and recording.heard:
            wav.write(directory / f"{call.name}.wav", recording.heard, recording.sample_rate)


def _failures(report: CallReport, outcomes: Mapping[Outcome, int]) -> list[str]:
    """Why a demo call did not go well, in sentences; empty if all is well."""
    wrong = [*report.errors, *(refused(refusal) for refusal in report.refusals)]
    if not report.connected:
        return wrong or ["the stream was not connected"]
    if report.audio_sent_ms and report.latency_p50_ms is None:
        wrong.append("what the caller heard is not what the caller said")
    if not report.audio_sent_ms and HELLO_TEXT not in report.spoken:
        wrong.append("the caller's words did not come back")
    if len(KEYS) > outcomes.get(Outcome.PLAYED, 0):
        wrong.append(f"of {len(KEYS)} checkpoints {outcomes.get(Outcome.PLAYED, 0)} were played")
    return wrong
