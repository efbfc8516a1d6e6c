"""`telephony-gateway bench`. Exit codes: 0 measured, 1 some figure is not valid, 2 usage, 130 interrupted."""

from __future__ import annotations

import platform
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import providers
from gateway.media import Encoding, MediaFormat

if TYPE_CHECKING:  # all else is loaded when something is measured
    from gateway.bench import Round
    from gateway.bench.runner import Summary


def _calls(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        calls = tuple(int(each) for each in text.split(","))
    except ValueError:
        calls = ()
    if not calls or min(calls) < 1 or max(calls) > 5000:
        raise click.BadParameter("write numbers from 1 to 5000, for instance 100 or 10,50,100")
    return calls


def _kind(_context: click.Context, _option: click.Parameter, text: str) -> str:
    spoken = [kind for kind in providers.names() if not providers.load(kind).carrier().habits.text]
    found = [kind for kind in spoken if kind.startswith(text)]
    if not found:
        raise click.BadParameter(f"write one of {', '.join(spoken)}, or how it begins")
    return found[0]


def _format(_context: click.Context, _option: click.Parameter, text: str) -> MediaFormat:
    encoding, _, rate = text.partition("/")
    try:
        return msgspec.convert({"encoding": encoding, "sample_rate": int(rate)}, MediaFormat)
    except (ValueError, msgspec.ValidationError):
        known = ", ".join(Encoding)
        raise click.BadParameter(f"write for instance mulaw/8000 (encodings: {known}; 8000 to 48000 Hz)") from None


def _drawable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Say it before the first round that there will be no picture, not after the last."""
    if path is not None:
        from gateway.bench import picture  # noqa: PLC0415

        try:
            picture.check()
        except picture.PictureError as error:
            raise click.BadParameter(str(error)) from error
        if not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is no directory")
    return path


@click.command("bench")
@click.option("--calls", default="100", show_default=True, callback=_calls, help="How many at the same time; several: 10,50,100.")
@click.option("--find", "finds", is_flag=True, help="Search the most calls with p99 <= 20 ms and CPU <= 90 %.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100), help="A fresh gateway for each.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(1, 3600), help="Measured in each round.")
@click.option("--warm-up", "warm_up_secs", default=3.0, show_default=True, type=click.FloatRange(0, 600), help="Before that.")
@click.option("--ramp", "ramp_per_sec", default=100.0, show_default=True, type=click.FloatRange(1, 1000), help="Calls a second.")
@click.option("--provider", "kind", default="twilio", show_default=True, callback=_kind, help="The carriers' protocol.")
@click.option("--carrier-format", default="mulaw/8000", show_default=True, callback=_format, help="What carriers send and take.")
@click.option("--format", "service_format", default="pcm_s16le/16000", show_default=True, callback=_format, help="The service's.")
@click.option("--framed", is_flag=True, help="Services that number and acknowledge their audio.")
@click.option(
    "--frame-ms", default="20", show_default=True, type=click.Choice(["20", "40", "60", "100"]), help="In a message up."
)
@click.option("--listeners", default=0, show_default=True, type=click.IntRange(0, 10), help="More services that hear each call.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes of the gateway.")
@click.option("--idle-routes", default=0, type=click.IntRange(0, 100_000), help="Routes before the one that is taken.")
@click.option("--idle-services", default=0, type=click.IntRange(0, 1000), help="Services that no call comes to.")
@click.option("--plot", type=click.Path(path_type=Path), callback=_drawable, help="Draw calls against CPU and p99 into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per round, and the summary (the default when piped).")
def bench(
    calls: tuple[int, ...],
    finds: bool,
    rounds: int,
    frame_ms: str,
    seconds: float,
    warm_up_secs: float,
    ramp_per_sec: float,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How many calls does a core of this machine carry? Loads a gateway of its own on loopback, with nothing turned off.

    A second process plays the carriers and the service: 20 ms frames of real speech both ways, each end at a time of its own.
    It reports what it needed itself, and says when a figure is not to be believed, for instance because others used the
    machine. Latency is what the gateway adds to a frame between its two sockets; the delay of sample-rate filters, which is in
    the audio, is told apart. Exits 0 if all figures are valid, 1 if not.

    \b
    telephony-gateway bench --calls 10,50,100,200 --plot cost.png
    telephony-gateway bench --find --format mulaw/8000
    """
    if not hasattr(select, "epoll"):
        raise click.ClickException("the load generator needs Linux")
    from gateway.bench import picture, runner, subject  # noqa: PLC0415

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us, ends what we have started
    timing = runner.Timing(seconds=seconds, warm_up_secs=warm_up_secs, ramp_per_sec=ramp_per_sec)
    measured = subject.Gateway(frame_ms=int(frame_ms), **options)
    as_json = as_json or not sys.stdout.isatty()
    done: list[Round] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    stderr = Console(stderr=True)
    try:
        with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True, refresh_per_second=2) as progress:
            task = progress.add_task("")

            def tell(what: str) -> None:
                progress.update(task, description=escape(what))

            def take(result: Round) -> None:
                done.append(result)
                if as_json:
                    click.echo(msgspec.json.encode({"round": result, **told(result)}))

            if finds:
                for result in runner.find(measured, timing, tell, first=calls[0]):
                    take(result)
                carried = max((each.calls for each in done if each.carried_well), default=0)
                calls = (carried,) if carried else ()
            for result in runner.measure([measured], calls, rounds - 1 if finds else rounds, timing, tell):
                take(result)
    except subject.BenchError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted: what follows is of the rounds until then", err=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    rows = runner.table(done)
    if as_json:
        click.echo(msgspec.json.encode({"machine": machine(), "summary": rows}))
    elif rows:
        print_table(Console(highlight=False), rows)
    if finds and not as_json:
        found = f"{calls[0]} calls" if calls else "no number of calls"
        click.echo(f"{found}: the most that was carried with p99 <= 20 ms and CPU <= 90 %")
    if plot is not None and rows:
        try:
            picture.draw(rows, machine(), plot)
        except picture.PictureError as error:
            raise click.ClickException(str(error)) from error
    sys.exit(0 if rows and all(row.valid_rounds for row in rows) else 1)


