"""Plivo Audio Streaming: mu-law or little-endian L16 in JSON text frames, Plivo being the WebSocket client.

Wire facts: plivo.com/docs/voice-agents/audio-streaming/concepts/audio-streaming-reference, read November 2026.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, assert_never

from msgspec import UNSET, Struct, UnsetType
from msgspec import field as member

from gateway.errors import MalformedFrame, NotStarted, UnsupportedCommand
from gateway.events import (
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Fault,
    Flow,
    Gap,
    Message,
    Outcome,
    Speech,
    Spoken,
    Start,
    Stop,
    StopReason,
    Transcript,
    Unknown,
)
from gateway.media import MULAW_8K, MediaFormat, Track
from gateway.provider import (
    Answer,
    ApiReply,
    Call,
    Dial,
    Habits,
    HttpRequest,
    Identity,
    Limits,
    SignedRequest,
    StreamEnd,
    StreamStatus,
)

from . import _account, _plivo, _plivo_api, _plivo_signature, _xml
from ._json import Id, Milliseconds, Reader, excerpt, sequence_number, write

# Plivo's queue is said to hold 60 s or 40 s, depending on the page: 40 s is safe. 20 ms a frame is what it recommends;
# three of them in one frame still let a clear through at once.
_LIMITS = Limits(lead_ms=200, ceiling_ms=40_000, frame_ms=20, max_frame_ms=60)
_MOST_PER_FRAME = 12_288  # bytes of audio: "base64 audio at 16 KB or less per message"; a whole number of samples in any format
_LARGEST_FRAME = 65_536  # "64 KB per WebSocket message"

_TRACKS = {"inbound": ("inbound",), "outbound": ("outbound",), "both": ("inbound", "outbound")}
_SENDABLE = frozenset("0123456789ABCD*#")
_FAULTS = frozenset({"incorrectPayload", "playFailed", "error"})


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An account whose calls are carried as Plivo audio streams.

    auth_token: the account's auth token, or a list of tokens while rotating; required unless `auth` is given.
    accept_v2: whether Plivo's older signature will do, which protects neither query nor body; default false.
    auth: `none` admits unsigned requests (loopback only); default: signatures are required.
    account_id: the Auth ID, for placing, transferring and ending calls by Plivo's API; default none, it is not asked.
    api_url: where Plivo's API is, up to but without its version; default https://api.plivo.com.
    mode: `converse` (both directions) or `listen` (we only hear); default converse.
    track: what a listening stream hears, `inbound`, `outbound` or `both`; default inbound.
    then: XML elements that run while a listening stream runs, such as <Dial>…</Dial>; required with `mode: listen`.
    after: XML elements that run once the conversation's stream has ended; default none, the call ends.
    service_lost: XML elements that run instead where the service was lost; default `after`.
    overflow: XML elements for a call that there is no room for; default <Hangup reason="busy"/>.
    media_format: encoding and rate in Hz, one of mulaw 8000, pcm_s16le 8000, pcm_s16le 16000; default mulaw 8000.
    parameters: names and values passed to the stream in extraHeaders, 320 bytes together; default none.
    lead_ms: audio sent ahead of real time, milliseconds, 20 to 40000; default 200.
    noise_cancellation: whether Plivo cleans the caller's audio; default false.
    noise_cancellation_level: how much of it, 60 to 100; default Plivo's, which is 85.
    stream_timeout_secs: seconds after which Plivo ends the stream; default 86400.
    """

    auth_token: str | list[str] | None = None
    accept_v2: bool = False
    auth: Literal["none"] | None = None
    account_id: str | None = None
    api_url: str = _plivo_api.API_URL
    mode: Literal["converse", "listen"] = "converse"
    track: Literal["inbound", "outbound", "both"] = "inbound"
    then: str = ""
    after: str = ""
    service_lost: str = ""
    overflow: str = ""
    media_format: MediaFormat = MULAW_8K
    parameters: dict[str, str] = member(default_factory=dict)
    lead_ms: int | None = None
    noise_cancellation: bool = False
    noise_cancellation_level: int | None = None
    stream_timeout_secs: int = 86_400

    def __post_init__(self) -> None:
        _account.object_to(
            _account.check_tokens(self.auth, auth_token=self.auth_token),
            _plivo_api.check(self.account_id, self.auth_token, self.api_url),
            _account.check_names(self.parameters),
            _account.check_mode(self.mode, self.track, self.then, after=self.after, service_lost=self.service_lost),
            _account.check_lead(self.lead_ms, _LIMITS.ceiling_ms),
            _plivo.check_headers(self.parameters),
            _xml.check_elements("then", self.then),
            _xml.check_elements("after", self.after),
            _xml.check_elements("service_lost", self.service_lost),
            _xml.check_elements("overflow", self.overflow),
            self._check(),
        )

    def __repr__(self) -> str:
        return _account.shown(self)

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return _account.masked(self)

    def _check(self) -> Iterable[str]:
        if self.media_format not in _plivo.FORMATS:
            yield f"media_format: Plivo carries mulaw/8000, pcm_s16le/8000 and pcm_s16le/16000, not {self.media_format}"
        level = self.noise_cancellation_level
        if level is not None and not (self.noise_cancellation and 60 <= level <= 100):
            yield f"noise_cancellation_level: {level} is out of range; it is 60 to 100 and needs `noise_cancellation: true`"
        if self.stream_timeout_secs < 1:
            yield f"stream_timeout_secs: {self.stream_timeout_secs} is out of range; Plivo wants a positive number of seconds"


