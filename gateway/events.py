"""The vocabulary. Events are facts from the call to services; commands are orders from a service to the call.

The same structs serve both ways: what a service sends down comes back up once it has happened. `Event` and `Command`
are the two unions; every `match` over them ends in `assert_never`. Times are milliseconds.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct, field

from gateway.media import MediaFormat, Track


class Outcome(StrEnum):
    """What became of the audio before a checkpoint."""

    PLAYED = "played"
    CLEARED = "cleared"
    LOST = "lost"


class After(StrEnum):
    """When a `Stop` takes effect: at once, or once the queue has played."""

    NOW = "now"
    PLAYED = "played"


class StopReason(StrEnum):
    """Why a stream ended. `handoff` texts and details go into other fields."""

    CALLER_HANGUP = "caller_hangup"  # the carrier said stop
    CARRIER_CLOSED = "carrier_closed"  # its socket went away without a stop
    SERVICE_STOP = "service_stop"  # the service asked for it
    SERVICE_LOST = "service_lost"  # no service (any more)
    DRAIN = "drain"  # this gateway is going away
    PROTOCOL_ERROR = "protocol_error"  # too many bad frames
    TIMEOUT = "timeout"  # no start in time, or nothing more from a carrier that is still connected
    DETACHED = "detached"  # an operator took this listener off the call, which goes on


class GapReason(StrEnum):
    CARRIER = "carrier"  # the carrier's timestamps skipped
    OVERFLOW = "overflow"  # a bounded queue was full: the service is too slow
    RESUME = "resume"  # the service was away


class Party(StrEnum):
    CALLER = "caller"
    AGENT = "agent"


class FlowState(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"


class Message(Struct, frozen=True, tag_field="type", tag=True):
    """Root of the vocabulary; never made itself."""


class Start(Message, frozen=True):
    """Up: the stream is up; always first. `media_format` is None on a text-only stream, `accepts` names its commands."""

    stream_id: str
    call_id: str
    account_id: str = ""
    caller: str = ""
    called: str = ""
    direction: str = ""  # "inbound", "outbound", or "" where the wire does not say
    media_format: MediaFormat | None = None
    tracks: tuple[Track, ...] = (Track.INBOUND,)
    accepts: tuple[str, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)


class Audio(Message, frozen=True, gc=False):
    """Up: samples of one track, in the format of `Start`. Down: play this.

    `timestamp_ms` is the carrier's presentation time of the first sample, of unknown origin; None where it gave none.
    """

    payload: bytes
    track: Track = Track.INBOUND
    timestamp_ms: int | None = None


class Dtmf(Message, frozen=True):
    """Up: keys pressed. Down: send digits (`0-9 * # A-D`, and `w` for a pause where the carrier knows it)."""

    digits: str
    ref: str | int | None = None


class Checkpoint(Message, frozen=True):
    """Down: tell me when all before it has played. Up: reached, with what really happened.

    `played_ms` counts the audio between the previous checkpoint (or clear, or the start) and this one that the caller heard.
    """

    name: str
    outcome: Outcome | None = None
    played_ms: int = 0
    ref: str | int | None = None


class Clear(Message, frozen=True):
    """Down: cut playback now. Up: playback was cut.

    `played_ms` is what the caller heard since the last checkpoint that played (or clear, or the start); `cleared_ms` what was
    thrown away.
    """

    played_ms: int = 0
    cleared_ms: int = 0
    ref: str | int | None = None


class Transcript(Message, frozen=True):
    """Up: the caller's words. A partial (`final` false) is the whole utterance so far and may be rewritten."""

    text: str
    final: bool = True
    language: str = ""


class BargeIn(Message, frozen=True):
    """Up: the caller spoke over us. `heard` is what was spoken of the current segment, not of the whole turn."""

    heard: str = ""
    after_ms: int = 0


class Speech(Message, frozen=True):
    """Up: someone starts or stops talking."""

    who: Party
    active: bool


class Spoken(Message, frozen=True):
    """Up: words that reached the caller, in the carrier's own pieces. `tones`: digits that we sent, reported likewise."""

    text: str
    tones: bool = False


class Say(Message, frozen=True):
    """Down: speak text. `final` closes the talk cycle; None leaves a choice to the stream's configuration."""

    text: str
    final: bool = True
    language: str | None = None
    interruptible: bool | None = None
    preemptible: bool | None = None
    ref: str | int | None = None


class Play(Message, frozen=True):
    """Down: play a media URL `loop` times."""

    source: str
    loop: int = 1
    interruptible: bool | None = None
    preemptible: bool | None = None
    ref: str | int | None = None


class Language(Message, frozen=True):
    """Down: switch the language of synthesis (`speech`), of recognition (`transcription`), or of both."""

    speech: str | None = None
    transcription: str | None = None
    ref: str | int | None = None


class Gap(Message, frozen=True):
    """Up: audio that should be there is not."""

    lost_ms: int
    track: Track = Track.INBOUND
    reason: GapReason = GapReason.CARRIER


class Flow(Message, frozen=True):
    """Up, to the speaking service only: pause (the playout queue is half full) or resume sending audio."""

    state: FlowState
    buffered_ms: int


class Fault(Message, frozen=True):
    """Up: the carrier or the gateway refused something. `ref` is the `id` of the command, if it had one."""

    code: str
    message: str = ""
    ref: str | int | None = None


class Unknown(Message, frozen=True):
    """Up: a well-formed frame that this codec does not know. Counted, never an error, never sent to services."""

    kind: str


class Account(Struct, frozen=True):
    """Where a stream's audio went, in milliseconds. received = forwarded + dropped; queued = played + cleared + lost."""

    received: int = 0
    forwarded: int = 0
    dropped: int = 0
    queued: int = 0
    played: int = 0
    cleared: int = 0
    lost: int = 0


class Stop(Message, frozen=True):
    """Up: the stream is over; exactly one, always last. Down: end it, now or after the queue has played."""

    reason: StopReason = StopReason.SERVICE_STOP
    handoff: str | None = None
    after: After = After.NOW
    account: Account | None = None
    ref: str | int | None = None


Event = Start | Audio | Dtmf | Checkpoint | Clear | Transcript | BargeIn | Speech | Spoken | Gap | Flow | Fault | Unknown | Stop
"""Facts, upwards. Counterpart: `Command`."""

Command = Audio | Dtmf | Checkpoint | Clear | Say | Play | Language | Stop
"""Orders, downwards. Counterpart: `Event`."""

COMMAND_NAMES: dict[type[Message], str] = {
    Audio: "audio",
    Dtmf: "dtmf",
    Checkpoint: "checkpoint",
    Clear: "clear",
    Say: "say",
    Play: "play",
    Language: "language",
    Stop: "stop",
}
"""The word for each command in `Start.accepts` and in the service protocol."""
