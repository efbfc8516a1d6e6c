"""The command line: `telephony-gateway`. Exit codes: 0 well, 1 something is wrong, 2 usage, 78 the configuration is wrong."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

import click
import msgspec
import structlog
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import providers
from gateway import (
    __version__,
    capture,
    config,
    display,
    doctor,
    garbage,
    host,
    logs,
    replay,
    report,
    schema,
    signing,
    simulator,
    specification,
    speech,
    tls,
    wav,
)
from gateway import demo as demonstration
from gateway.bench.command import bench
from gateway.callreport import CallReport
from gateway.chaos.command import chaos
from gateway.conformance.command import examine
from gateway.errors import ConfigError
from gateway.events import COMMAND_NAMES, Command, Event, Message
from gateway.front import Front
from gateway.host import run
from gateway.provider import Provider, SignedRequest
from gateway.reload import Reload, load_providers
from gateway.server import Server
from gateway.settings import Settings, host_port
from gateway.supervisor import STOP_SECS, NotStarted, Supervisor
from gateway.systemd import Systemd


class _Seconds(click.FloatRange):
    """From 0 to an hour; nothing compares with nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if seconds != seconds:  # nan
            self.fail(f"{value} is no time", param, ctx)
        return seconds


SECONDS = _Seconds(0, 3600)

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
@click.option("--workers", type=click.IntRange(1, 64), help="Processes that take calls. Default: one per processor.")
def serve(path: Path, workers: int | None) -> None:
    """Run the gateway until SIGTERM or Ctrl-C. SIGHUP reads FILE again, for new calls; one with mistakes is refused.

    Told to end, it takes no new calls and waits for those that there are, for `drain_secs`. Told twice, it ends at once.

    Several workers have a supervisor, which replaces one that dies; on SIGUSR2 it replaces them all, one by one, without losing a
    call. With one worker there is this process alone.

    \b
    Try it without an account:  telephony-gateway serve --config config/gateway.dev.yaml
    """
    try:
        text = config.read_file(path)
        settings, warnings = config.examine_text(text, source=str(path))
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_CONFIG)
    logs.configure(level=settings.log_level)
    for warning in warnings:
        structlog.get_logger("gateway").warning("configuration_doubtful", problem=warning)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # it would hold every secret
    several = sys.platform == "linux"
    if workers is not None and workers > 1 and not several:
        raise click.UsageError("several workers need Linux")
    workers = workers or (host.cores() if several else 1)
    sys.exit(run(_supervise(settings, text, path, workers) if workers > 1 else _serve(settings, path)))


@main.command()
@click.argument("path", metavar="FILE", required=False, type=click.Path(path_type=Path))
@click.option("--config", "-c", "named", type=click.Path(path_type=Path), help="FILE, as other commands have it.")
@click.option("--strict", is_flag=True, help="Exit with 78 on warnings too.")
def check(path: Path | None, named: Path | None, strict: bool) -> None:
    """Check a configuration: every error with file:line:column and what to write instead.

    Exits 0 if the gateway would start with it, 78 if not. A file without errors may have warnings: what works and is probably
    not meant, such as a route that no call can reach.
    """
    if path is not None and named is not None:
        raise click.UsageError("one file at a time: FILE, or --config FILE")
    path = path or named
    if path is None:
        raise click.UsageError("which file? For instance: telephony-gateway check gateway.yaml")
    settings, warnings = _examined(path)
    if settings.tls is not None:
        try:
            tls.load(settings.tls)
        except ConfigError as error:
            click.echo(f"{path}: {error}", err=True)
            sys.exit(EXIT_CONFIG)
    for warning in warnings:
        click.echo(warning, err=True)
    if warnings and strict:
        sys.exit(EXIT_CONFIG)
    doubts = f", with {_plural(len(warnings), 'warning')}" if warnings else ""
    click.echo(
        f"{path}: good: {_plural(len(settings.providers), 'provider')}, {_plural(len(settings.services), 'service')}, "
        f"{_plural(len(settings.routes), 'route')}{doubts}"
    )


@main.command("schema")
def print_schema() -> None:
    """The JSON Schema of the configuration, for completion and checks in an editor.

    \b
    telephony-gateway schema > gateway.schema.json
    and as the first line of gateway.yaml:  # yaml-language-server: $schema=gateway.schema.json
    """
    click.echo(schema.text(), nl=False)


