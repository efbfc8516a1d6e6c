"""A picture of a recorded call: both waveforms, checkpoints as flags, clears as cuts, keys without their digits, gaps shaded.

matplotlib draws it and is optional; nothing else in this package needs it.
"""

from __future__ import annotations

import wave
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from gateway.errors import GatewayError

INSTALL = "pip install 'telephony-audio-gateway[report]'"

COLUMNS = 1500
"""Of a waveform: more than a picture has pixels across."""

BAND_SECS, MOST_BANDS = 60.0, 8
"""A longer call is drawn in bands below each other, at first of this length; there are never more of them, but longer ones."""

BAND_INCHES = 3.35
LEVELS = 3
"""Labels that would touch are put above each other."""

INK, FAINT, CALLER, HEARD = "#1f2933", "#9aa5b1", "#2b6cb0", "#2f855a"
OUTCOMES = {"played": "#2f855a", "cleared": "#c05621", "lost": "#718096"}
CUT, GAP, KEY, FAULT = "#c53030", "#f6ad55", "#6b46c1", "#c53030"


class ReportError(GatewayError):
    """No picture. `str(error)` says why and what to do."""


class Event(Struct):
    """One line of a recording's log."""

    type: str
    at_ms: int = 0
    name: str = ""
    outcome: str = ""
    digits: str = ""
    track: str = "inbound"
    lost_ms: int = 0
    played_ms: int = 0
    cleared_ms: int = 0
    code: str = ""
    caller: str = ""
    called: str = ""
    call_id: str = ""
    provider: str = ""
    kind: str = ""
    time: str = ""
    reason: str = ""


class Recorded(Struct):
    """A recording: samples of the caller, samples that the caller heard, and the log."""

    path: Path
    sample_rate: int
    left: NDArray[np.int16]
    right: NDArray[np.int16]
    events: list[Event]

    @property
    def duration_secs(self) -> float:
        return len(self.left) / self.sample_rate


def read(path: Path) -> Recorded:
    """A recording by the name of its WAV, or of its log. One that is still being written will do. Raises ReportError."""
    sound = path.with_suffix(".wav") if path.suffix == ".jsonl" else path
    if not sound.exists():
        sound = next((each for each in (Path(f"{sound}.part"), Path(f"{sound}.wav")) if each.exists()), sound)
    try:
        with sound.open("rb") as file, wave.open(file) as audio:
            if (audio.getnchannels(), audio.getsampwidth()) != (2, 2):
                raise ReportError(f"{sound} is not a recording of this gateway: those are 16-bit stereo WAV files")
            rate = audio.getframerate()
            frames = np.frombuffer(audio.readframes(audio.getnframes()), "<i2").reshape(-1, 2)
    except (wave.Error, EOFError, ValueError) as error:
        raise ReportError(f"{sound} is not a WAV file: {error}") from error
    except OSError as error:
        raise ReportError(f"{sound}: {error.strerror or error}; give the name of a recording's .wav file") from error
    log = sound.with_name(sound.name.removesuffix(".part")).with_suffix(".jsonl")
    return Recorded(sound, rate, frames[:, 0], frames[:, 1], [*_events(log)])


def _events(log: Path) -> Iterator[Event]:
    """What is readable of the log; the last line may be torn, and without any there is still the sound."""
    decoder = msgspec.json.Decoder(Event)
    try:
        lines = log.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError:
            continue


