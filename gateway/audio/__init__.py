"""Samples: G.711 by table, sample rates, conversion between media formats, re-framing. Pure: bytes in, bytes out, no I/O."""

from gateway.audio.convert import Converter, Reframer, convert_whole
from gateway.audio.resample import resample_whole

__all__ = ["Converter", "Reframer", "convert_whole", "resample_whole"]
