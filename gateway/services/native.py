"""Our own service protocol, version 1: the words of gateway/PROTOCOL.md. In raw mode one more object of the `Carrier` shape.

Pure. Up: events become JSON text messages and bare samples. Down: text messages become commands, bare samples `Audio`. What
framed mode adds are two texts from the service, `Ready` and `Ack`, which `read` gives; its binary header is in `framed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeVar, assert_never

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from gateway.errors import MalformedFrame
from gateway.events import (
    Account,
    After,
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Fault,
    Flow,
    FlowState,
    Gap,
    GapReason,
    Language,
    Outcome,
    Party,
    Play,
    Say,
    Speech,
    Spoken,
    Start,
    Stop,
    StopReason,
    Transcript,
    Unknown,
)
from gateway.media import MediaFormat, Track
from gateway.provider import Habits

SUBPROTOCOL_RAW = "telephony-gateway.v1.raw"


# --- from the gateway ---


class Up(Struct, frozen=True, tag_field="type"):
    """Root of the messages from the gateway. A message's docstring says what it is, and `field: text` lines its fields:
    gateway/asyncapi.yaml is made of them.
    """


class Resume(Struct, frozen=True):
    """Where a stream stands that has lost its service: frame numbers both ways, and what the caller has yet to hear.

    session: the stream's id, the same as before.
    oldest: number of the oldest audio frame that the gateway can still send.
    next: number that the gateway's next new frame will have.
    next_out: number of the first frame of the service's that the gateway has not taken; lower ones are dropped when sent again.
    queued_ms: audio of the service's that the caller has yet to hear.
    checkpoints: names that are not yet resolved; each will still come back.
    """

    session: str
    oldest: int
    next: int
    next_out: int
    queued_ms: int
    checkpoints: tuple[str, ...]


class StartUp(Up, frozen=True, tag="start"):
    """The call is there. Always the first message of a connection.

    session: the gateway's id of the stream; unique, and the same on each connection for it.
    provider: the carrier account's name in the gateway's configuration.
    kind: the carrier's protocol.
    stream_id: the carrier's id of the stream.
    call_id: the carrier's id of the call.
    account_id: the carrier's id of the account, or empty.
    caller: who calls, as the carrier writes it; may be empty.
    called: who is called, likewise.
    direction: `inbound`, `outbound`, or empty where the carrier does not say.
    role: `speaker`: audio and commands are carried out; `listener`: they are refused.
    track: what the audio messages hold: `inbound` what the caller says, `outbound` what the caller hears.
    media_format: of the audio in both directions; null on a stream of text, which carries no audio.
    frame_ms: audio in each message from the gateway; only the last may be shorter.
    accepts: the commands that this call can carry out; others come back as a `fault`.
    parameters: the stream's custom parameters.
    resume: framed mode, on a connection that takes up a stream again; null on a first one.
    """

    session: str
    provider: str
    kind: str
    stream_id: str
    call_id: str
    account_id: str
    caller: str
    called: str
    direction: str
    role: str
    track: Track
    media_format: MediaFormat | None
    frame_ms: int
    accepts: tuple[str, ...]
    parameters: dict[str, str]
    resume: Resume | None = None


class DtmfUp(Up, frozen=True, tag="dtmf"):
    """The caller pressed keys.

    digits: of `0-9 * # A-D`.
    """

    digits: str


class CheckpointUp(Up, frozen=True, tag="checkpoint"):
    """What became of the audio before a checkpoint. Each one that was sent comes back exactly once.

    name: as it was sent.
    outcome: `played`: the caller heard all before it; `cleared`: it was cut; `lost`: the stream ended first.
    played_ms: audio between the previous checkpoint (or clear, or the start) and this one that the caller heard.
    """

    name: str
    outcome: Outcome
    played_ms: int


class ClearUp(Up, frozen=True, tag="clear"):
    """Playback was cut. Comes after the checkpoints that were cut with it.

    played_ms: what the caller heard since the last checkpoint that played (or clear, or the start).
    cleared_ms: what was thrown away.
    """

    played_ms: int
    cleared_ms: int


class TranscriptUp(Up, frozen=True, tag="transcript"):
    """The caller's words, on a stream of text.

    text: a partial one is the whole utterance so far and may be rewritten.
    final: whether it will not change any more.
    language: a tag such as `en-US`, or empty.
    """

    text: str
    final: bool
    language: str


class BargeInUp(Up, frozen=True, tag="barge_in"):
    """The caller spoke over the agent, on a stream of text; what was still to be spoken is gone.

    heard: what was spoken of the current segment.
    after_ms: when in it the caller spoke.
    """

    heard: str
    after_ms: int


class SpeechUp(Up, frozen=True, tag="speech"):
    """Somebody starts or stops talking.

    who: `caller` or `agent`.
    active: whether they are talking now.
    """

    who: Party
    active: bool


class SpokenUp(Up, frozen=True, tag="spoken"):
    """Words that reached the caller, on a stream of text.

    text: in the carrier's own pieces.
    """

    text: str


class GapUp(Up, frozen=True, tag="gap"):
    """Audio that should be there is not.

    track: which half of the call.
    lost_ms: how much.
    reason: `carrier`: it never came, and silence stands in its place; `overflow`: the service was too slow; `resume`: the service
      was away.
    """

    track: Track
    lost_ms: int
    reason: GapReason


class FlowUp(Up, frozen=True, tag="flow"):
    """Stop sending audio (`pause`), or go on (`resume`). What is sent in spite of a pause is refused once the queue is full.

    state: `pause` at half of the queue's capacity, `resume` at a quarter.
    buffered_ms: audio that waits to be played.
    """

    state: FlowState
    buffered_ms: int


class FaultUp(Up, frozen=True, tag="fault"):
    """Something was refused. The call goes on.

    code: for programs, such as `malformed_command` or `unsupported_command`.
    message: for people: what was wrong with it.
    ref: the `id` of the command that was refused, if it had one.
    """

    code: str
    message: str
    ref: str | int | None


class AckUp(Up, frozen=True, tag="ack"):
    """Framed mode: the service's audio arrived.

    seq: the highest frame taken.
    """

    seq: int


class StopUp(Up, frozen=True, tag="stop"):
    """The stream is over. Always last; the gateway then closes with 1000.

    reason: why.
    account: where the audio went, in milliseconds.
    """

    reason: StopReason
    account: Account


# --- from the service ---


class Down(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    """Root of the messages from a service. A misspelt field is refused, not ignored: it would be a command half understood.

    id: anything; a `fault` about this message has it as `ref`.
    """

    id: str | int | None = None


class CheckpointDown(Down, frozen=True, tag="checkpoint", kw_only=True):
    """Tell me when the caller has heard all audio that I sent before this.

    name: comes back with the outcome.
    """

    name: str


class ClearDown(Down, frozen=True, tag="clear", kw_only=True):
    """Cut playback at once. Comes back as `clear`, after the checkpoints that it cut."""


class DtmfDown(Down, frozen=True, tag="dtmf", kw_only=True):
    """Send digits.

    digits: of `0-9 * # A-D`.
    """

    digits: str


class SayDown(Down, frozen=True, tag="say", kw_only=True):
    """Speak text.

    text: what to speak.
    final: whether that was all for this turn.
    language: a tag such as `en-US`; default: the stream's.
    interruptible: whether the caller can interrupt it; default: the stream's.
    preemptible: whether later text cuts it off; default: the stream's.
    """

    text: str
    final: bool = True
    language: str | None = None
    interruptible: bool | None = None
    preemptible: bool | None = None


class PlayDown(Down, frozen=True, tag="play", kw_only=True):
    """Play a recording.

    source: its URL.
    loop: how often.
    interruptible: whether the caller can interrupt it; default: the stream's.
    preemptible: whether later text cuts it off; default: the stream's.
    """

    source: str
    loop: int = 1
    interruptible: bool | None = None
    preemptible: bool | None = None


class LanguageDown(Down, frozen=True, tag="language", kw_only=True):
    """Switch languages.

    speech: of what is spoken; default: as it is.
    transcription: of what is understood; default: as it is.
    """

    speech: str | None = None
    transcription: str | None = None


class StopDown(Down, frozen=True, tag="stop", kw_only=True):
    """End the stream.

    after: `now`, or `played`: once the caller has heard everything.
    handoff: for whoever takes the call next, where the carrier can pass it on.
    """

    after: After = After.NOW
    handoff: str | None = None


class Ready(Down, frozen=True, tag="ready", kw_only=True):
    """Framed mode: the first message of each connection; until then nothing but `start` is sent.

    next: the first frame wanted; null: what comes from now on; left out: all that has not been acknowledged.
    """

    next: Annotated[int, Meta(ge=0)] | UnsetType | None = UNSET


class Ack(Down, frozen=True, tag="ack", kw_only=True):
    """Framed mode: audio arrived, and need not be kept to be sent again.

    seq: the highest frame taken.
    """

    seq: Annotated[int, Meta(ge=0)]


DownMessage = CheckpointDown | ClearDown | DtmfDown | SayDown | PlayDown | LanguageDown | StopDown
FramedMessage = DownMessage | Ready | Ack

_decoder = msgspec.json.Decoder(DownMessage)
_framed_decoder = msgspec.json.Decoder(FramedMessage)
_encoder = msgspec.json.Encoder()
_T = TypeVar("_T")


class _Ref(Struct):
    id: str | int | None = None


_ref_decoder = msgspec.json.Decoder(_Ref)


class Malformed(MalformedFrame):
    """A message from a service that can't be read. `ref` is its `id`, as far as that could be read."""

    def __init__(self, detail: str, ref: str | int | None) -> None:
        super().__init__("malformed_command", detail)
        self.detail = detail
        self.ref = ref


