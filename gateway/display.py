"""What the command line shows a person: the demo's timeline and table, the report of simulated calls."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.callreport import CallReport, Refusal
from gateway.ear import Cut
from gateway.events import COMMAND_NAMES, Audio, Command, Event, Message, Outcome
from gateway.media import MediaFormat

SILENT_FIELDS = ("ref", "account", "accepts", "parameters", "tracks", "account_id", "stream_id", "call_id", "after", "language")

MOST_IN_FULL = 3
"""Calls whose figures are printed in full."""


class DemoCall(Struct):
    """One call of the demo: the carrier's report, what the service was told of checkpoints, and why it did not go well."""

    name: str
    report: CallReport
    outcomes: dict[Outcome, int]
    failures: list[str]


def refused(refusal: Refusal) -> str:
    """The sentence for a frame that a real carrier would not have taken."""
    return f"a real carrier would have refused ({refusal.count} times): {refusal.message}"


def describe(message: Event | Command) -> str:
    """One line for a person: the message's word and its fields that say something."""
    if isinstance(message, Audio):
        return f"audio  first sound, {len(message.payload)} bytes"
    fields = []
    for key in message.__struct_fields__:
        value = getattr(message, key)
        if key not in SILENT_FIELDS and value not in (None, "", (), 0, False, {}):
            fields.append(f"{key}={value if isinstance(value, int | float | str | MediaFormat) else msgspec.to_builtins(value)}")
    return f"{_word(message)}  {' '.join(fields)}".rstrip()


def _word(message: Message) -> str:
    names = {"BargeIn": "barge_in"}
    return COMMAND_NAMES.get(type(message)) or names.get(type(message).__name__) or type(message).__name__.lower()


def print_line(console: Console, at: float, name: str, direction: str, message: Event | Command) -> None:
    """One line of the live timeline."""
    arrow, style = ("▲", "cyan") if direction == "up" else ("▼", "green")
    line = Text.assemble((f"{at:7.3f}s ", "dim"), (f"{name:<20}", "bold"), (f"{arrow} ", style), describe(message))
    console.print(line, overflow="ellipsis", no_wrap=True)


def print_table(console: Console, calls: list[DemoCall], directory: Path) -> None:
    """How it went, one row per provider."""
    grid = Table(title="one call on each carrier, echoed", title_style="bold", header_style="bold", box=SIMPLE)
    for column in ("provider", "frames in/out", "latency p50/p99", "checkpoints", "the caller heard", ""):
        grid.add_column(column, justify="right" if "/" in column else "left")
    for call in calls:
        report = call.report
        latency = "–"
        if report.latency_p50_ms is not None and report.latency_p99_ms is not None:
            latency = f"{report.latency_p50_ms:.1f} / {report.latency_p99_ms:.1f} ms"
        checkpoints = ", ".join(f"{count} {outcome}" for outcome, count in call.outcomes.items()) or "–"
        heard = f"{report.heard_ms / 1000:.1f} s of sound" if report.heard_ms else f"“{report.spoken.strip()}”"
        # The carrier's frames out are the gateway's frames in.
        frames = f"{report.frames_out} / {report.frames_in}"
        grid.add_row(call.name, frames, latency, checkpoints, heard, "[red]failed" if call.failures else "[green]well")
    console.print(grid)
    console.print(f"Latency is the round trip of a 20 ms chunk through the gateway. What was heard is in {directory}/*.wav.")


def print_finding(console: Console, level: str, style: str, check: str, text: str, fix: str) -> None:
    """One of the doctor's findings, and below it the sentence that mends it."""
    console.print(Text.assemble((f"{level:<8}", style), (f"{check}: ", "bold"), text))
    if fix:
        console.print(Text(f"        {fix}", "bold"))


def print_reports(console: Console, reports: list[CallReport], save: Path | None) -> None:
    """How simulated calls went: figures in full for one call, a line each for several, and everything that was wrong."""
    for report in reports:
        latency = "not an echo"
        if report.latency_p50_ms is not None and report.latency_p99_ms is not None:
            latency = f"p50 {report.latency_p50_ms:.1f} ms, p99 {report.latency_p99_ms:.1f} ms"
        heard = f"{report.heard_ms / 1000:.2f} s" if not report.spoken else f"“{report.spoken.strip()}”"
        rows = [
            ("frames to / from the gateway", f"{report.frames_out} / {report.frames_in}"),
            ("the caller heard", heard),
            ("round trip of a 20 ms chunk", latency),
            ("most audio held by the carrier", f"{report.max_buffered_ms:.0f} ms"),
            ("underruns", str(report.underruns)),
            ("checkpoints", ", ".join(f"{mark.outcome} after {mark.played_ms} ms" for mark in report.checkpoints) or "none"),
            ("clears", ", ".join(_cut(cut) for cut in report.clears) or "none"),
            ("keys pressed / heard", f"{report.dtmf_sent or '–'} / {report.dtmf_heard or '–'}"),
            *(("a stream again after", f"{gap} ms") for gap in report.gaps_ms),
            ("ended by", f"{report.ended_by} (close code {report.close_code})"),
            *((("then told", report.ended_with),) if report.ended_with is not None else ()),
        ]
        console.print(Text(f"call {report.call_id}", style="bold"))
        if len(reports) <= MOST_IN_FULL:
            for name, value in rows:
                console.print(Text.assemble((f"  {name:<32}", "dim"), value))
        for sentence in (*report.errors, *(refused(refusal) for refusal in report.refusals)):
            console.print(Text(f"  {sentence}", style="red"))
        for sentence in report.remarks:
            console.print(Text(f"  {sentence}", style="yellow"))
    well = sum(report.ok for report in reports)
    console.print(f"{well} of {len(reports)} calls went well.", style="green" if well == len(reports) else "red")
    if save is not None and any(report.recording is not None for report in reports):
        console.print(f"What was heard is in {save}{' (numbered)' if len(reports) > 1 else ''}.")


def _cut(cut: Cut) -> str:
    silence = "" if cut.since_barge_in_ms is None else f", silent {cut.since_barge_in_ms:.0f} ms after the caller spoke"
    return f"heard {cut.played_ms} ms, cut {cut.cleared_ms} ms{silence}"
