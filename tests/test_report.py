"""The picture of a call: what is in it, what is not, and what happens when it can't be drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gateway import cli, report
from gateway.services.recorder import header

LOG = [
    {"at_ms": 0, "type": "recording", "time": "2026-11-20T10:00:00.000+00:00", "provider": "twilio", "kind": "k"},
    {"at_ms": 0, "type": "start", "caller": "+1415•••0100", "called": "+1415•••0199", "call_id": "CA1"},
    {"at_ms": 900, "type": "checkpoint", "name": "price in $ and $", "outcome": "played", "played_ms": 900},
    {"at_ms": 1000, "type": "dtmf", "digits": "<1>"},
    {"at_ms": 1010, "type": "dtmf", "digits": "<1>"},
    {"at_ms": 1200, "type": "gap", "lost_ms": 300, "track": "inbound"},
    {"at_ms": 1800, "type": "checkpoint", "name": "x" * 80, "outcome": "cleared"},
    {"at_ms": 1800, "type": "clear", "played_ms": 900, "cleared_ms": 400},
    {"at_ms": 1900, "type": "novelty", "what": [1]},
    {"at_ms": 2000, "type": "stop", "reason": "caller_hangup"},
]


def recording(directory: Path, secs: float = 2.0, log: list[dict[str, object]] | None = LOG, part: str = "") -> Path:
    frames = np.zeros((int(secs * 8000), 2), "<i2")
    frames[:, 0] = np.sin(np.arange(len(frames)) / 5) * 9000
    path = directory / f"call.wav{part}"
    path.write_bytes(header(8000, frames.nbytes) + frames.tobytes())
    if log is not None:
        lines = "\n".join(json.dumps(line) for line in log)
        (directory / "call.jsonl").write_text(f'{lines}\n{{"at_ms": 3, "ty')
    return path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.main, ["report", *map(str, arguments)])
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def pixels(path: Path) -> tuple[int, int, set[tuple[int, int, int]]]:
    """Width, height and the colours of a picture."""
    from matplotlib.image import imread

    image = np.rint(imread(path) * 255).astype(int)[:, :, :3]
    codes = np.unique(image @ np.array([65536, 256, 1]))
    return image.shape[1], image.shape[0], {(code >> 16, code >> 8 & 255, code & 255) for code in codes.tolist()}


def rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


@pytest.mark.parametrize("name", ["call.wav", "call.jsonl", "call"])
def test_a_call_is_drawn(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    recording(tmp_path)
    assert (0, f"{tmp_path / 'call.png'}: 2.0 s, {len(LOG)} lines of log\n") == run(tmp_path / name)
    width, height, colors = pixels(tmp_path / "call.png")
    assert width > 1500
    assert 300 < height < 600
    for color in (report.CALLER, report.CUT, report.KEY, *report.OUTCOMES.values()):
        assert rgb(color) in colors, color


def test_a_call_that_still_runs_or_was_killed_is_drawn_and_so_is_one_without_a_log(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recording(tmp_path, log=None, part=".part")
    assert 0 == run(tmp_path / "call.wav", "-o", tmp_path / "x.png")[0]
    assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.parametrize("secs", [0.0, 0.01, 61.0])
def test_any_length_is_drawn(tmp_path: Path, secs: float) -> None:
    pytest.importorskip("matplotlib")
    recording(tmp_path, secs)
    assert 0 == run(tmp_path / "call.wav")[0]


def test_an_hour_is_cut_into_bands_of_one_length() -> None:
    assert [(0, 2)] == report.bands(2)
    assert [(0, 50), (50, 100)] == report.bands(100)
    pieces = report.bands(3600)
    assert (report.MOST_BANDS, 3600) == (len(pieces), pieces[-1][1])
    assert ["0:03.4", "0:03", "2:03", "1:02:03"] == [report.clock(secs) for secs in (3.4, 3, 123, 3723)]


def test_the_envelope_loses_no_peak() -> None:
    samples = np.zeros(100_000, np.int16)
    samples[77_777], samples[5] = 30_000, -30_000
    low, high = report.envelope(samples)
    assert (-30_000, 30_000, report.COLUMNS) == (low.min(), high.max(), len(low))
    assert all(len(side) == 3 for side in report.envelope(samples[:3]))


def test_labels_stand_above_each_other_only_where_they_must() -> None:
    assert [0, 1, 2, 0, 0] == report.stagger([(0, 5), (1, 5), (2, 5), (3, 5), (20, 5)])


def test_keys_have_no_digits_whatever_the_log_says(tmp_path: Path) -> None:
    recording(tmp_path, log=[{"type": "dtmf", "at_ms": 1, "digits": "4929"}, {"type": "dtmf", "at_ms": 2, "digits": "<2>"}])
    events = report.read(tmp_path / "call.wav").events
    assert [(0.001, 6)] == report._bursts(events, 1)


def test_without_matplotlib_the_command_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    recording(tmp_path)
    code, output = run(tmp_path / "call.wav")
    assert 1 == code
    assert "pip install 'telephony-audio-gateway[report]'" in output


def test_what_is_no_recording_is_said(tmp_path: Path) -> None:
    assert "No such file" in run(tmp_path / "nothing.wav")[1]
    (tmp_path / "text.wav").write_text("text")
    assert "not a WAV file" in run(tmp_path / "text.wav")[1]
    mono = bytearray(header(8000, 0))
    mono[22] = 1
    (tmp_path / "mono.wav").write_bytes(mono)
    assert "not a recording of this gateway" in run(tmp_path / "mono.wav")[1]
    pytest.importorskip("matplotlib")
    assert 1 == run(recording(tmp_path), "-o", tmp_path / "no" / "x.png")[0]
