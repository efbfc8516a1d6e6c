"""Does the time of a refusal tell what was wrong? `python tests/benchmarks/timing.py --samples 1000000`.

A gateway in a process of its own, and a client that sends one bad upgrade after the other, each on a new connection, of a class
that is drawn anew each time; all classes are prepared by the same work. The clock runs from the last byte sent to the first one
received. Welch's t says whether two classes differ: beyond 4.5 they do. Beside the t of all samples stands that without the
slowest tenth of them, where the machine is heard rather than the gateway.

Pairs of the first kind must not differ: they need the same work, and a difference would tell how much of a secret was guessed.
Those of the second kind differ in work by design: a good token is looked at longer than a bad one, and an unknown name is told by
its status already, 404. Neither is a secret's: names stand in the account's console, and a token is good or not as a whole.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import random
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from gateway.tokens import Tokens
from tests.benchmarks.door import PUBLIC, SECRET, TOKEN, gateway

Samples = dict[str, npt.NDArray[np.float64]]
"""Microseconds of each refusal, by class."""

BAR = 4.5
KEPT = 0.9
MAC_CHARACTERS, SIGNATURE_CHARACTERS = 22, 27
CLASSES = {
    "MAC wrong at its first character": (403, "token", 0),
    "MAC wrong at its last character": (403, "token", MAC_CHARACTERS - 1),
    "token wrong at its last character": (403, "token", -1),
    "signature wrong at its first character": (403, "signature", 0),
    "signature wrong at its last character": (403, "signature", SIGNATURE_CHARACTERS - 1),
    "unknown name": (404, "name", 0),
}
"""Status of the refusal, what is wrong, and where."""


def wrong(text: str, at: int) -> str:
    """`text` with another letter at that place."""
    at %= len(text)
    return f"{text[:at]}{'A' if text[at] != 'A' else 'B'}{text[at + 1 :]}"


def upgrade(tokens: Tokens, what: str, at: int) -> bytes:
    token = tokens.mint("twilio", "CA" + "0" * 32, "route-0", now=time.time(), nonce=os.urandom(16))
    presented, broken = token, wrong(token, at if what == "token" else 0)
    if what == "token":
        presented = broken
    name = "nobody" if what == "name" else "twilio"
    url = f"{PUBLIC.replace('https', 'wss')}/{name}/stream/{presented}"
    right = base64.b64encode(hmac.digest(TOKEN.encode(), url.encode(), hashlib.sha1)).decode()
    damaged = wrong(right, at if what == "signature" else 0)
    signature = damaged if what == "signature" else right
    return (
        f"GET /{name}/stream/{presented} HTTP/1.1\r\nHost: voice.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\nX-Twilio-Signature: {signature}\r\n\r\n"
    ).encode()


def sample(port: int, samples: int) -> Samples:
    """Microseconds of each refusal, by class. Raises AssertionError for an answer that is not the class's."""
    tokens, names = Tokens(SECRET), [*CLASSES]
    took: dict[str, list[float]] = {name: [] for name in names}
    for number in range(samples + 200):
        name = random.choice(names)
        status, what, at = CLASSES[name]
        request = upgrade(tokens, what, at)
        with socket.create_connection(("127.0.0.1", port)) as made:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began = time.perf_counter_ns()
            made.sendall(request)
            answer = made.recv(1024)
            ended = time.perf_counter_ns()
        assert answer.startswith(b"HTTP/1.1 %d " % status), (name, answer[:60])
        if number >= 200:  # warm
            took[name].append((ended - began) / 1000)
    return {name: np.array(values) for name, values in took.items()}


def welch(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    return float((one.mean() - other.mean()) / error)


def compare(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(t of all samples, t of those that are no slower than nine tenths of both together)."""
    limit = np.quantile(np.concatenate([one, other]), KEPT)
    return welch(one, other), welch(one[one <= limit], other[other <= limit])


def kept(path: Path, took: Samples) -> Samples:
    """These samples and those that `path` holds, which holds them all from now on."""
    if path.exists():
        with np.load(path) as earlier:
            took = {name: np.concatenate([earlier[str(number)], took[name]]) for number, name in enumerate(CLASSES)}
    np.savez(path, **{str(number): took[name] for number, name in enumerate(CLASSES)})
    return took


def measure(samples: int, keep: Path | None) -> dict[str, Any]:
    with gateway() as (port, _):
        took = sample(port, samples)
    if keep is not None:
        took = kept(keep, took)
    rows = [{"class": name, "samples": len(us), "median_us": float(np.median(us)), "mean_us": float(us.mean())}
            for name, us in took.items()]  # fmt: skip
    names = [*CLASSES]
    pairs = []
    for one, other in [*pairwise(names), (names[0], names[2])]:
        t, t_cropped = compare(took[one], took[other])
        pairs.append({"pair": [one, other], "equal": CLASSES[one][1] == CLASSES[other][1], "t": t, "t_cropped": t_cropped})
    return {"classes": rows, "pairs": pairs, "bar": BAR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="in all")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="an .npz of earlier runs, which are added and kept")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.samples, options.keep)
    if options.json:
        print(json.dumps(found))
        return
    for row in found["classes"]:
        print(f"{row['class']:<40}{row['samples']:>8} samples, median {row['median_us']:.1f} µs, mean {row['mean_us']:.1f} µs")
    for row in found["pairs"]:
        kind = f"bar {BAR}" if row["equal"] else "by design"
        print(
            f"{row['pair'][0]} / {row['pair'][1]}: t {row['t']:.2f}, without the slowest tenth {row['t_cropped']:.2f}  ({kind})"
        )


if __name__ == "__main__":
    main()