@main.command()
@click.option("--output", "-o", "directory", default="demo-out", type=click.Path(path_type=Path), help="Where the WAV files go.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of a timeline (the default when piped).")
def demo(directory: Path, as_json: bool) -> None:
    """Hear a call pass through a gateway: no account, no phone, no second process.

    Starts a gateway with the echo service on a free loopback port and places a simulated call on each carrier. Shows the
    normalized events as they happen (up: from the call, down: to the caller) and writes what each caller heard as a WAV file.
    Exits 0 only if all is well.
    """
    logs.configure(level="error")
    as_json = as_json or not sys.stdout.isatty()
    console = Console(highlight=False)

    def tell(at: float, name: str, direction: str, message: Event | Command) -> None:
        if as_json:
            what = {"at": round(at, 3), "provider": name, "direction": direction, "message": display.describe(message)}
            click.echo(msgspec.json.encode(what))
        else:
            display.print_line(console, at, name, direction, message)

    calls = run(demonstration.run(tell))
    try:
        demonstration.save(calls, directory)
    except (wav.WavError, OSError) as error:
        raise click.ClickException(f"can't write to {directory}: {error}; choose another place with --output") from error
    well = not any(call.failures for call in calls)
    if as_json:
        for call in calls:
            click.echo(msgspec.json.encode({"provider": call.name, "report": msgspec.Raw(call.report.to_json())}))
    else:
        display.print_table(console, calls, directory)
        if well:
            console.print("All well. Next: write a service of your own; the README shows one in ten lines.", style="green")
    for call in calls:
        for sentence in call.failures:
            click.echo(f"{call.name}: {sentence}", err=True)
    sys.exit(0 if well else 1)


def _keys(_context: click.Context, _option: click.Parameter, keys: str) -> str:
    if set(keys.upper()) - set("0123456789*#ABCD"):
        raise click.BadParameter("keys are 0-9, *, # and A-D")
    return keys.upper()


def _writable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Say it before the call that a recording can't be written, not after."""
    if path is not None and not os.access(path.parent, os.W_OK):
        raise click.BadParameter(f"{path.parent} is no directory that can be written to")
    return path