# --- frames from Plivo, as tolerantly as we read them; its own test client leaves out most members ----------------------


class _Format(Struct, rename="camel"):
    encoding: str
    sample_rate: int


class _Stream(Struct, rename="camel"):
    call_id: Id
    stream_id: Id
    account_id: str | None = None
    tracks: list[Track] | None = None
    media_format: _Format | None = None


class _Sound(Struct, gc=False):
    payload: bytes
    track: Track = Track.INBOUND
    timestamp: Milliseconds | None = None


class _Key(Struct):
    digit: str | int


class _Start(Struct, tag_field="event", tag="start"):
    start: _Stream
    extra_headers: Any = None


class _Media(Struct, tag_field="event", tag="media", rename="camel", gc=False):
    media: _Sound
    stream_id: str | None = None


class _Dtmf(Struct, tag_field="event", tag="dtmf", rename="camel"):
    dtmf: _Key
    stream_id: str | None = None


class _PlayedStream(Struct, tag_field="event", tag="playedStream", rename="camel"):
    name: str | int
    stream_id: str | None = None


class _Played(Struct, tag_field="event", tag="played", rename="camel"):
    """The name that a support article gives to playedStream."""

    name: str | int
    stream_id: str | None = None


class _ClearedAudio(Struct, tag_field="event", tag="clearedAudio", rename="camel"):
    stream_id: str | None = None


class _Stop(Struct, tag_field="event", tag="stop", rename="camel"):
    stream_id: str | None = None


class _IncorrectPayload(Struct, tag_field="event", tag="incorrectPayload", rename="camel"):
    reason: Any = None
    stream_id: str | None = None


class _PlayFailed(Struct, tag_field="event", tag="playFailed", rename="camel"):
    reason: Any = None
    stream_id: str | None = None


class _Error(Struct, tag_field="event", tag="error", rename="camel"):
    reason: Any = None
    stream_id: str | None = None


_FromPlivo = _Start | _Media | _Dtmf | _PlayedStream | _Played | _ClearedAudio | _Stop | _IncorrectPayload | _PlayFailed | _Error
_from_plivo: Reader[_FromPlivo] = Reader(_FromPlivo, tag="event")


# --- frames to Plivo, exactly as documented ----------------------------------------------------------------------------


class _Playable(Struct, rename="camel", forbid_unknown_fields=True):
    content_type: str
    sample_rate: int
    payload: bytes


class _PlayAudio(Struct, tag_field="event", tag="playAudio", rename="camel", forbid_unknown_fields=True):
    media: _Playable
    stream_id: str | UnsetType = UNSET  # undocumented, sent by others and known to work; never by us


class _SendCheckpoint(Struct, tag_field="event", tag="checkpoint", rename="camel", forbid_unknown_fields=True):
    stream_id: str
    name: str


class _ClearAudio(Struct, tag_field="event", tag="clearAudio", rename="camel", forbid_unknown_fields=True):
    stream_id: str


class _SendDtmf(Struct, tag_field="event", tag="sendDTMF", forbid_unknown_fields=True):
    dtmf: str


_ToPlivo = _PlayAudio | _SendCheckpoint | _ClearAudio | _SendDtmf
_to_plivo: Reader[_ToPlivo] = Reader(_ToPlivo, tag="event", strict=True)


