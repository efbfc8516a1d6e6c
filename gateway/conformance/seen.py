"""What a service did, read from its connections."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from gateway.conformance.call import ScriptedCall, Tap
from gateway.errors import MalformedFrame
from gateway.events import Event, Fault, Flow, FlowState
from gateway.services.framed import HEADER_BYTES, Header, unpack
from gateway.services.native import Ack, Ready
from gateway.specification import CLOSE_CODES


def frames(tap: Tap, sample_bytes: int) -> list[tuple[Header, bytes]]:
    """Audio in framed mode, as far as its headers can be read."""
    frames = []
    for each in tap.received:
        if isinstance(each.data, bytes):
            with suppress(MalformedFrame):
                frames.append((unpack(each.data, sample_bytes), each.data[HEADER_BYTES:]))
    return frames


def leaves_out(numbers: list[int], *, first: bool) -> bool:
    """Whether a number was left out, or numbers begin beyond 0 on a call's first connection."""
    highest = -1 if first else numbers[0] - 1
    for number in numbers:
        if number > highest + 1:
            return True
        highest = max(highest, number)
    return first and len(numbers) > 1 and len(set(numbers)) == 1


def acks(tap: Tap) -> list[Ack]:
    found = (housekeeping(each.data) for each in tap.received if isinstance(each.data, str))
    return [each for each in found if isinstance(each, Ack)]


def readies(call: ScriptedCall, connection: int = 0) -> list[Ready]:
    if not call.taps or (connection == -1 and len(call.taps) < 2):
        return []
    found = (housekeeping(each.data) for each in call.taps[connection].received if isinstance(each.data, str))
    return [each for each in found if isinstance(each, Ready)]


_decoder: msgspec.json.Decoder[Ready | Ack] = msgspec.json.Decoder(Ready | Ack)


def housekeeping(text: str) -> Ready | Ack | None:
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def odd_sizes(call: ScriptedCall, framed: bool) -> list[int]:
    """Sizes of audio messages that are no whole number of samples."""
    if call.carrier_format is None:
        return []
    sizes = (len(each.data) for tap in call.taps for each in tap.received if isinstance(each.data, bytes))
    header = HEADER_BYTES if framed else 0
    return [size - header for size in sizes if size >= header and (size - header) % call.service.media_format.sample_bytes]


def most_texts_per_sec(call: ScriptedCall) -> float:
    """The most texts within one second."""
    times = [each.at for tap in call.taps for each in tap.received if isinstance(each.data, str)]
    most = begin = 0
    for end, at in enumerate(times):
        while times[begin] < at - 1.0:
            begin += 1
        most = max(most, end - begin + 1)
    return float(most)


def mixed_calls(calls: list[ScriptedCall], framed: bool) -> int:
    """How many calls were sent audio that another caller had said. The callers' audio is noise, so a match is no accident."""
    begin = HEADER_BYTES if framed else 0
    said = [b"".join(frame[begin:] for tap in call.taps for frame in tap.sent) for call in calls]
    heard = [
        b"".join(each.data[begin:] for tap in call.taps for each in tap.received if isinstance(each.data, bytes))
        for call in calls
    ]
    probes = [[audio[at : at + 64] for at in range(len(audio) // 4, len(audio) - 64, max(64, len(audio) // 4))] for audio in said]
    return sum(
        any(probe in audio for other, many in enumerate(probes) if other != mine for probe in many)
        for mine, audio in enumerate(heard)
    )


def paused_at(call: ScriptedCall) -> float | None:
    return next((at for at, event in call.told(Flow) if flow_state(event) is FlowState.PAUSE), None)


def flow_state(event: Event) -> FlowState | None:
    return event.state if isinstance(event, Flow) else None


def mistakes(call: ScriptedCall) -> int:
    """How many of its commands were refused."""
    return sum(fault.code.endswith("_command") for fault in call.faults())


def about_numbers(fault: Fault) -> bool:
    """Faults that have a check of their own."""
    return any(words in fault.message for words in ("ack of", "ready was said", "ready.next"))


def meaningful(code: int | None) -> bool:
    return code in (None, 1005) or code in CLOSE_CODES


def how_it_closed(code: int | None) -> str:
    match code:
        case None:
            return "ended the call"
        case 1006:
            return "went away without a close frame"
        case 1011:
            return "closed with 1011: its handler failed, look into its log"
        case _:
            meaning = CLOSE_CODES.get(code)
            return f"closed with {code}{f' ({meaning})' if meaning else ', which has no meaning here'}"
