"""What our sample-rate conversion is worth, next to what a reader would take instead. `python tests/benchmarks/audio.py --help`.

Everything but the time is a pure function of the code (`measure`), so the tests hold it to its bars and to the table that the
documentation quotes (`readme_rows`). Signals go through in 20 ms chunks, as a call does.

delay       what has been fed minus what has come out, plus the shift of a short pulse within it; after the first 200 ms
ripple      the largest deviation from 0 dB of any tone from 100 Hz to the pass-band's edge
rejection   upwards: a pass-band tone over all its images; downwards: a stop-band tone over all that is left of it; the worst tone
SNR         a tone over everything else, the worst of 900, 1,000 and 1,100 Hz; in float (pipecat and livekit have only 16 bits)
empty       share of calls that return nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from gateway.audio import Converter
from gateway.media import Encoding, MediaFormat

Floats = npt.NDArray[np.float32]
Process = Callable[[Floats], Floats]
Candidate = Callable[[int, int], Process]

PAIRS = (
    *((8000, 16000), (16000, 8000), (8000, 24000), (24000, 8000), (8000, 48000), (48000, 8000)),
    *((16000, 24000), (24000, 16000), (16000, 48000), (48000, 16000), (24000, 48000), (48000, 24000)),
    *((8000, 22050), (22050, 8000), (8000, 44100), (44100, 8000), (16000, 44100), (44100, 16000)),
)
COMPARED = PAIRS[:4]
"""The alternatives are measured for these; ours for all."""

CHUNKS_PER_SECOND = 50
SECONDS, FROM, TO = 0.8, 0.2, 0.6  # of a tone: played, and analysed (0.4 s: bins of 2.5 Hz, every tone in one bin)
CEILING_DB = 120.0  # beyond it float32's own noise is measured


# --- what is measured ------------------------------------------------------------------------------------------------


def gateway(source: int, target: int) -> Process:
    """Ours, float to float."""
    converter = Converter(MediaFormat(Encoding.PCM_F32LE, source), MediaFormat(Encoding.PCM_F32LE, target))
    return lambda chunk: np.frombuffer(converter.convert(chunk.tobytes()), np.float32)


def soxr_stream(quality: str, *, vr: bool = False) -> Candidate:
    def make(source: int, target: int) -> Process:
        process: Process = soxr.ResampleStream(source, target, 1, dtype="float32", quality=quality, vr=vr).resample_chunk
        return process

    return make


def soxr_per_chunk(source: int, target: int) -> Process:
    return lambda chunk: soxr.resample(chunk, source, target, quality="HQ")


def linear(source: int, target: int) -> Process:
    """Linear interpolation that carries its last sample and its phase, as well as it can be done."""
    last, fed, given = np.float32(0), 0, 0

    def process(chunk: Floats) -> Floats:
        nonlocal last, fed, given
        until = -(-(fed + len(chunk)) * target // source)
        positions = np.arange(given, until) * source / target - fed
        result = np.interp(positions, np.arange(len(chunk) + 1), np.concatenate(([last], chunk)))
        last, fed, given = chunk[-1], fed + len(chunk), until
        return result.astype(np.float32)

    return process


def pipecat(source: int, target: int) -> Process:
    from pipecat.audio.utils import create_stream_resampler  # type: ignore[import-not-found]

    stream = create_stream_resampler()

    def process(chunk: Floats) -> Floats:
        try:
            stream.resample(_pcm16(chunk), source, target).send(None)
        except StopIteration as done:
            return _floats(done.value)
        raise RuntimeError("this resampler waits for something")

    return process


def livekit(source: int, target: int) -> Process:
    from livekit import rtc  # type: ignore[import-not-found]

    stream = rtc.AudioResampler(source, target)

    def process(chunk: Floats) -> Floats:
        return _floats(b"".join(bytes(frame.data) for frame in stream.push(bytearray(_pcm16(chunk)))))

    return process


CANDIDATES: dict[str, Candidate] = {
    "this gateway": gateway,
    "soxr HQ stream": soxr_stream("HQ"),
    "soxr VHQ stream": soxr_stream("VHQ"),
    "soxr QQ stream": soxr_stream("QQ"),
    "soxr HQ stream, vr": soxr_stream("HQ", vr=True),
    "soxr HQ, each chunk alone": soxr_per_chunk,
    "linear interpolation": linear,
}
OPTIONAL: dict[str, Candidate] = {"pipecat": pipecat, "livekit": livekit}


def _pcm16(chunk: Floats) -> bytes:
    return np.rint(chunk * 32768).clip(-32768, 32767).astype(np.int16).tobytes()


def _floats(pcm16: bytes) -> Floats:
    return np.frombuffer(pcm16, np.int16).astype(np.float32) / np.float32(32768)


# --- how ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Units in the names; dB above `CEILING_DB` are cut there."""

    delay_min_ms: float
    delay_max_ms: float
    ripple_db: float
    rejection_db: float
    snr_db: float
    empty_share: float