def bands(duration_secs: float) -> list[tuple[float, float]]:
    """The pieces, from and to in seconds, that are drawn below each other; all equally long."""
    count = min(MOST_BANDS, max(1, int(-(-duration_secs // BAND_SECS))))
    length = max(duration_secs, 0.5) / count
    return [(at * length, (at + 1) * length) for at in range(count)]


def envelope(samples: NDArray[np.int16], columns: int = COLUMNS) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """The lowest and the highest sample of each of so many pieces; fewer pieces if there are fewer samples."""
    if not len(samples):
        return samples, samples
    starts = np.unique(np.linspace(0, len(samples), min(columns, len(samples)), endpoint=False).astype(np.int64))
    return np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)


def stagger(places: Sequence[tuple[float, float]], levels: int = LEVELS) -> list[int]:
    """For labels (from, width), left to right, the lowest level that is free; the least crowded where none is."""
    ends = [float("-inf")] * levels
    chosen = []
    for begin, width in places:
        level = next((each for each, end in enumerate(ends) if end <= begin), ends.index(min(ends)))
        ends[level] = begin + width
        chosen.append(level)
    return chosen


def draw(recorded: Recorded, output: Path) -> None:
    """Write the picture. Raises ReportError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  optional, and slow to load
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ReportError(f"the picture is drawn by matplotlib, which is not installed: {INSTALL}") from error
    pieces = bands(recorded.duration_secs)
    figure = Figure(figsize=(15, 0.75 + BAND_INCHES * len(pieces)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    figure.text(0.045, 1 - 0.35 / height, _title(recorded), fontsize=13, color=INK, weight="bold", va="center")
    figure.text(0.045, 1 - 0.64 / height, _subtitle(recorded), fontsize=9.5, color="#52606d", va="center")
    _legend(figure, 1 - 0.35 / height)
    peak = max(1000.0, *(float(np.abs(side.astype(np.int32)).max(initial=0)) for side in (recorded.left, recorded.right)))
    for number, (begin, end) in enumerate(pieces):
        top = height - 1.45 - BAND_INCHES * number
        for side, (name, color, samples) in enumerate(
            (("caller", CALLER, recorded.left), ("heard", HEARD, recorded.right)),
        ):
            axes = figure.add_axes((0.045, (top - 1.15 * (side + 1)) / height, 0.94, 1.1 / height))
            _wave(axes, samples, recorded.sample_rate, begin, end, color, peak)
            axes.set_ylabel(name, fontsize=9.5, color=color, labelpad=4)
            _mark(axes, recorded, begin, end, upper=side == 0)
            axes.tick_params(labelbottom=side == 1)
    try:
        figure.savefig(output, format="png")
    except OSError as error:
        raise ReportError(f"{output}: {error.strerror or error}") from error


def _title(recorded: Recorded) -> str:
    first = _first(recorded.events, "start")
    who = f"{first.caller or '?'} → {first.called or '?'}" if first is not None and (first.caller or first.called) else ""
    return "   ".join(filter(None, (recorded.path.name, who)))


def _subtitle(recorded: Recorded) -> str:
    about, start, stop = (_first(recorded.events, kind) for kind in ("recording", "start", "stop"))
    counts = {
        "checkpoint": sum(event.type == "checkpoint" for event in recorded.events),
        "clear": sum(event.type == "clear" for event in recorded.events),
        "key": sum(_keys(event) for event in recorded.events),
        "gap": sum(event.type == "gap" for event in recorded.events),
    }
    parts = [
        about.time[:19].replace("T", " ") + " UTC" if about is not None and about.time else "",
        f"{about.provider} ({about.kind})" if about is not None and about.provider else "",
        f"call {start.call_id}" if start is not None and start.call_id else "",
        clock(recorded.duration_secs),
        *(f"{count} {word}{'' if count == 1 else 's'}" for word, count in counts.items() if count),
        f"ended by {stop.reason}" if stop is not None and stop.reason else "no end in its log",
    ]
    return "  ·  ".join(filter(None, parts))


def clock(secs: float) -> str:
    """`1:02:03`, `2:03`, `0:03.4`."""
    minutes, rest = divmod(secs, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours}:{minutes:02d}:{int(rest):02d}"
    return f"{minutes}:{int(rest):02d}" if secs >= 60 or rest == int(rest) else f"{minutes}:{rest:04.1f}"


def _legend(figure: Any, y: float) -> None:
    x = 0.985
    for word, color in (("gap", GAP), ("key", KEY), ("clear", CUT), *((name, OUTCOMES[name]) for name in reversed(OUTCOMES))):
        figure.text(x, y, f"■ {word}", fontsize=8.5, color=color, ha="right", va="center")
        x -= 0.0054 * (len(word) + 4)


def _wave(axes: Any, samples: NDArray[np.int16], rate: int, begin: float, end: float, color: str, peak: float) -> None:
    piece = samples[int(begin * rate) : int(end * rate)]
    low, high = envelope(piece)
    times = begin + np.arange(len(low)) * (len(piece) / rate / max(1, len(low)))
    axes.axhline(0, color=FAINT, linewidth=0.6)
    axes.fill_between(times, low / peak, high / peak, color=color, linewidth=0.4, step="mid")
    axes.set_xlim(begin, end)
    axes.set_ylim(-1.05, 1.05)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: clock(round(value, 1)))
    axes.tick_params(axis="x", labelsize=8.5, colors="#52606d", length=3)
    axes.set_facecolor("#f7f9fb")
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color("#cbd2d9")


def _mark(axes: Any, recorded: Recorded, begin: float, end: float, *, upper: bool) -> None:
    """What happened in this piece. Lines go through both tracks; flags stand above the upper, and keys in it."""
    here = [event for event in recorded.events if begin <= event.at_ms / 1000 < end or (event.type == "gap")]
    for event in here:
        at = event.at_ms / 1000
        if event.type == "gap" and (event.track == "inbound") == upper:
            last = at + event.lost_ms / 1000
            if last > begin and at < end:
                axes.axvspan(max(at, begin), min(max(last, at + (end - begin) / 600), end), color=GAP, alpha=0.45, linewidth=0)
        elif event.type == "clear":
            axes.axvline(at, color=CUT, linewidth=1.4)
            if not upper and event.cleared_ms:
                gone = min(at + event.cleared_ms / 1000, end)
                axes.plot([at, gone], [-0.93, -0.93], color=CUT, linewidth=1.2, linestyle=(0, (2, 2)))
        elif event.type == "checkpoint":
            axes.axvline(at, color=OUTCOMES.get(event.outcome, FAINT), linewidth=0.9)
    if upper:
        for at, keys in _bursts(here, (end - begin) / 60):
            axes.plot([at], [-0.86], marker="s", markersize=5, color=KEY, clip_on=False)
            axes.annotate(
                "•" * min(keys, 12), (at, -0.86), (5, 0), textcoords="offset points", fontsize=9, color=KEY, va="center"
            )
        _flags(axes, [event for event in here if event.type in ("checkpoint", "clear", "fault")], end - begin)


def _flags(axes: Any, events: list[Event], length: float) -> None:
    labels = [_label(event) for event in events]
    widths = [(event.at_ms / 1000, (len(text) + 3.5) * length * 0.0049) for event, (text, _) in zip(events, labels, strict=True)]
    for event, (text, color), level in zip(events, labels, stagger(widths), strict=True):
        at, y = event.at_ms / 1000, 1.13 + 0.27 * level
        axes.plot([at, at], [1.0, y + 0.1], color=color, linewidth=0.9, clip_on=False)
        box = {"boxstyle": "round,pad=0.18", "facecolor": color, "edgecolor": "none"}
        left = (at - axes.get_xlim()[0]) / length < 1 - (len(text) + 2) * 0.0052
        axes.annotate(
            text, (at, y), (2.5 if left else -2.5, 0), textcoords="offset points", fontsize=7.5, color="white", va="center",
            ha="left" if left else "right", bbox=box, annotation_clip=False,
        )  # fmt: skip


def _label(event: Event) -> tuple[str, str]:
    if event.type == "clear":
        return f"✂ {event.cleared_ms / 1000:.1f} s", CUT
    if event.type == "fault":
        return f"! {event.code}"[:24], FAULT
    name = event.name if len(event.name) <= 20 else f"{event.name[:19]}…"
    # matplotlib reads formulas between dollar signs.
    return name.replace("$", r"\$") or "?", OUTCOMES.get(event.outcome, FAINT)


def _keys(event: Event) -> int:
    """How many keys were pressed; the log has no digits, only `<3>`."""
    if event.type != "dtmf":
        return 0
    told = event.digits.strip("<>")
    return int(told) if told.isdecimal() and event.digits.startswith("<") else max(1, len(event.digits))


def _bursts(events: Iterable[Event], apart_secs: float) -> list[tuple[float, int]]:
    """When keys were pressed and how many, those together that follow each other closely."""
    bursts: list[tuple[float, int]] = []
    last = float("-inf")
    for event in events:
        if keys := _keys(event):
            at = event.at_ms / 1000
            if at - last < apart_secs:
                bursts[-1] = bursts[-1][0], bursts[-1][1] + keys
            else:
                bursts.append((at, keys))
            last = at
    return bursts


def _first(events: Iterable[Event], kind: str) -> Event | None:
    return next((event for event in events if event.type == kind), None)
