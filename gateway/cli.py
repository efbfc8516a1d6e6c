"""The command line: `telephony-gateway`. Exit codes: 0 well, 1 a call went wrong, 2 usage, 78 the configuration is wrong."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import msgspec
import structlog

import providers
from gateway import __version__, config, logs
from gateway.errors import ConfigError
from gateway.events import COMMAND_NAMES, Message
from gateway.provider import Provider
from gateway.server import Server
from gateway.settings import Settings

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="telephony-gateway")
def main() -> None:
    """Carries phone calls between carriers' WebSockets (Twilio, Plivo) and your voice services.

    First time here?  `telephony-gateway demo` places a simulated call on every carrier through a real gateway, with no account
    and no phone.
    """


@main.command()
@click.option("--config", "-c", "path", required=True, type=click.Path(path_type=Path), help="The YAML configuration.")
def serve(path: Path) -> None:
    """Run the gateway until SIGTERM or Ctrl-C.

    \b
    Try it without an account:  telephony-gateway serve --config config/gateway.dev.yaml
    """
    settings = _settings(path)
    logs.configure(level=settings.log_level)
    sys.exit(run(_serve(settings)))


@main.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
def check(path: Path) -> None:
    """Check a configuration: every error with file:line:column and what to write instead.

    Exits 0 if the gateway would start with it, 78 if not.
    """
    settings = _settings(path)
    click.echo(
        f"{path}: good: {_plural(len(settings.providers), 'provider')}, {_plural(len(settings.services), 'service')}, "
        f"{_plural(len(settings.routes), 'route')}"
    )


@main.command("providers")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table (the default when piped).")
def list_providers(as_json: bool) -> None:
    """What each carrier protocol can do: the feature matrix."""
    kinds = {kind: providers.load(kind) for kind in providers.names()}
    if as_json or not sys.stdout.isatty():
        rows = {kind: {"title": cls.title, "tells": _words(cls.emits), "accepts": _accepted(cls)} for kind, cls in kinds.items()}
        click.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
    else:
        click.echo(feature_matrix())


def feature_matrix() -> str:
    """The feature matrix as a Markdown table: what each wire can tell (↑) and carry out (↓). Quoted in the README."""
    kinds = {kind: providers.load(kind) for kind in providers.names()}
    up = {kind: set(_words(cls.emits)) for kind, cls in kinds.items()}
    down = {kind: set(_accepted(cls)) for kind, cls in kinds.items()}
    words = [word for word in _all_words() if any(word in up[kind] or word in down[kind] for kind in kinds)]
    rows = [["", *(f"`{kind}`" for kind in kinds)], ["---", *(":---:" for _ in kinds)]]
    for word in words:
        rows.append([word, *(("↑" * (word in up[kind]) + "↓" * (word in down[kind])) or "–" for kind in kinds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(main_coroutine: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop where there is one: a fifth less CPU per frame."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main_coroutine)


def make_server(settings: Settings) -> Server:
    """A server with its providers loaded."""
    return Server(
        settings, {name: providers.load(entry.kind)(entry.config) for name, entry in settings.providers.items()}
    )


async def _serve(settings: Settings) -> int:
    server = make_server(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await server.start()
    except OSError as error:
        click.echo(f"can't listen on {settings.listen}: {error.strerror or error}", err=True)
        return 1
    await stop.wait()
    structlog.get_logger("gateway").info("stopping", live_streams=len(server.streams))
    await server.stop()
    return 0


def _settings(path: Path) -> Settings:
    try:
        return config.load(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_CONFIG)


def _all_words() -> list[str]:
    return [
        "start", "audio", "dtmf", "checkpoint", "clear", "stop", "transcript", "barge_in", "speech", "spoken", "say", "play",
        "language", "fault",
    ]  # fmt: skip


def _words(kinds: frozenset[type[Message]]) -> list[str]:
    names = {"BargeIn": "barge_in"}
    words = {names.get(kind.__name__, kind.__name__.lower()) for kind in kinds}
    return [word for word in _all_words() if word in words]


def _accepted(provider: type[Provider]) -> list[str]:
    words = {COMMAND_NAMES[kind] for kind in provider(msgspec.convert({"auth": "none"}, provider.Config)).codec().accepts}
    return [word for word in _all_words() if word in words]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
