"""`telephony-gateway chaos`. Exit codes: 0 told to end, 1 nothing to listen on, 2 usage."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import yaml

from gateway.chaos import Chaos
from gateway.chaos.plan import Faults, Plan, Step
from gateway.settings import host_port

_POWERS = {"k": 1e3, "M": 1e6, "G": 1e9}


def _share(_context: click.Context, _option: click.Parameter, text: str) -> float:
    """`5%` or `0.05`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise click.BadParameter(f"{text!r} is no share: write for instance 5%")
    return share


def _rate(_context: click.Context, _option: click.Parameter, text: str) -> float:
    """`64k` is 64,000 bit/s."""
    try:
        rate = float(text.rstrip("kMG")) * _POWERS.get(text[-1:], 1)
    except ValueError:
        rate = -1.0
    if rate < 0:
        raise click.BadParameter(f"{text!r} is no rate: write for instance 64k, in bit/s")
    return rate


def _place(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, int]:
    try:
        return host_port(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no address: write for instance 127.0.0.1:9000") from None


@click.command("chaos")
@click.option("--listen", required=True, callback=_place, metavar="HOST:PORT", help="Where to be dialled.")
@click.option("--to", required=True, callback=_place, metavar="HOST:PORT", help="Whom to dial for it.")
@click.option(
    "--direction", default="both", show_default=True, type=click.Choice(["both", "up", "down"]), help="Where: up is to --to."
)
@click.option("--latency", "latency_ms", default=0.0, help="Milliseconds.")
@click.option("--jitter", "jitter_ms", default=0.0, help="Milliseconds more or less, at random; the order is kept.")
@click.option("--rate", default="0", callback=_rate, help="Bit/s, for instance 64k. Default: no limit.")
@click.option("--slice", default=0, help="Bytes in one write; 1 for the worst.")
@click.option("--stall-after", type=float, help="Seconds until nothing is read any more.")
@click.option("--stall-for", type=float, help="Seconds of that. Default: for good.")
@click.option("--half-open-after", type=float, help="Seconds until everything vanishes, and nobody is told.")
@click.option("--reset-after", default=0, metavar="BYTES", help="RST to both ends after so many bytes in one direction.")
@click.option("--drop", default="0", callback=_share, help="Share of WebSocket messages, for instance 5%.")
@click.option("--duplicate", default="0", callback=_share, help="Likewise.")
@click.option("--reorder", default="0", callback=_share, help="Likewise: they come one to three messages later.")
@click.option("--corrupt", default="0", callback=_share, help="Likewise: one byte is changed; text stays text.")
@click.option("--match", default="", metavar="TEXT", help="Only messages that contain this.")
@click.option("--seed", default=0, help="The same seed, the same accidents.")
@click.option("--script", type=click.Path(path_type=Path), help="YAML or JSON: a list of steps, timed from a connection's begin.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines of what it did (the default when piped).")
def chaos(
    listen: tuple[str, int],
    to: tuple[str, int],
    direction: str,
    stall_after: float | None,
    stall_for: float | None,
    half_open_after: float | None,
    reset_after: int,
    seed: int,
    script: Path | None,
    as_json: bool,
    **faults: Any,
) -> None:
    """Be the worst network there is, between a gateway and a service or a carrier: for tests of your own.

    A TCP proxy: late, slow, cut off, in crumbs; and of WebSocket messages some are lost, doubled, out of order or damaged.
    A step of a script is one of at, up, down (faults from then on), do (stall, resume, half_open, reset), direction.

    \b
    telephony-gateway chaos --listen 127.0.0.1:9001 --to 127.0.0.1:9000 --latency 50 --jitter 20 --drop 5%
    echo '[{at: 5, do: stall, direction: up}, {at: 8, do: resume}, {at: 9, down: {rate: 64000}}]' > script.yaml
    """
    try:
        found = Faults(**faults)
        steps = yaml.safe_load(script.read_text()) if script is not None else []
        plan = Plan.read(
            steps,
            up=found if direction != "down" else Faults(),
            down=found if direction != "up" else Faults(),
            reset_after=reset_after,
            seed=seed,
        )
    except OSError as error:
        raise click.UsageError(f"{script}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise click.UsageError(f"{script or 'options'}: {error}") from error
    more = []
    where = direction if direction in ("up", "down") else None
    if stall_after is not None:
        more.append(Step(stall_after, do="stall", direction=where))  # type: ignore[arg-type]
        if stall_for is not None:
            more.append(Step(stall_after + stall_for, do="resume", direction=where))  # type: ignore[arg-type]
    if half_open_after is not None:
        more.append(Step(half_open_after, do="half_open"))
    plan = msgspec.structs.replace(plan, steps=tuple(sorted((*plan.steps, *more), key=lambda step: step.at)))
    as_json = as_json or not sys.stdout.isatty()
    try:
        asyncio.run(_serve(plan, listen, to, as_json))
    except OSError as error:
        raise click.ClickException(f"can't listen on {listen[0]}:{listen[1]}: {error.strerror or error}") from error


async def _serve(plan: Plan, listen: tuple[str, int], to: tuple[str, int], as_json: bool) -> None:
    def tell(what: dict[str, Any]) -> None:
        if as_json:
            click.echo(msgspec.json.encode(what))
        else:
            more = " ".join(f"{name}={value}" for name, value in what.items() if name not in ("at", "connection", "did"))
            click.echo(f"{what['at']:9.3f} s  connection {what['connection']}  {what['did']} {more}".rstrip())

    proxy = Chaos(plan, *to, tell=tell)
    port = await proxy.start(*listen)
    tell({"at": 0.0, "connection": 0, "did": "listening", "address": f"{listen[0]}:{port}", "to": f"{to[0]}:{to[1]}"})
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await proxy.stop()
    tell({"at": 0.0, "connection": 0, "did": "summary", "counts": dict(proxy.counts)})