def band_edges(source: int, target: int) -> tuple[int, int]:
    """Where the pass-band ends and the stop-band begins, in Hz: 3,400 and 4,600 on telephone lines, else ±1/8 of the middle."""
    base = min(source, target)
    return (3400, 4600) if base == 8000 else (base * 7 // 16, base * 9 // 16)


def measure(candidate: Candidate, source: int, target: int) -> Figures:
    """All figures of one candidate for one conversion. Deterministic."""
    passing, stopping = band_edges(source, target)
    tones = {f: _spectrum(candidate, source, target, f) for f in [*_grid(100, passing, fine_from=passing - 200), passing]}
    ripple = max(abs(_db(spectrum[_bin(f)])) for f, spectrum in tones.items())
    snr = CEILING_DB
    for f in (900, 1000, 1100):  # not 1 kHz alone: a filter's zero may lie just on its image
        spectrum = _spectrum(candidate, source, target, f)
        snr = min(snr, _db(spectrum[_bin(f)] / max(spectrum.sum() - spectrum[_bin(f)], 1e-30)))
    if target > source:
        rejection = min(_db(spectrum[_bin(f)] / spectrum[_bin(stopping) :].sum()) for f, spectrum in tones.items())
    else:
        # Not the tones that fall on 0 Hz or on half the rate: there power depends on phase.
        stopped = [f for f in _grid(stopping, source // 2, fine_to=stopping + 200) if f % (target / 2)]
        rejection = min(-_db(_spectrum(candidate, source, target, f).sum()) for f in stopped)
    delays, empty = _delays(candidate, source, target)
    return Figures(
        *(
            round(float(x), 3)
            for x in (delays.min(), delays.max(), ripple, min(rejection, CEILING_DB), min(snr, CEILING_DB), empty)
        )
    )


def _grid(low: int, high: int, *, fine_from: int = 1 << 30, fine_to: int = 0) -> list[int]:
    """Tones from `low` to below `high` in Hz, close together next to the band's edge, where the worst of them is."""
    return [f for f in range(low, high, 20) if f >= fine_from or f < fine_to or (f - low) % (60 if high < 15000 else 180) == 0]


def run(candidate: Candidate, source: int, target: int, samples: Floats) -> list[Floats]:
    """What each call returned, for a fresh candidate and 20 ms chunks (whole samples, evenly spread)."""
    process = candidate(source, target)
    edges = np.arange(0, len(samples) * CHUNKS_PER_SECOND // source + 1) * source // CHUNKS_PER_SECOND
    return [np.array(process(samples[a:b])) for a, b in itertools.pairwise(edges)]


def _spectrum(candidate: Candidate, source: int, target: int, frequency: float) -> npt.NDArray[np.float64]:
    """Power by bin of what becomes of a tone whose own power is 1."""
    moments = np.arange(int(source * SECONDS)) / source
    tone = (0.5 * np.sin(2 * np.pi * frequency * moments + 0.7)).astype(np.float32)
    heard = np.concatenate(run(candidate, source, target, tone))[int(FROM * target) : int(TO * target)].astype(np.float64)
    power: npt.NDArray[np.float64] = np.abs(np.fft.rfft(heard) / (len(heard) * 0.25)) ** 2
    return power


def _delays(candidate: Candidate, source: int, target: int) -> tuple[npt.NDArray[np.float64], float]:
    """Milliseconds by call, and the share of empty calls, over two seconds."""
    at = 1.005  # inside a chunk
    pulse = (0.5 * np.exp(-0.5 * ((np.arange(source * 2) / source - at) / 0.00025) ** 2)).astype(np.float32)
    calls = run(candidate, source, target, pulse)
    energy = np.concatenate(calls).astype(np.float64) ** 2
    shift = (energy * np.arange(len(energy))).sum() / energy.sum() / target - at
    fed = np.arange(1, len(calls) + 1) * source // CHUNKS_PER_SECOND / source
    out = np.cumsum([len(call) for call in calls]) / target
    return ((fed - out + shift) * 1000)[10:], float(np.mean([not len(call) for call in calls]))


def _bin(frequency: float) -> int:
    return round(frequency * (TO - FROM))


def _db(power: float) -> float:
    return 10 * float(np.log10(max(power, 1e-30)))


# --- time --------------------------------------------------------------------------------------------------------------


def microseconds(call: Callable[[], object], number: int = 2000) -> float:
    """The best of many rounds: what the code costs when nobody disturbs."""
    return min(timeit.repeat(call, number=number, repeat=9)) / number * 1e6


def resampling_time(candidate: Candidate, source: int, target: int) -> float:
    process = candidate(source, target)
    chunk = np.random.default_rng(1).uniform(-0.9, 0.9, source // CHUNKS_PER_SECOND).astype(np.float32)
    return microseconds(lambda: process(chunk))


def conversion_times() -> list[dict[str, Any]]:
    """The whole way, bytes to bytes: ours, soxr's HQ stream with the same tables around it, and that stream alone."""
    wire = Encoding.MULAW, 8000
    rows: list[dict[str, Any]] = []
    for rate in (16000, 24000, 48000):
        for source, target in ((wire, (Encoding.PCM_S16LE, rate)), ((Encoding.PCM_S16LE, rate), wire)):
            here, there = MediaFormat(*source), MediaFormat(*target)
            converter, around = Converter(here, there), _soxr_converter(here, there)
            payload = np.random.default_rng(1).bytes(here.bytes_for(20))
            row = {
                "conversion": f"{here} -> {there}",
                "gateway_us": microseconds(partial(converter.convert, payload)),
                "soxr_hq_with_conversion_us": microseconds(partial(around, payload)),
                "soxr_hq_int16_alone_us": resampling_time(_soxr_int16, here.sample_rate, there.sample_rate),
                "soxr_hq_float32_alone_us": resampling_time(soxr_stream("HQ"), here.sample_rate, there.sample_rate),
            }
            rows.append(row)
    return rows


def _soxr_int16(source: int, target: int) -> Process:
    """The stream on 16-bit samples, whatever it is given: for its time only. Not loud, because it is slow at clipping."""
    stream = soxr.ResampleStream(source, target, 1, dtype="int16", quality="HQ")
    samples = np.random.default_rng(1).integers(-10000, 10000, source // CHUNKS_PER_SECOND).astype(np.int16)
    return lambda _: stream.resample_chunk(samples)


def _soxr_converter(source: MediaFormat, target: MediaFormat) -> Callable[[bytes], bytes]:
    from gateway.audio import g711

    stream = soxr.ResampleStream(source.sample_rate, target.sample_rate, 1, dtype="int16", quality="HQ")

    def up(payload: bytes) -> bytes:
        return bytes(stream.resample_chunk(g711.decode_mulaw(np.frombuffer(payload, np.uint8))).tobytes())

    def down(payload: bytes) -> bytes:
        return g711.encode_mulaw(stream.resample_chunk(np.frombuffer(payload, np.int16))).tobytes()

    return up if source.encoding is Encoding.MULAW else down


# --- tables and pictures -----------------------------------------------------------------------------------------------

HEADER = ("conversion", "by", "delay ms", "ripple dB", "images, aliases dB", "SNR dB", "empty calls")
README_ROWS = (
    *((pair, "this gateway") for pair in ((8000, 16000), (16000, 8000), (8000, 24000), (8000, 48000))),
    *((pair, name) for pair in ((8000, 16000), (16000, 8000)) for name in CANDIDATES if name != "this gateway"),
)


def cells(source: int, target: int, name: str, figures: Figures) -> tuple[str, ...]:
    low, high = round(figures.delay_min_ms, 2), round(figures.delay_max_ms, 2)
    return (
        f"{source / 1000:g} → {target / 1000:g} kHz",
        name,
        f"{low + 0.0:g}" if low == high else f"{low + 0.0:g} to {high:g}",
        f"{figures.ripple_db:.2f}",
        _negative(figures.rejection_db),
        _decibels(figures.snr_db),
        f"{figures.empty_share:.0%}",
    )


def _decibels(value: float) -> str:
    return "> 100" if value > 100 else f"{value:.0f}"


def _negative(rejection: float) -> str:
    return "< -100" if rejection > 100 else f"{-rejection:.0f}"


def readme_rows() -> str:
    """The table that the documentation quotes between `<!-- audio-table -->` and `<!-- /audio-table -->`. No times in it."""
    rows = [HEADER, ("---", "---", *["---:"] * 5)]
    rows += [cells(*pair, name, measure(CANDIDATES[name], *pair)) for pair, name in README_ROWS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(directory: Path, candidates: dict[str, Candidate]) -> list[Path]:
    """By conversion two pictures: what becomes of every tone, and a tone's spectrogram with the chunks' edges."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for source, target in COMPARED:
        frequencies = np.arange(50, source // 2, 50)
        figure, axes = plt.subplots(len(candidates), 2, figsize=(13, 2.6 * len(candidates)), squeeze=False, layout="constrained")
        for (left, right), (name, candidate) in zip(axes, candidates.items(), strict=True):
            gains, others = [], []
            for frequency in frequencies:
                spectrum = _spectrum(candidate, source, target, float(frequency))
                own = spectrum[_bin(float(frequency))] if frequency < target / 2 else 0.0
                gains.append(_db(own))
                others.append(_db(spectrum.sum() - own))
            left.plot(frequencies, np.maximum(gains, -130), label="the tone")
            left.plot(frequencies, np.maximum(others, -130), label="everything else")
            left.set(title=f"{name}, {source} to {target} Hz", xlabel="tone, Hz", ylabel="dB", ylim=(-130, 5))
            left.legend(loc="lower left")
            moments = np.arange(source) / source
            tone = (0.5 * np.sin(2 * np.pi * 1010 * moments)).astype(np.float32)
            heard = np.concatenate(run(candidate, source, target, tone))[int(0.3 * target) : int(0.5 * target)]
            right.specgram(heard + 1e-9, NFFT=128, noverlap=112, Fs=target, vmin=-160, vmax=-20)
            right.set(title="0.2 s of 1,010 Hz", xlabel="s", ylabel="Hz")
        path = directory / f"audio-{source}-{target}.png"
        figure.savefig(path, dpi=80)
        plt.close(figure)
        written.append(path)
    return written


def installed() -> dict[str, Candidate]:
    """All candidates, the optional ones where they can be imported."""
    found = dict(CANDIDATES)
    for name, candidate in OPTIONAL.items():
        try:
            candidate(8000, 16000)
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
        else:
            found[name] = candidate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality and cost of sample-rate conversion, ours and others'.")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also draw pictures into DIR (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--readme", action="store_true", help="only the table that the documentation quotes")
    options = parser.parse_args()
    if options.readme:
        print(readme_rows())
        return
    candidates = installed()
    results = []
    for pair in PAIRS:
        for name, candidate in candidates.items():
            if name == "this gateway" or pair in COMPARED:
                figures = measure(candidate, *pair)
                results.append((pair, name, figures, resampling_time(candidate, *pair)))
    whole_way = conversion_times()
    if options.json:
        rows = [{"source": p[0], "target": p[1], "by": n, **asdict(f), "us_per_20_ms": t} for p, n, f, t in results]
        print(json.dumps({"resampling": rows, "conversion": whole_way}, indent=2))
    else:
        _print_table([(*HEADER, "us/20 ms"), *((*cells(*p, n, f), f"{t:.1f}") for p, n, f, t in results)])
        print()
        times = [(r["conversion"], *(f"{v:.2f}" for v in list(r.values())[1:])) for r in whole_way]
        _print_table(
            [
                (
                    "us/20 ms, bytes to bytes",
                    "this gateway",
                    "soxr HQ and the same tables",
                    "soxr HQ int16 alone",
                    "soxr HQ float32 alone",
                ),
                *times,
            ]
        )
    if options.png:
        try:
            for path in draw(options.png, candidates):
                print(f"drawn: {path}", file=sys.stderr)
        except ImportError:
            sys.exit("no pictures: matplotlib is not installed (pip install matplotlib)")


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip())


if __name__ == "__main__":
    main()