class NativeCarrier:
    """One connection's protocol object. The link has converted audio to `media_format` already."""

    habits = Habits(confirms_clear=True)

    def __init__(
        self, *, session: str, provider: str, kind: str, role: str, track: Track, media_format: MediaFormat | None, frame_ms: int
    ) -> None:
        self._session = session
        self._provider = provider
        self._kind = kind
        self._role = role
        self._track = track
        self._media_format = media_format
        self._frame_ms = frame_ms

    def encode(self, event: Event) -> Iterable[str | bytes]:
        """The messages for one event; none for what services are not told."""
        if type(event) is Audio:
            return (event.payload,)
        message = self._message(event)
        return () if message is None else (_encoder.encode(message).decode(),)

    def decode(self, frame: str | bytes) -> Iterable[Command]:
        """The command of one message. Raises Malformed with a sentence for the service's author."""
        if isinstance(frame, bytes):
            return (Audio(frame),) if frame else ()
        return (_command(_decoded(_decoder, frame)),)

    def read(self, text: str) -> Command | Ready | Ack:
        """The command, or the housekeeping, of one text in framed mode. Raises Malformed."""
        message = _decoded(_framed_decoder, text)
        return message if isinstance(message, (Ready, Ack)) else _command(message)

    def start(self, start: Start, resume: Resume | None) -> str:
        """The first message of a connection."""
        return _encoder.encode(self._start(start, resume)).decode()

    def _start(self, start: Start, resume: Resume | None) -> StartUp:
        return StartUp(
            session=self._session,
            provider=self._provider,
            kind=self._kind,
            stream_id=start.stream_id,
            call_id=start.call_id,
            account_id=start.account_id,
            caller=start.caller,
            called=start.called,
            direction=start.direction,
            role=self._role,
            track=self._track,
            media_format=self._media_format,
            frame_ms=self._frame_ms,
            accepts=start.accepts,
            parameters=start.parameters,
            resume=resume,
        )

    def _message(self, event: Event) -> Up | None:
        match event:
            case Start():
                return self._start(event, None)
            case Dtmf():
                return DtmfUp(event.digits)
            case Checkpoint():
                return None if event.outcome is None else CheckpointUp(event.name, event.outcome, event.played_ms)
            case Clear():
                return ClearUp(event.played_ms, event.cleared_ms)
            case Transcript():
                return TranscriptUp(event.text, event.final, event.language)
            case BargeIn():
                return BargeInUp(event.heard, event.after_ms)
            case Speech():
                return SpeechUp(event.who, event.active)
            case Spoken():
                return None if event.tones else SpokenUp(event.text)
            case Gap():
                return GapUp(event.track, event.lost_ms, event.reason)
            case Flow():
                return FlowUp(event.state, event.buffered_ms)
            case Fault():
                return FaultUp(event.code, event.message, event.ref)
            case Stop():
                return StopUp(event.reason, event.account or Account())
            case Unknown() | Audio():
                return None
            case _ as never:
                assert_never(never)


