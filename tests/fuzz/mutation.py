"""Frames, bent: recorded ones by grammar and mutation. All is drawn from one `Random`, and cheap: some microseconds each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

Frame = str | bytes

TOKENS = (
    *('"', "{", "}", "[", "]", ",", ":", "\\", "\\u0000", "\\ud800", "\\udfff\\ud800", "\ud800", "\x00", "\x7f", "\u2028"),
    *("null", "true", "false", "NaN", "Infinity", "-0", "1e999", "-1e-999", "0.5", "9" * 400, "-1", "4294967296", "//", "/**/"),
    *("\ufeff", "\U0001f600", '"event":', '"type":', '"start":', '"media":', '"payload":', '"streamSid":', '"streamId":'),
    *('"timestamp":', '"track":', '"id":'),
)  # fmt: skip
"""What is put in between."""

VALUES = (
    *("null", "true", "false", "0", "-1", "1", "-0", "0.5", "1e999", "-1e308", "1e-400", "9007199254740993", "8000", "16000"),
    *("9" * 300, "-" + "9" * 30, '""', '"x"', '"0"', '"-1"', '"1e3"', '" 1 "', '"AAA="', '"AAB="', '"A"', '"%%%%"', '"AA\\nAA"'),
    *('"_-8="', '"//8="', '"\\ud800"', '"\\u0000"', '"on"', '"off"', '"inbound"', '"outbound"', '"inbound_track"'),
    *('"audio/x-mulaw"', '"audio/x-l16"', "[]", "{}", "[[]]", '[""]', '{"":{}}', '{"a":1,"a":2}', '"' + "x" * 300 + '"'),
    *('"' + "A" * 4000 + '"', '"1#*D"', '"w"', '"é\u2028"', '"media"', '"start"', '"stop"', '"mark"', '"connected"', '"dtmf"'),
    *('"clear"', '"playedStream"', '"say"', '"checkpoint"', '"g0.1"'),
)  # fmt: skip
"""What is put in place of a value."""

RARE = (
    "[" * 5000,
    '{"a":' * 3000,
    '{"event":"media","media":{"payload":"' + "/" * 60_000 + '"}}',
    '{"event":"media","x":' + "[" * 2000 + "]" * 2000 + ',"media":{"payload":"AAAA"}}',
    "{" + ",".join(f'"k{n}":{n}' for n in range(4000)) + "}",
    '{"type":"say","text":"' + "\\u00e9" * 8000 + '"}',
    '"' + "\\" * 30_000,
    "",
    " " * 1000,
    "\x00" * 100,
)
"""The worst in 64 KiB, now and then."""

_SCALAR = re.compile(r'(?<=:)\s*("(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|\{\}|\[\])')
_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"(?=\s*:)')


class Seed(NamedTuple):
    """A frame and where its values and keys are."""

    text: str
    values: list[tuple[int, int]]
    keys: list[tuple[int, int]]


class Mutator:
    """Bends text frames of one protocol; `frames` are good ones."""

    def __init__(self, frames: Sequence[Frame], random: Random) -> None:
        texts = [frame for frame in frames if isinstance(frame, str)]
        # The same conversation in the recorder's layout and in the one that most peers write.
        texts += [json.dumps(json.loads(text), separators=(",", ":")) for text in texts if _is_json(text)]
        self.seeds = [
            Seed(text, [m.span(1) for m in _SCALAR.finditer(text)], [m.span() for m in _KEY.finditer(text)])
            for text in dict.fromkeys(texts)
        ]
        self.keys = [*dict.fromkeys(seed.text[a:b] for seed in self.seeds for a, b in seed.keys)]
        self.binary = [frame for frame in frames if isinstance(frame, bytes)]
        self.random = random

    def frame(self) -> Frame:
        """One more, bent once to three times."""
        draw = self.random.random
        if self.binary and draw() < 0.5:
            return self.bend_bytes(self.binary[int(draw() * len(self.binary))])
        text = self.bend(self.seeds[int(draw() * len(self.seeds))])
        while draw() < 0.3:
            text = self.mutate(text)
        kind = draw()
        if kind < 0.01:
            return text.encode(errors="surrogatepass")
        if kind < 0.0105:
            return RARE[int(draw() * len(RARE))]
        return text

    def bend(self, seed: Seed) -> str:
        """By grammar: still JSON, mostly."""
        draw = self.random.random
        text, what = seed.text, draw()
        if what < 0.55 and seed.values:
            a, b = seed.values[int(draw() * len(seed.values))]
            return text[:a] + VALUES[int(draw() * len(VALUES))] + text[b:]
        if what < 0.7 and seed.keys:
            a, b = seed.keys[int(draw() * len(seed.keys))]
            return text[:a] + self.keys[int(draw() * len(self.keys))] + text[b:]
        if what < 0.8 and len(seed.values) > 1:
            # Two values change places.
            (a, b), (c, d) = sorted((seed.values[int(draw() * len(seed.values))], seed.values[int(draw() * len(seed.values))]))
            return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:] if b <= c else text
        if what < 0.85:
            other = self.seeds[int(draw() * len(self.seeds))].text
            return text[:-1] + "," + other[1:] if draw() < 0.5 else text.replace("{", "{" + other[1:-1] + ",", 1)
        return self.mutate(text)

    def mutate(self, text: str) -> str:
        """By characters and spans."""
        draw = self.random.random
        size = len(text)
        if not size:
            return TOKENS[int(draw() * len(TOKENS))]
        at, what = int(draw() * size), int(draw() * 7)
        if what == 0:
            return text[:at] + chr(ord(text[at]) ^ (1 << int(draw() * 7))) + text[at + 1 :]
        if what == 1:
            return text[:at] + text[at + 1 + int(draw() * 8) :]
        if what == 2:
            return text[:at] + TOKENS[int(draw() * len(TOKENS))] + text[at:]
        if what == 3:
            return text[: at + int(draw() * 20)] + text[at:]
        if what == 4:
            return text[:at]
        if what == 5:
            other = self.seeds[int(draw() * len(self.seeds))].text
            return text[:at] + other[int(draw() * len(other)) :]
        return text[:at] + chr(int(draw() * (256 if draw() < 0.9 else 0x110000))) + text[at + 1 :]

    def bend_bytes(self, data: bytes) -> bytes:
        """Flip, cut, lengthen."""
        draw = self.random.random
        what = int(draw() * 5)
        if what == 0:
            return data
        if what == 1:
            return data[: int(draw() * len(data))]
        if what == 2:
            return data + self.random.randbytes(int(draw() * 40))
        out = bytearray(data)
        for _ in range(1 + int(draw() * 4)):
            if out:
                out[int(draw() * min(len(out), 20 if what == 3 else len(out)))] = int(draw() * 256)
        return bytes(out)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
