"""Sample rates. A streaming filter of our own for the rates of telephony, soxr for every other rate and for whole files.

**Why a filter of our own.** Library streams buy speed with lumps: they give nothing for 100 ms and then bursts. Between 8, 16,
24 and 48 kHz the ratio is a small fraction L/M, so a polyphase FIR needs no more than one small matrix product per chunk, gives
20 ms for 20 ms from the first chunk on, and delays everything by the same 2 ms or less.

**The filter.** With B the lower of the two rates and L*source = M*target the common rate, the prototype is a sinc that crosses
zero every L*source/B taps (cut-off at B/2, its own images' mirror line) under a Kaiser window. Kaiser's formula

    attenuation [dB] = 7.95 + 14.36 * (transition / common rate) * (taps - 1)

ties the three bars together. 8 kHz links: pass to 3.4 kHz, stop from 4.6 kHz, 16 samples of 8 kHz (2 ms) on either side, which
leaves 77 dB. Wider links: pass to 7/8 and stop from 9/8 of B/2, 20 samples of B on either side (1.25 ms at 16 kHz): 80 dB.
Each of the L phases is scaled to sum to 1, so a constant stays that constant on every output sample.

**Why blocks.** Output samples must not depend on how the input was cut, not even in the last bit, and a BLAS may sum in another
order for another shape. So the stream is divided into absolute blocks of 20 ms, and a block is only ever computed by one product
of one shape: a chunk that ends inside a block computes the whole block, and gives out the samples whose inputs have all arrived
(the others' coefficients are zero, so what the block holds for them is of no consequence). A 20 ms chunk is one product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import gcd
from threading import local
from typing import Protocol

import numpy as np
import numpy.typing as npt
import soxr

FloatArray = npt.NDArray[np.float32]

FIR_RATES = (8000, 16000, 24000, 48000)
"""Between any two of these the resampler is our own filter."""

_ROWS = 20  # rows of one product: 1 ms each, the fastest that was measured
_BLOCKS_PER_SECOND = 50


class Resampler(Protocol):
    """One direction of one stream, from one rate to another. Any chunking of the same samples gives the same bits."""

    def process(self, samples: FloatArray) -> FloatArray:
        """What can be given out now, as a new array."""
        ...

    def flush(self) -> FloatArray:
        """The rest of what was fed; afterwards as new. Nothing, if nothing was fed."""
        ...

    def reset(self) -> None:
        """Forget everything; afterwards as new."""
        ...


def resampler(source_rate: int, target_rate: int) -> Resampler:
    """The right resampler for two different rates in Hz."""
    if source_rate in FIR_RATES and target_rate in FIR_RATES:
        return FirResampler(source_rate, target_rate)
    return SoxrResampler(source_rate, target_rate)


def resample_whole(samples: FloatArray, source_rate: int, target_rate: int) -> FloatArray:
    """A whole recording at once, without delay: `round(len * target / source)` samples. Rates in Hz, any."""
    if source_rate == target_rate or not len(samples):
        return samples
    whole: FloatArray = soxr.resample(np.ascontiguousarray(samples, np.float32), source_rate, target_rate, quality="VHQ")
    return whole


class Workspace:
    """What one product of a filter is computed in: `[history | block]`, its windows, and the outcome. All streams of a
    thread that have the same rates take turns, so that hundreds of calls stay within the processor's caches."""

    def __init__(self, source_rate: int, target_rate: int) -> None:
        _, _, _, history, self.taps = _bank(source_rate, target_rate)
        block = source_rate // _BLOCKS_PER_SECOND
        self.line = np.zeros(history + block, np.float32)
        self.inlet = self.line[history:]
        self.head, self.tail = self.line[:history], self.line[block:]
        width, row_outputs = self.taps.shape
        self.windows = np.lib.stride_tricks.sliding_window_view(self.line, width)[:: block // _ROWS]
        self.rows = np.empty((_ROWS, width), np.float32)
        self.dot = self.rows.dot  # the method: `np.dot` asks its arguments first whether they are arrays
        self.product = np.empty((_ROWS, row_outputs), np.float32)
        self.outlet = self.product.reshape(-1)
        self.gain = float(np.abs(self.taps).sum(0).max())
        """No sample of the output is larger than the largest of the input times this."""
        self.ends: dict[object, tuple[Callable[[bytes], None], Callable[[], bytes]]] = {}
        """What fills the inlet and what reads the outlet, by encodings."""


class _Threads(local):
    def __init__(self) -> None:
        self.workspace = cache(Workspace)


_of_thread = _Threads()


class FirResampler:
    """Between two of `FIR_RATES`: constant delay, and for m samples so far exactly ceil(m * target / source) out.

    Whoever has a whole block while `filled` is 0 may write it into the workspace's `inlet`, call `run` and find the result in its
    `outlet`: the short way, for 20 ms chunks. `process` takes any number of samples, by the same product. A stream belongs to the
    thread that it was made in.
    """

    __slots__ = ("_block", "_down", "_head", "_idle", "_inlet", "_line", "_tail", "_up", "delay_ms", "filled", "workspace")

    def __init__(self, source_rate: int, target_rate: int) -> None:
        self._up, self._down, self.delay_ms, history, _ = _bank(source_rate, target_rate)
        self._block = source_rate // _BLOCKS_PER_SECOND
        self._line = np.zeros(history + self._block, np.float32)  # [history | this block]
        self._inlet = self._line[history:]
        self._head, self._tail = self._line[:history], self._line[self._block :]
        self.workspace = _of_thread.workspace(source_rate, target_rate)
        self.filled = 0  # samples of this block so far
        self._idle = True

    def run(self) -> None:
        """From a whole block in the workspace's inlet to its outlet. Only while `filled` is 0."""
        self._idle = False
        work, head = self.workspace, self._head
        work.head[...] = head  # with dots: numpy makes another view for a colon
        work.rows[...] = work.windows
        work.dot(work.taps, work.product)
        head[...] = work.tail

    def process(self, samples: FloatArray) -> FloatArray:
        start, size, work = self.filled, len(samples), self.workspace
        if not size:
            return np.zeros(0, np.float32)
        self._idle = False
        result = np.empty(self._outputs(start + size) - self._outputs(start), np.float32)
        read = written = 0
        while read < size:
            filled = min(self.filled + size - read, self._block)
            self._inlet[self.filled : filled] = samples[read : read + filled - self.filled]
            read += filled - self.filled
            work.line[:] = self._line
            work.rows[:] = work.windows
            work.dot(work.taps, work.product)
            piece = work.outlet[self._outputs(self.filled) : self._outputs(filled)]
            result[written : written + len(piece)] = piece
            written += len(piece)
            if filled == self._block:
                self._head[:] = self._tail
                filled = 0
            self.filled = filled
        return result

    def flush(self) -> FloatArray:
        """All that the last samples still add to: twice the delay, fading into silence."""
        if self._idle:
            return np.zeros(0, np.float32)
        rest = self.process(np.zeros(len(self._head), np.float32))
        self.reset()
        return rest

    def reset(self) -> None:
        self._line[:] = 0
        self.filled = 0
        self._idle = True

    def _outputs(self, inputs: int) -> int:
        """How many output samples `inputs` samples since the start of a block complete."""
        return -(-inputs * self._up // self._down)


class SoxrResampler:
    """Between any two rates, by soxr's variable-rate engine: the only one of its streams whose delay is constant.

    The delay depends on the rates, 5 to 36 ms; m samples in and a flush give `m * target / source` out, rounded.
    """

    def __init__(self, source_rate: int, target_rate: int) -> None:
        self._rates = source_rate, target_rate
        self.reset()

    def process(self, samples: FloatArray) -> FloatArray:
        # float32 inside: soxr dithers int16, so that silence is not silent and two runs differ.
        result: FloatArray = self._stream.resample_chunk(samples)
        return result

    def flush(self) -> FloatArray:
        rest: FloatArray = self._stream.resample_chunk(np.zeros(0, np.float32), last=True)
        self.reset()
        return rest

    def reset(self) -> None:
        self._stream = soxr.ResampleStream(*self._rates, 1, dtype="float32", quality="HQ", vr=True)


@cache
def _bank(source_rate: int, target_rate: int) -> tuple[int, int, float, int, FloatArray]:
    """(L, M, delay in ms, samples of history, coefficients): `[history | row of input] @ coefficients = row of output`."""
    up, down = target_rate // gcd(source_rate, target_rate), source_rate // gcd(source_rate, target_rate)
    common, base = source_rate * up, min(source_rate, target_rate)
    prototype = _prototype(base, common, up)
    history = (len(prototype) - 1) // up
    inputs = source_rate // _BLOCKS_PER_SECOND // _ROWS
    outputs = inputs * up // down
    taps = np.zeros((history + inputs, outputs), np.float32)
    for output in range(outputs):
        for position in range(history + inputs):
            tap = output * down - (position - history) * up
            if 0 <= tap < len(prototype):
                taps[position, output] = prototype[tap]
    taps.flags.writeable = False
    return up, down, (len(prototype) - 1) / 2 * 1000 / common, history, taps


def _prototype(base: int, common: int, up: int) -> npt.NDArray[np.float64]:
    """The low-pass at the common rate, as the top of this module derives it."""
    side_samples, transition = (16, 1200 / 4000) if base == 8000 else (20, 1 / 4)  # of B, of B/2
    crossing = common // base
    side = side_samples * crossing
    attenuation = 7.95 + 14.36 * (transition * base / 2 / common) * 2 * side
    position = np.arange(-side, side + 1)
    prototype = np.sinc(position / crossing) * np.kaiser(2 * side + 1, 0.1102 * (attenuation - 8.7))
    for phase in range(up):
        prototype[phase::up] /= prototype[phase::up].sum()
    return prototype