class Codec:
    """Our half. The start frame says which of the three formats the stream has; the configuration only fills in for it."""

    __slots__ = ("_format", "_media_prefix", "_stream_id", "accepts", "limits")

    def __init__(self, settings: Settings) -> None:
        converse = settings.mode == "converse"
        self.accepts: frozenset[type[Message]] = frozenset({Audio, Dtmf, Checkpoint, Clear, Stop} if converse else ())
        self.limits = Limits(settings.lead_ms or _LIMITS.lead_ms, _LIMITS.ceiling_ms, _LIMITS.frame_ms, _LIMITS.max_frame_ms)
        self._format = settings.media_format
        self._stream_id: str | None = None
        self._media_prefix = ""

    def decode(self, frame: str | bytes) -> Iterable[Event]:
        """Events of one frame; media is looked at first. Raises MalformedFrame and nothing else."""
        message = _from_plivo.read(frame)
        if isinstance(message, Unknown):
            return (message,)
        if isinstance(message, _Start):
            return self._start(message)
        if message.stream_id != self._stream_id:
            self._check_stream(message.stream_id)
        match message:
            case _Media():
                sound = message.media
                if not sound.payload:
                    raise MalformedFrame("empty_payload", "media without audio")
                return (Audio(sound.payload, sound.track, sound.timestamp),)
            case _Dtmf():
                return (Dtmf(_account.heard_digits(str(message.dtmf.digit))),)
            case _PlayedStream() | _Played():
                return (Checkpoint(str(message.name), Outcome.PLAYED),)
            case _ClearedAudio():
                return (Clear(),)
            case _Stop():
                return (Stop(StopReason.CALLER_HANGUP),)
            case _IncorrectPayload():
                return (Fault("incorrectPayload", _because(message.reason, frame)),)
            case _PlayFailed():
                return (Fault("playFailed", _because(message.reason, frame)),)
            case _Error():
                return (Fault("error", _because(message.reason, frame)),)
            case _:
                assert_never(message)

    def number(self, frame: str | bytes) -> int | None:
        """One counter over all of Plivo's messages."""
        return sequence_number(frame)

    def encode(self, command: Command) -> Iterable[str | bytes]:
        """Frames of one command; none for Stop: any stream is ended by closing its socket. See the contract for errors."""
        if isinstance(command, Stop):
            return ()
        if type(command) not in self.accepts:
            raise _account.unsupported("Plivo", command, self.accepts)
        stream_id = self._stream_id
        if stream_id is None:
            raise NotStarted("Plivo has not named the stream yet; what is sent before that is lost in silence")
        match command:
            case Audio():
                return self._play(command.payload)
            case Checkpoint():
                return (write(_SendCheckpoint(stream_id, command.name)),)
            case Clear():
                return (write(_ClearAudio(stream_id)),)
            case Dtmf():
                if not command.digits or not _SENDABLE.issuperset(command.digits):
                    raise UnsupportedCommand(f"Plivo sends the digits 0-9 A-D * #, not {excerpt(command.digits, 64)!r}")
                return (write(_SendDtmf(command.digits)),)
            case _:
                return ()

    def _start(self, message: _Start) -> Iterable[Event]:
        stream = message.start
        if self._stream_id is not None:
            if stream.stream_id == self._stream_id:
                return ()
            raise MalformedFrame("second_start", f"the stream is {self._stream_id}, and another start names {stream.stream_id}")
        if stream.media_format is not None:
            self._format = _plivo.media_format(stream.media_format.encoding, stream.media_format.sample_rate)
        parameters = _plivo.read_headers(message.extra_headers)
        caller, called, direction = _account.take_facts(parameters)
        start = Start(
            stream_id=stream.stream_id,
            call_id=stream.call_id,
            account_id=stream.account_id or "",
            caller=caller,
            called=called,
            direction=direction,
            media_format=self._format,
            tracks=tuple(stream.tracks or (Track.INBOUND,)),
            accepts=_account.accepted(self.accepts),
            parameters=parameters,
        )
        self._stream_id = stream.stream_id
        media = _Playable(_plivo.MEDIA_TYPES[self._format.encoding], self._format.sample_rate, b"")
        self._media_prefix = write(_PlayAudio(media))[: -len('"}}')]
        return (start,)

    def _play(self, payload: bytes) -> Iterable[str]:
        if len(payload) % self._format.sample_bytes:
            raise UnsupportedCommand(f"{len(payload)} bytes are no whole number of {self._format} samples")
        if 0 < len(payload) <= _MOST_PER_FRAME:
            return (self._media_prefix + b2a_base64(payload, newline=False).decode() + '"}}',)
        pieces = (payload[at : at + _MOST_PER_FRAME] for at in range(0, len(payload), _MOST_PER_FRAME))
        return [self._media_prefix + b2a_base64(piece, newline=False).decode() + '"}}' for piece in pieces]

    def _check_stream(self, stream_id: str | None) -> None:
        """Frames before the start name a stream that is not known yet; frames that name none belong to this socket's."""
        if stream_id is not None and self._stream_id is not None and stream_id != self._stream_id:
            raise MalformedFrame("wrong_stream", f"the stream is {self._stream_id}, and the frame is for {stream_id[:64]}")