def numbered(text: str, number: int, replayed: bool) -> str:
    """A text as framed mode sends it: with its number, which a service may use to take each text once."""
    mark = ',"replayed":true' if replayed else ""
    return f'{text[:-1]},"n":{number}{mark}}}'


def acknowledgement(seq: int) -> str:
    """The text that acknowledges a service's audio."""
    return _encoder.encode(AckUp(seq)).decode()


def _decoded(decoder: msgspec.json.Decoder[_T], text: str) -> _T:
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Malformed(str(error), _ref_of(text)) from error


def _command(message: DownMessage) -> Command:
    ref = message.id
    match message:
        case CheckpointDown():
            return Checkpoint(message.name, ref=ref)
        case ClearDown():
            return Clear(ref=ref)
        case DtmfDown():
            return Dtmf(message.digits, ref=ref)
        case SayDown():
            return Say(message.text, message.final, message.language, message.interruptible, message.preemptible, ref)
        case PlayDown():
            return Play(message.source, message.loop, message.interruptible, message.preemptible, ref)
        case LanguageDown():
            return Language(message.speech, message.transcription, ref)
        case StopDown():
            return Stop(handoff=message.handoff, after=message.after, ref=ref)
        case _ as never:
            assert_never(never)


def _ref_of(frame: str) -> str | int | None:
    try:
        return _ref_decoder.decode(frame).id
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
