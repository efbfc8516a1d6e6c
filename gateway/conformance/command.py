"""`telephony-gateway conformance`. Exit codes: 0 nothing failed, 1 something did, 2 usage."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, get_args
from urllib.parse import urlsplit

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gateway import logs
from gateway.conformance import AT_ONCE, CHECKS, Report
from gateway.conformance import examine as run_checks
from gateway.conformance.checks import Outcome
from gateway.conformance.table import print_report
from gateway.media import Encoding, MediaFormat


@click.command("conformance")
@click.option("--url", required=True, help="Where the service listens: ws://… or wss://…")
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=("pcm_s16le/16000",),
    show_default=True,
    metavar="ENCODING/RATE",
    help="An audio format to test; may be repeated. The first is used in all checks.",
)
@click.option("--frame-ms", default="20", show_default=True, type=click.Choice(["10", "20", "40", "60", "100"]))
@click.option("--authorization", help="The bearer token that the service wants.")
@click.option("--calls", default=20, show_default=True, type=click.IntRange(1, 500), help="How many calls at the same time.")
@click.option("--idle", "idle_secs", default=3.0, show_default=True, help="Seconds in which a call says nothing.")
@click.option("--one-at-a-time", is_flag=True, help="One check after the other, for services that take few calls.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([check.name for check in CHECKS]),
    metavar="CHECK",
    help="Only this check; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per check (the default when piped).")
def examine(url: str, formats: tuple[str, ...], frame_ms: str, as_json: bool, **options: Any) -> None:
    """Is your service right? Plays the gateway to it and says what passed, what failed and what to change.

    Needs no gateway, no account and no phone; takes some ten seconds. What a service never does (speak, ask for checkpoints)
    is not applicable. Exits 0 if nothing failed, 1 if something did.

    \b
    telephony-gateway conformance --url ws://127.0.0.1:9000 --format mulaw/8000
    """
    logs.configure(level="error")
    try:
        _check(url)
        wanted = tuple(_media_format(text) for text in formats)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    as_json = as_json or not sys.stdout.isatty()
    report = asyncio.run(_examine(url, as_json, formats=wanted, frame_ms=int(frame_ms), **options))
    if as_json:
        for result in report.results:
            click.echo(msgspec.json.encode(result))
        summary = {"url": url, "mode": report.mode, "ok": report.ok}
        counts = {outcome.replace(" ", "_"): report.count(outcome) for outcome in get_args(Outcome)}
        click.echo(msgspec.json.encode(summary | counts))
    else:
        print_report(Console(highlight=False), report)
    sys.exit(0 if report.ok else 1)


async def _examine(url: str, quiet: bool, *, one_at_a_time: bool, **options: Any) -> Report:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("handshake", total=None)

        def advance(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=name)

        return await run_checks(url, progress=advance, at_once=1 if one_at_a_time else AT_ONCE, **options)


def _check(url: str) -> None:
    """Raises ValueError unless a service can be dialled by that."""
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"{url!r} is no URL of a service: write for instance ws://127.0.0.1:9000")


def _media_format(text: str) -> MediaFormat:
    """`pcm_s16le/16000` → a format. Raises ValueError."""
    encoding, _, rate = text.partition("/")
    try:
        return msgspec.convert({"encoding": encoding, "sample_rate": int(rate)}, MediaFormat)
    except (ValueError, msgspec.ValidationError):
        known = ", ".join(Encoding)
        raise ValueError(f"{text!r} is no format: write for instance mulaw/8000 (encodings: {known}; 8000 to 48000 Hz)") from None
