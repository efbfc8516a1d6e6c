"""Calls against CPU and added latency, as a PNG. matplotlib draws it and is optional."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from gateway.bench import MOST_CPU, MOST_P99_MS
from gateway.bench.runner import Summary
from gateway.errors import GatewayError
from gateway.report import INSTALL

INK, FAINT = "#1f2933", "#9aa5b1"
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#c53030", "#718096")


class PictureError(GatewayError):
    """No picture. `str(error)` says why and what to do."""


def check() -> None:
    """Raises PictureError where nothing can be drawn; better before an hour of measuring than after it."""
    if find_spec("matplotlib") is None:
        raise PictureError(f"the picture is drawn by matplotlib, which is not installed: {INSTALL}")


def draw(rows: Sequence[Summary], machine: str, output: Path) -> None:
    """Write the picture. Raises PictureError."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  optional, and slow to load
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 7.5), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for colour, name in zip(COLOURS * len(rows), dict.fromkeys(row.subject for row in rows), strict=False):
        line = sorted((row for row in rows if row.subject == name), key=lambda row: row.calls)
        calls = [row.calls for row in line]
        above.plot(calls, [row.cpu * 100 for row in line], marker="o", color=colour, label=name)
        for direction, style in (("up", "-"), ("down", "--")):
            found = [(row.calls, spread["p99"]) for row in line if (spread := getattr(row, direction)) is not None]
            if found:
                below.plot(*zip(*found, strict=True), style, marker="o", color=colour, label=f"{name}, {direction}")
    above.axhline(MOST_CPU * 100, color=FAINT, linewidth=0.8, linestyle=":")
    below.axhline(MOST_P99_MS, color=FAINT, linewidth=0.8, linestyle=":")
    above.set(ylabel="CPU, % of one core", ylim=(0, None), xlim=(0, None))
    below.set(xlabel="calls at the same time", ylabel="added latency, p99, ms", yscale="log")
    for axes in (above, below):
        axes.grid(visible=True, color="#e4e7eb", linewidth=0.6)
        axes.tick_params(colors=INK, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8.5, frameon=False)
    figure.suptitle(machine, fontsize=9, color=INK)
    try:
        figure.savefig(output)
    except (OSError, ValueError) as error:
        raise PictureError(f"can't write to {output}: {error}") from error