def _because(reason: object, frame: str | bytes) -> str:
    """The reason of a rumoured event; nobody has written down its members, so without one the frame itself is told."""
    return excerpt(reason if isinstance(reason, str) else str(frame))


class Carrier:
    """Plivo's half: one counter over all messages, chunks counted per track, numbers as numbers but for timestamps."""

    habits: ClassVar[Habits] = Habits(
        says_stop=False, confirms_clear=True, subprotocol="audio.plivo.com", stream_attempts=3, retries_silence=True
    )

    def __init__(self) -> None:
        self._start: Start | None = None
        self._format = MULAW_8K
        self._id_json = ""
        self._headers_json = ""
        self._sequence = 0
        self._chunk = dict.fromkeys(Track, 0)
        self._position = dict.fromkeys(Track, 0.0)

    def encode(self, event: Event) -> Iterable[str | bytes]:
        """Plivo's frames for one event; its Start comes first and names the ids. Raises NotStarted without one."""
        if isinstance(event, Start):
            return (self._open(event),)
        if self._start is None:
            raise NotStarted("the carrier half learns its ids from a Start, which comes first")
        match event:
            case Audio():
                return (self._media(event),)
            case Dtmf():
                at = str(int(self._position[Track.INBOUND]))
                keys = [{"track": "inbound", "digit": digit, "timestamp": at} for digit in event.digits]
                return [self._frame("dtmf", f',"dtmf":{write(key)},"extra_headers":{self._headers_json}') for key in keys]
            case Checkpoint(outcome=Outcome.PLAYED | None):
                return (self._frame("playedStream", f',"name":{write(event.name)}'),)
            case Clear():
                return (self._frame("clearedAudio"),)
            case Fault() if event.code in _FAULTS:
                return (self._frame(event.code, f',"reason":{write(event.message)}'),)
            # The documented protocol has no stop, and acknowledges no checkpoint that was cut.
            case Checkpoint() | Fault() | Stop():
                return ()
            case Transcript() | BargeIn() | Speech() | Spoken() | Gap() | Flow() | Unknown():
                return ()
            case _:
                assert_never(event)

    def decode(self, frame: str | bytes) -> Iterable[Command]:
        """The command of one frame, read strictly. Raises MalformedFrame("incorrectPayload", what is wrong with it)."""
        if self._start is not None and Track.OUTBOUND in self._start.tracks:
            raise _refused("a frame on a stream that is not bidirectional")
        if len(frame) > _LARGEST_FRAME:
            raise _refused(f"a message of {len(frame)} bytes, more than 64 KB")
        try:
            message = _to_plivo.read(frame)
        except MalformedFrame as error:
            raise _refused(str(error)) from error
        if isinstance(message, Unknown):
            raise _refused(f"unknown event {message.kind!r}")
        if self._start is None:
            raise _refused("a frame before the start")
        if not isinstance(message, _SendDtmf) and message.stream_id not in (UNSET, self._start.stream_id):
            raise _refused(f"streamId {str(message.stream_id)[:64]!r} is not this stream's")
        match message:
            case _PlayAudio():
                return (self._audio(message.media),)
            case _SendCheckpoint():
                return (Checkpoint(message.name),)
            case _ClearAudio():
                return (Clear(),)
            case _SendDtmf():
                if not message.dtmf or not _SENDABLE.issuperset(message.dtmf):
                    raise _refused(f"digits {message.dtmf[:64]!r}")
                return (Dtmf(message.dtmf),)
            case _:
                assert_never(message)

    def _audio(self, media: _Playable) -> Audio:
        if (media.content_type, media.sample_rate) != (_plivo.MEDIA_TYPES[self._format.encoding], self._format.sample_rate):
            raise _refused(f"{media.content_type[:64]!r} at {media.sample_rate} on a stream of {self._format}")
        if not media.payload or len(media.payload) % self._format.sample_bytes:
            raise _refused(f"{len(media.payload)} bytes are no whole number of {self._format} samples")
        return Audio(media.payload)

    def _open(self, start: Start) -> str:
        form = start.media_format or MULAW_8K
        if form not in _plivo.FORMATS:
            raise UnsupportedCommand(f"Plivo carries mulaw/8000, pcm_s16le/8000 and pcm_s16le/16000, not {form}")
        self._start, self._format, self._id_json = start, form, write(start.stream_id)
        self._headers_json = write(_plivo.join_headers(start.parameters, ";"))
        self._sequence = 1
        stream = {
            "callId": start.call_id,
            "streamId": start.stream_id,
            "accountId": start.account_id,
            "tracks": start.tracks,
            "mediaFormat": {"encoding": _plivo.MEDIA_TYPES[form.encoding], "sampleRate": form.sample_rate},
        }
        return f'{{"event":"start","sequenceNumber":1,"start":{write(stream)},"extra_headers":{self._headers_json}}}'

    def _frame(self, event: str, members: str = "") -> str:
        self._sequence += 1
        return f'{{"event":"{event}","sequenceNumber":{self._sequence},"streamId":{self._id_json}{members}}}'

    def _media(self, audio: Audio) -> str:
        track = audio.track
        self._chunk[track] += 1
        at = audio.timestamp_ms
        if at is None:
            at = int(self._position[track])
        self._position[track] = at + self._format.duration_ms(len(audio.payload))
        return self._frame(
            "media",
            f',"media":{{"track":"{track}","timestamp":"{at}","chunk":{self._chunk[track]},'
            f'"payload":"{b2a_base64(audio.payload, newline=False).decode()}"}},"extra_headers":{self._headers_json}',
        )