@main.command()
@click.argument("kind", required=False)
@click.option("--url", help="http(s)://…/NAME/answer (asks the webhook first, as a carrier does), or ws(s)://…/stream.")
@click.option("--config", "-c", "path", type=click.Path(path_type=Path), help="Sign as an account of this configuration does.")
@click.option("--provider", "name", help="Which account: a name under `providers:`. Then KIND and --url need not be given.")
@click.option("--audio", type=click.Path(path_type=Path), help="What the caller says: a WAV file. Default: the bundled clip.")
@click.option("--save", type=click.Path(path_type=Path), callback=_writable, help="Write what the caller heard to this WAV file.")
@click.option("--say", multiple=True, help="What the caller says to a carrier of text (ConversationRelay); may be repeated.")
@click.option("--dtmf", default="", callback=_keys, help="Keys to press, for instance 12#.")
@click.option("--calls", default=1, show_default=True, type=click.IntRange(1, 2000), help="How many calls at the same time.")
@click.option("--hold", "hold_secs", default=1.0, show_default=True, type=SECONDS, help="How long the caller stays at the end.")
@click.option("--barge-in", "barge_in_after_secs", type=SECONDS, help="Speak only after hearing the agent for so many seconds.")
@click.option(
    "--follow/--one-stream", default=True, show_default=True, help="When a stream ends, ask what comes next, as carriers do."
)
@click.option("--caller", default="+15550100001", show_default=True)
@click.option("--called", default="+15550100002", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per call (the default when piped).")
def simulate(
    kind: str | None,
    url: str | None,
    path: Path | None,
    name: str | None,
    audio: Path | None,
    save: Path | None,
    say: tuple[str, ...],
    calls: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Play a faithful carrier: place calls on a running gateway and report what the caller heard.

    KIND is a carrier protocol (see `telephony-gateway providers`). Says plainly what in the gateway's frames a real carrier
    would have refused. A gateway that checks signatures is called with --config and --provider: webhook and stream are signed
    over the public URL, and sent to --url. Exits 0 if every call went well, 1 if not.

    \b
    telephony-gateway simulate twilio_media_streams --url http://127.0.0.1:8080/twilio/answer --save heard.wav
    telephony-gateway simulate --config gateway.yaml --provider twilio
    """
    logs.configure(level="error")
    if path is not None:
        settings = _settings(path)
        name, url, options["sign"] = _signed(settings, name, kind, url)
        kind = settings.providers[name].kind
    elif name is not None:
        raise click.UsageError("--provider is a name in a configuration; give that with --config")
    if kind is None or url is None:
        raise click.UsageError("give KIND and --url, or --config and --provider")
    try:
        provider = providers.load(kind)
    except LookupError as error:
        raise click.UsageError(str(error)) from error
    try:
        clip = wav.read(audio) if audio is not None else speech.hello()
        reports = run(_simulate(provider, url, clip, calls, as_json, say=list(say) or [speech.HELLO_TEXT], **options))
        if save is not None:
            for number, report in enumerate(reports, 1):
                path = save if calls == 1 else save.with_stem(f"{save.stem}-{number}")
                if report.recording is not None and report.recording.heard:
                    wav.write(path, report.recording.heard, report.recording.sample_rate)
    except wav.WavError as error:
        raise click.ClickException(str(error)) from error
    if as_json or not sys.stdout.isatty():
        for report in reports:
            click.echo(report.to_json())
    else:
        display.print_reports(Console(highlight=False), reports, save)
    sys.exit(0 if all(report.ok for report in reports) else 1)


async def _simulate(
    provider: type[Provider], url: str, clip: wav.Wav, calls: int, quiet: bool, **options: Any
) -> list[CallReport]:
    def place(_: int) -> Coroutine[Any, Any, CallReport]:
        return simulator.simulate(provider, url=url, audio=clip.pcm, audio_format=clip.media_format, **options)

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    if quiet or not console.is_terminal:
        return await simulator.simulate_many(calls, place)
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("calls", total=calls)

        def advance(started: int, finished: int) -> None:
            progress.update(bar, completed=finished, description=f"{started - finished} on the line, {finished} of {calls} done")

        return await simulator.simulate_many(calls, place, on_progress=advance)


def _request_options(function: Callable[..., None]) -> Callable[..., None]:
    """What describes a carrier's request."""
    for option in reversed(
        (
            click.argument("url"),
            click.option(
                "--config", "-c", "path", required=True, type=click.Path(path_type=Path), help="The YAML configuration."
            ),
            click.option("--provider", "name", help="Whose request: a name under `providers:`. Not needed if there is one only."),
            click.option("--method", default=None, help="Default: POST with a body, else GET."),
            click.option("--form", "-F", multiple=True, metavar="NAME=VALUE", help="A field of the form; may be repeated."),
            click.option("--body", type=click.File("rb"), help="The raw body, in a file; - is stdin."),
            click.option("--header", "-H", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header; may be repeated."),
            click.option("--upgrade", is_flag=True, help="A WebSocket upgrade. Default for ws:// and wss://."),
            click.option("--json", "as_json", is_flag=True, help="JSON (the default when piped)."),
        )
    ):
        function = option(function)
    return function


@main.command()
@_request_options
def sign(as_json: bool, **options: Any) -> None:
    """Print the headers with which a carrier would sign a request: to try a gateway by hand, through its proxies.

    URL is what the carrier dials, or the path of it: /twilio/answer stands for public_url and that.

    \b
    telephony-gateway sign -c gateway.yaml --provider twilio /twilio/answer -F CallSid=CA1 -F From=+15550100001
    """
    _, provider, request = _described(**options)
    headers = provider.sign(request)
    if not headers:
        raise click.ClickException("this provider has `auth: none`: there is nothing to sign with")
    if as_json or not sys.stdout.isatty():
        click.echo(msgspec.json.encode(headers))
    else:
        for name, value in headers.items():
            click.echo(f"{name}: {value}")


@main.command()
@_request_options
def verify(as_json: bool, **options: Any) -> None:
    """Check a carrier's signature as the gateway does, and tell which form of the URL fits, or which were tried.

    Give the request as it reached the gateway: method, URL, form or body, and its signature headers with -H. Log lines named
    signature_refused tell `tried` in the same spelling. No secret is printed. Exits 0 if the signature is good, 1 if not.

    \b
    telephony-gateway verify -c gateway.yaml /twilio/answer -F CallSid=CA1 -H 'X-Twilio-Signature: …'
    """
    settings, provider, request = _described(**options)
    found = signing.explain(provider, request, settings.base_url())
    if as_json or not sys.stdout.isatty():
        click.echo(msgspec.json.encode(found))
    else:
        for sentence in found.sentences:
            click.echo(sentence)
    sys.exit(0 if found.good else 1)


@main.command("doctor")
@click.option("--config", "-c", "path", required=True, type=click.Path(path_type=Path), help="The YAML configuration.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per finding (the default when piped).")
def call_doctor(path: Path, as_json: bool) -> None:
    """Look at a running gateway as carriers see it, and tell what to mend.

    Asks from outside, through all proxies: name, port and certificate of the public URL; whether a gateway with our secret
    answers; whether signed webhooks and WebSockets pass and wrongly signed ones don't; the clock. And at home: secret,
    file descriptors, trusted proxies. Places no call: the stream is closed before it starts, and one slot per provider is kept
    for 15 seconds. Exits 0 if nothing is wrong (warnings are not), 1 if something is.
    """
    logs.configure(level="error")
    settings = _settings(path)
    as_json = as_json or not sys.stdout.isatty()
    console = Console(highlight=False)
    styles = {"ok": "green", "warning": "yellow", "error": "red"}

    async def consult() -> bool:
        well = True
        async for finding in doctor.examine(settings, {name: _account(settings, name)[1] for name in settings.providers}):
            well &= finding.level != "error"
            if as_json:
                click.echo(msgspec.json.encode(finding))
            else:
                display.print_finding(console, finding.level, styles[finding.level], finding.check, finding.text, finding.fix)
        return well

    sys.exit(0 if run(consult()) else 1)


@main.command("report")
@click.argument("recording", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where the picture goes. Default: beside it, as .png.")
def draw_report(recording: Path, output: Path | None) -> None:
    """Draw a recorded call: what was said, what was heard, and what happened when, as a PNG.

    RECORDING is a WAV file of the recorder service; its log of events is taken from beside it. Checkpoints are flags, clears are
    cuts, gaps are shaded, and keys have no digits. Needs matplotlib: pip install 'telephony-audio-gateway[report]'

    \b
    telephony-gateway report recordings/20261120T101500Z-5f2c….wav -o call.png
    """
    try:
        recorded = report.read(recording)
        target = output or recorded.path.with_name(recorded.path.name.removesuffix(".part")).with_suffix(".png")
        report.draw(recorded, target)
    except report.ReportError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{target}: {recorded.duration_secs:.1f} s, {_plural(len(recorded.events), 'line')} of log")


@main.command("replay")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--url", help="http(s)://…/NAME/answer (asks the webhook first), or ws(s)://…/stream; default that of --config.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Sign as an account of this configuration.")
@click.option("--provider", "name", metavar="NAME", help="Which of its providers; the one of the capture's kind.")
@click.option("--speed", default=1.0, show_default=True, type=click.FloatRange(0.05, 1000), help="How much faster than it was.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (the default when piped).")
def play_again(path: Path, url: str | None, config_path: Path | None, name: str | None, speed: float, as_json: bool) -> None:
    """Play a captured stream to a gateway as the carrier did, and compare what comes back.

    FILE is what a route with `capture: DIRECTORY` has stored. Kinds and their order count, not times, nor the pieces in which
    audio comes. Keys are replayed as 0, for their digits were not stored. Exits 0 if nothing differs, 1 if something does.

    \b
    telephony-gateway replay captures/20261120T….jsonl --url ws://127.0.0.1:8080/twilio/stream --speed 4
    telephony-gateway replay captures/20261120T….jsonl --config gateway.yaml --provider twilio
    """
    if config_path is None and (name is not None or url is None):
        raise click.UsageError("give --url, or --config and perhaps --provider")
    logs.configure(level="error")
    try:
        header, frames = capture.read(path)
        sign = None
        if config_path is not None:
            name, url, sign = _signed(_settings(config_path), name, header.kind, url)
        outcome = run(replay.replay(providers.load(header.kind), header, frames, url=url or "", speed=speed, sign=sign))
    except (capture.CaptureError, replay.ReplayError) as error:
        raise click.ClickException(str(error)) from error
    except LookupError as error:
        raise click.ClickException(f"{path}: {error}") from error
    difference = outcome.difference
    if as_json or not sys.stdout.isatty():
        click.echo(msgspec.json.encode({"same": not difference, "difference": difference, **msgspec.to_builtins(outcome)}))
    else:
        click.echo("\n".join(difference) or f"the same: {', '.join(outcome.got) or 'nothing'}")
        click.echo(f"audio: {outcome.expected_audio_ms / 1000:.1f} s then, {outcome.got_audio_ms / 1000:.1f} s now")
    sys.exit(1 if difference else 0)


@main.command("providers")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table (the default when piped).")
@click.option("--markdown", is_flag=True, help="The table as Markdown, also when piped.")
def list_providers(as_json: bool, markdown: bool) -> None:
    """What each carrier protocol can do: the feature matrix. ↑ the carrier tells it, ↓ a service can ask for it."""
    kinds = {kind: providers.load(kind) for kind in providers.names()}
    if as_json or not (markdown or sys.stdout.isatty()):
        rows = {kind: {"title": cls.title, "tells": _words(cls.emits), "accepts": _accepted(cls)} for kind, cls in kinds.items()}
        click.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
    else:
        click.echo(feature_matrix())


@main.command()
@click.option("--json-schema", is_flag=True, help="JSON Schemas of the text messages alone.")
def protocol(json_schema: bool) -> None:
    """The service protocol for machines: an AsyncAPI 3 document, in YAML.

    \b
    telephony-gateway protocol > asyncapi.yaml
    telephony-gateway protocol --json-schema > messages.json
    """
    if json_schema:
        click.echo(msgspec.json.format(msgspec.json.encode(specification.json_schema())))
    else:
        click.echo(asyncapi_yaml(), nl=False)


def asyncapi_yaml() -> str:
    """The text of gateway/asyncapi.yaml."""
    head = "# Generated by `telephony-gateway protocol` from the structs of gateway/services/native.py. Don't edit it.\n"
    return head + yaml.safe_dump(specification.asyncapi(), sort_keys=False, allow_unicode=True, width=120)


main.add_command(chaos)
main.add_command(examine)
main.add_command(bench)


def feature_matrix() -> str:
    """The feature matrix as a Markdown table: what each wire can tell (↑) and carry out (↓). Quoted in the README."""
    kinds = {kind: providers.load(kind) for kind in providers.names()}
    down = {kind: set(_accepted(cls)) for kind, cls in kinds.items()}
    # What a service sends down comes back up once it has happened, whatever the carrier itself tells of it.
    made_here = {"start", "stop", "checkpoint", "clear"}
    up = {kind: set(_words(cls.emits)) | ({"start", "stop"} | down[kind]) & made_here for kind, cls in kinds.items()}
    words = [word for word in _all_words() if any(word in up[kind] or word in down[kind] for kind in kinds)]
    rows = [["", *(f"`{kind}`" for kind in kinds)], ["---", *(":---:" for _ in kinds)]]
    for word in words:
        rows.append([word, *(("↑" * (word in up[kind]) + "↓" * (word in down[kind])) or "–" for kind in kinds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_server(settings: Settings) -> Server:
    """A server with its providers loaded."""
    return Server(settings, load_providers(settings), config.dialect)


async def _serve(settings: Settings, path: Path) -> int:
    host.raise_fd_limit(settings.max_calls, structlog.get_logger("gateway"))
    server = make_server(settings)
    reload, systemd = Reload(path, server), Systemd()
    stop, again = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    garbage.settle()  # most of what stays; nobody waits yet
    try:
        await server.start()
    except ConfigError as error:
        click.echo(str(error), err=True)
        return EXIT_CONFIG
    except OSError as error:
        click.echo(f"can't listen on {error.filename or settings.listen}: {error.strerror or error}", err=True)
        return 1
    server.hooks.reload, server.hooks.reloads = reload, reload.outcomes
    server.watchdog.start()
    async with asyncio.TaskGroup() as tasks:
        meanwhile = [
            tasks.create_task(_reload_when(again, reload)),
            tasks.create_task(systemd.watch(lambda: _plural(len(server.streams), "live call"))),
            tasks.create_task(garbage.tidy(lambda: len(server.streams))),
        ]
        garbage.settle()
        systemd.ready()
        await stop.wait()
        stop.clear()
        drain_secs = server.settings.drain_secs
        systemd.stopping(drain_secs + STOP_SECS)
        server.drain()
        finishing, impatience = tasks.create_task(server.finish(drain_secs)), tasks.create_task(stop.wait())
        await asyncio.wait([finishing, impatience], return_when=asyncio.FIRST_COMPLETED)
        for task in (*meanwhile, finishing, impatience):
            task.cancel()
    structlog.get_logger("gateway").info("stopping", live_streams=len(server.streams))
    await server.stop()
    return 0


async def _supervise(settings: Settings, text: str, path: Path, workers: int) -> int:
    host.raise_fd_limit(settings.max_calls, structlog.get_logger("gateway"))
    supervisor = Supervisor(path, text, settings, workers)

    async def open_front() -> Callable[[], Awaitable[None]]:
        front = Front(supervisor)
        if settings.admin is not None:
            try:
                await front.start()
            except OSError as error:
                raise NotStarted(1, f"can't listen on {error.filename}: {error.strerror or error}") from None
        return front.stop

    return await supervisor.run(open_front)


async def _reload_when(again: asyncio.Event, reload: Reload) -> None:
    """Forever: one reload for however many signals came while the last one was done."""
    while True:
        await again.wait()
        again.clear()
        with suppress(ConfigError):  # it is in the log
            await reload()


def _settings(path: Path) -> Settings:
    return _examined(path)[0]


def _examined(path: Path) -> tuple[Settings, list[str]]:
    """Settings and warnings; ends the process where there are none."""
    try:
        return config.examine(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_CONFIG)


def local_url(settings: Settings) -> str:
    """Where this machine reaches `listen`, whatever the public URL is."""
    host, port = host_port(settings.listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 — everywhere is also here
    return f"{'https' if settings.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _account(settings: Settings, name: str | None) -> tuple[str, Provider]:
    """The provider of this name, or the only one."""
    if name is None and len(settings.providers) == 1:
        (name,) = settings.providers
    entry = settings.providers.get(name or "")
    if name is None or entry is None:
        raise click.UsageError(f"--provider must be one of {', '.join(settings.providers)}")
    return name, providers.load(entry.kind)(entry.config)


def _signed(settings: Settings, name: str | None, kind: str | None, url: str | None) -> tuple[str, str, signing.Signing]:
    """Name, answer URL and signature of the account that a call comes from; of the only one of `kind` where no name is given."""
    fitting = [each for each, entry in settings.providers.items() if entry.kind == kind]
    name, account = _account(settings, fitting[0] if name is None and len(fitting) == 1 else name)
    if kind is not None and kind != settings.providers[name].kind:
        raise click.UsageError(f"provider {name} is {settings.providers[name].kind}, not {kind}")
    suffix = f"/{name}/answer"
    url = url or f"{settings.base_url() if settings.tls else local_url(settings)}{suffix}"
    if not url.endswith(suffix):
        raise click.UsageError(f"--url must end in {suffix}: the answer names the stream, and a token in it lets the call in")
    return name, url, signing.Signing(account, settings.base_url(), url.removesuffix(suffix))


def _described(
    url: str,
    path: Path,
    name: str | None,
    method: str | None,
    form: tuple[str, ...],
    body: IO[bytes] | None,
    headers: tuple[str, ...],
    upgrade: bool,
) -> tuple[Settings, Provider, SignedRequest]:
    """The request that options describe, as it would reach the gateway."""
    settings = _settings(path)
    _, provider = _account(settings, name)
    raw = (
        body.read()
        if body is not None
        else urlencode([(key, value) for key, _, value in (field.partition("=") for field in form)]).encode()
    )
    given = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in headers)}
    if upgrade or url.startswith(("ws:", "wss:")):
        given = signing.UPGRADE | given
    if url.startswith("/"):
        url = settings.base_url() + url
    if "://" not in url:
        raise click.UsageError(f"{url!r} is neither a URL nor a path: begin it with https://, wss:// or /")
    return settings, provider, SignedRequest.read((method or ("POST" if raw else "GET")).upper(), url, given, raw)


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