def told(result: Round) -> dict[str, object]:
    """What follows from a round's figures."""
    return {"cpu": result.cpu, "frame_us": result.frame_us, "call_kib": result.call_bytes / 1024, "valid": result.valid}


def machine() -> str:
    """What figures hold for."""
    from gateway.bench.host import cores  # noqa: PLC0415

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {cores()} cores, CPython {platform.python_version()}"


def print_table(console: Console, rows: list[Summary]) -> None:
    """Medians, and below them why some of them are doubtful."""
    grid = Table(box=SIMPLE, header_style="bold", title=escape(machine()))
    several = len({row.subject for row in rows}) > 1
    spread = "p50 p90 p99 p99.9 max"
    titles = ("calls", "CPU", "µs/frame", f"up, ms:\n{spread}", f"down, ms:\n{spread}", "holes", "KiB/call", "valid")
    for title in ("", *titles) if several else titles:
        grid.add_column(title, justify="left" if not title else "right")
    for row in rows:
        cells = (
            str(row.calls),
            f"{row.cpu:.0%}",
            f"{row.frame_us:.1f}",
            _spread(row.up),
            _spread(row.down),
            "–" if row.underruns is None else str(row.underruns),
            f"{row.call_kib:.0f}",
            f"{row.valid_rounds} of {row.rounds}",
        )
        grid.add_row(*((escape(row.subject), *cells) if several else cells))
    console.print(grid)
    most, late = max(row.generator_cpu for row in rows), max(row.generator_late_p99_ms for row in rows)
    console.print(
        "CPU: of one core, with the kernel's share. Frame: 20 ms of one call in one direction. Latency: added from socket to "
        "socket; the filters' delay within the audio is on top. Holes: in playout. "
        f"The generator used {most:.0%} of a core at most, and was late by {late:.1f} ms (p99).",
        style="dim",
    )
    for row in rows:
        if row.sound_up_delay_ms is not None and row.sound_down_delay_ms is not None:
            delays = f"{row.sound_up_delay_ms:g} ms up, {row.sound_down_delay_ms:g} ms down"
            console.print(f"{row.subject}, {row.calls} calls: filters, {delays}; likeness {row.correlation:.3f}", style="dim")
        for why in row.trouble:
            console.print(escape(f"{row.subject}, {row.calls} calls: {why}"), style="yellow")


def _spread(spread: dict[str, float] | None) -> str:
    return " ".join(f"{spread[name]:.1f}" for name in ("p50", "p90", "p99", "p999", "max")) if spread else "–"