def _refused(detail: str) -> MalformedFrame:
    return MalformedFrame("incorrectPayload", detail)


class Provider:
    """One Plivo account whose calls come as audio streams."""

    Config: ClassVar[type[Struct]] = Settings
    title: ClassVar[str] = "Plivo Audio Streaming"
    docs: ClassVar[str] = "https://plivo.com/docs/voice-agents/audio-streaming/concepts/audio-streaming-reference"
    emits: ClassVar[frozenset[type[Message]]] = frozenset({Start, Audio, Dtmf, Checkpoint, Clear, Fault, Stop})
    subprotocols: ClassVar[tuple[str, ...]] = ("audio.plivo.com",)

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._signer = None if config.auth else _plivo_signature.Signer(config.auth_token, accept_v2=config.accept_v2)
        self._api = _plivo_api.Api(config.account_id, config.auth_token, config.api_url)

    def authenticate(self, request: SignedRequest) -> str:
        """The form of the URL that was signed. Raises SignatureMismatch unless a token of the account signed the request."""
        return self._signer.verify(request) if self._signer is not None else ""

    def identity(self, request: SignedRequest) -> Identity | None:
        """The nonce, which Plivo's signature covers. None with `auth: none`."""
        return self._signer.identity(request) if self._signer is not None else None

    def sign(self, request: SignedRequest) -> Mapping[str, str]:
        """Plivo's headers for this request; none with `auth: none`."""
        return {} if self._signer is None else self._signer.sign(request)

    def answer(
        self,
        request: SignedRequest,
        stream_url: str,
        *,
        action_url: str | None = None,
        status_url: str | None = None,
        resumed: bool = False,
    ) -> Answer:
        """XML that dials `stream_url` and passes the call's facts to our codec. Raises MalformedFrame without a call."""
        config = self._config
        converse = config.mode == "converse"
        attributes: dict[str, _xml.Value] = {
            "bidirectional": True if converse else None,
            "keepCallAlive": True if converse else None,
            "audioTrack": None if converse else config.track,
            "contentType": _plivo.content_type(config.media_format),  # always: two pages disagree about the default
            "streamTimeout": config.stream_timeout_secs,
            "extraHeaders": _plivo.write_headers(config.parameters | _account.facts(self.call(request))) or None,
            "noiseCancellation": True if config.noise_cancellation else None,
            "noiseCancellationLevel": config.noise_cancellation_level,
            "statusCallbackUrl": status_url,
        }
        stream = _xml.element("Stream", attributes, _xml.escape(stream_url))
        if converse and action_url is not None:  # an action is what comes next: the stream keeps the call until it ends
            return Answer(_xml.response(stream, _xml.element("Redirect", None, _xml.escape(action_url))))
        return Answer(_xml.response(stream, (config.after if converse else config.then).strip()))

    def after(self, request: SignedRequest) -> Answer:
        """The configured elements `after`; without any the call ends."""
        return _account.elements(self._config.after)

    def gone(self, request: SignedRequest) -> Answer:
        """The configured elements `service_lost`, else those of `after`."""
        return _account.elements(self._config.service_lost, self._config.after)

    def overflow(self) -> Answer:
        """The configured elements `overflow`, else a busy tone."""
        return _account.elements(self._config.overflow, _plivo.BUSY)

    def status(self, request: SignedRequest) -> StreamStatus:
        """What a status callback says. Never raises."""
        return _plivo.status(request)

    def call(self, request: SignedRequest) -> Call:
        """The call of a webhook. Raises MalformedFrame when it names none."""
        return _plivo.call(request)

    def place_call(self, to: str, from_: str, answer_url: str, *, status_url: str | None = None) -> HttpRequest:
        """Plivo's request for a call. Raises UnsupportedCommand without `account_id`."""
        return self._api.place(to, from_, answer_url, status_url)

    def hang_up_call(self, call_id: str) -> HttpRequest:
        """Plivo's request to end a call. Raises UnsupportedCommand without `account_id`."""
        return self._api.hang_up(call_id)

    def transfer_call(
        self, call_id: str, *, xml: str = "", url: str = "", publish: Callable[[str], str] | None = None
    ) -> HttpRequest:
        """Plivo's request to go on otherwise. Raises UnsupportedCommand for what can't be asked."""
        return self._api.transfer(call_id, xml=xml, url=url, publish=publish)

    def reply(self, status: int, body: bytes) -> ApiReply:
        """What Plivo answered. Never raises."""
        return _plivo_api.reply(status, body)

    def codec(self) -> Codec:
        """A fresh codec for one stream."""
        return Codec(self._config)

    @classmethod
    def carrier(cls) -> Carrier:
        """A fresh Plivo for one stream."""
        return Carrier()

    @classmethod
    def webhook(cls, call: Call, url: str, ended: StreamEnd | None = None) -> HttpRequest:
        """Plivo's POST that asks `url` what to do with `call`, or what next once its stream `ended` (unsigned)."""
        return _plivo.webhook(call, url, ended)

    @classmethod
    def dial(cls, answer: str) -> Dial:
        """What Plivo reads out of our answer. Raises MalformedFrame with the hangup code or the word it would report."""
        response = _xml.parse(answer, _plivo.BAD_ANSWER)
        stream = response.find("Stream")
        if stream is None:
            raise MalformedFrame(_plivo.BAD_ANSWER, "the answer starts no <Stream>")
        url = (stream.text or "").strip()
        _account.check_stream_url(url, scheme="connection_failed", malformed="connection_failed")
        if len(url) > 2048:
            raise MalformedFrame("connection_failed", f"the stream URL has {len(url)} characters, more than 2048")
        track, bidirectional = stream.get("audioTrack", "inbound"), stream.get("bidirectional") == "true"
        if track not in _TRACKS or (bidirectional and track != "inbound"):
            raise MalformedFrame(_plivo.BAD_ANSWER, f"audioTrack {track!r}, bidirectional {bidirectional}")
        kind = stream.get("contentType", "")
        form = next((known for known in _plivo.FORMATS if _plivo.content_type(known) == kind), None)
        if form is None:
            raise MalformedFrame("invalid_content_type", f"contentType {kind!r}")
        headers = stream.get("extraHeaders", "")
        if len(headers.encode()) > _plivo.HEADER_BYTES:
            raise MalformedFrame(_plivo.BAD_ANSWER, "extraHeaders has more than 512 bytes")
        follows = response[[*response].index(stream) + 1 :]
        action = (follows[0].text or "").strip() if follows and follows[0].tag == "Redirect" else None
        status = stream.get("statusCallbackUrl")
        return Dial(url, _plivo.read_headers(headers), form, _TRACKS[track], bidirectional, action, status_url=status)
