"""The results of an examination as a person reads them."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.conformance.checks import GROUPS, Outcome, Report

_LOOKS: dict[Outcome, str] = {
    "passed": "[green]passed[/]",
    "failed": "[bold red]failed[/]",
    "not applicable": "[dim]n/a[/]",
}


def print_report(console: Console, report: Report) -> None:
    """One row for each check; under what failed, what was seen and what to change."""
    table = Table(box=SIMPLE, header_style="bold", title=f"{escape(report.url)} ({report.mode or 'no connection'})")
    for column in ("check", "the service …", "", "what was seen, what to change"):
        table.add_column(column, overflow="fold")
    group = ""
    for result in report.results:
        if GROUPS[result.check] != group:
            group = GROUPS[result.check]
            table.add_row(f"[bold]{group}[/]")
        detail = f"[dim]{escape(result.detail)}[/]"
        if result.outcome == "failed":
            detail = f"{escape(result.detail[:1].upper() + result.detail[1:])}.\n→ {escape(result.advice)}"
        table.add_row(result.check, escape(result.title), _LOOKS[result.outcome], detail)
    console.print(table)
    failed = report.count("failed")
    told = f"{report.count('passed')} passed, {failed} failed, {report.count('not applicable')} not applicable."
    console.print(told, style="red" if failed else "green")
