"""Twilio Media Streams: raw mu-law in JSON text frames, Twilio being the WebSocket client.

Wire facts: twilio.com/docs/voice/media-streams/websocket-messages and /voice/twiml/stream, read November 2026.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, assert_never

from msgspec import Struct
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
from gateway.media import MULAW_8K, Track
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

from . import _account, _twilio, _twilio_api, _twilio_signature, _xml
from ._json import Id, Milliseconds, Reader, sequence_number, texts, write

# Twilio publishes neither a largest frame nor a largest queue, and takes frames faster than real time. 5 s keeps barge-in
# accurate; 60 ms is what integrators coalesce small chunks to; more than 200 ms in one frame would only delay a clear behind it.
_LIMITS = Limits(lead_ms=200, ceiling_ms=5000, frame_ms=20, max_frame_ms=60)
_MOST_PER_FRAME = MULAW_8K.bytes_for(200)

# Twilio has three vocabularies for tracks: these words in TwiML, ours in start and media, and "inbound_track" in dtmf.
_TRACK_WORDS = {"inbound": "inbound_track", "outbound": "outbound_track", "both": "both_tracks"}
_TRACKS = {"inbound_track": ("inbound",), "outbound_track": ("outbound",), "both_tracks": ("inbound", "outbound")}


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An account whose calls are carried as Twilio Media Streams.

    auth_token: the account's primary auth token, or a list of tokens while rotating; required unless `auth` is given.
    signing_key: secret of a signing key (SharedKey), or a list, for requests that Twilio signs by HMAC-SHA256; default none.
    auth: `none` admits unsigned requests (loopback only); default: signatures are required.
    account_id: the Account SID (AC…), for placing, transferring and ending calls by Twilio's API; default none, it is not asked.
    api_url: where Twilio's API is, up to but without its version; default https://api.twilio.com.
    mode: `converse` (<Connect>, both directions) or `listen` (<Start>, we only hear); default converse.
    track: what a listening stream hears, `inbound`, `outbound` or `both`; default inbound.
    then: TwiML elements that run while a listening stream runs, such as <Dial>…</Dial>; required with `mode: listen`.
    after: TwiML elements that run once the conversation's stream has ended; default none, the call ends.
    service_lost: TwiML elements that run instead where the service was lost; default `after`.
    overflow: TwiML elements for a call that there is no room for; default <Reject reason="busy"/>.
    stream_name: the stream's name in status callbacks and for <Stop><Stream name="…"/></Stop>; default the StreamSid.
    parameters: names and values passed to the stream as <Parameter>, under 500 characters a pair; default none.
    lead_ms: audio sent ahead of real time, milliseconds, 20 to 5000; default 200.
    """

    auth_token: str | list[str] | None = None
    signing_key: str | list[str] | None = None
    auth: Literal["none"] | None = None
    account_id: str | None = None
    api_url: str = _twilio_api.API_URL
    mode: Literal["converse", "listen"] = "converse"
    track: Literal["inbound", "outbound", "both"] = "inbound"
    then: str = ""
    after: str = ""
    service_lost: str = ""
    overflow: str = ""
    stream_name: str | None = None
    parameters: dict[str, str] = member(default_factory=dict)
    lead_ms: int | None = None

    def __post_init__(self) -> None:
        _account.object_to(
            _account.check_tokens(self.auth, auth_token=self.auth_token, signing_key=self.signing_key),
            _twilio_api.check(self.account_id, self.auth_token, self.api_url),
            _account.check_names(self.parameters),
            _account.check_mode(self.mode, self.track, self.then, after=self.after, service_lost=self.service_lost),
            _account.check_lead(self.lead_ms, _LIMITS.ceiling_ms),
            _twilio.check_parameters(self.parameters),
            _xml.check_elements("then", self.then),
            _xml.check_elements("after", self.after),
            _xml.check_elements("service_lost", self.service_lost),
            _xml.check_elements("overflow", self.overflow),
        )

    def __repr__(self) -> str:
        return _account.shown(self)

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return _account.masked(self)


# --- frames from Twilio, as tolerantly as we read them -----------------------------------------------------------------


class _Format(Struct, rename="camel"):
    encoding: str
    sample_rate: int
    channels: int = 1


class _Stream(Struct, rename="camel"):
    call_sid: Id
    media_format: _Format
    stream_sid: str | None = None
    account_sid: str | None = None
    tracks: list[Track] | None = None
    custom_parameters: dict[str, Any] | None = None


class _Sound(Struct, gc=False):
    payload: bytes
    track: Track = Track.INBOUND
    timestamp: Milliseconds | None = None


class _Key(Struct):
    digit: str | int


class _Label(Struct):
    name: str | int


class _Connected(Struct, tag_field="event", tag="connected"):
    pass


class _Start(Struct, tag_field="event", tag="start", rename="camel"):
    start: _Stream
    stream_sid: str | None = None


class _Media(Struct, tag_field="event", tag="media", rename="camel", gc=False):
    media: _Sound
    stream_sid: str | None = None


class _Dtmf(Struct, tag_field="event", tag="dtmf", rename="camel"):
    dtmf: _Key
    stream_sid: str | None = None


class _Mark(Struct, tag_field="event", tag="mark", rename="camel"):
    mark: _Label
    stream_sid: str | None = None


class _Stop(Struct, tag_field="event", tag="stop", rename="camel"):
    stream_sid: str | None = None


_FromTwilio = _Connected | _Start | _Media | _Dtmf | _Mark | _Stop
_from_twilio: Reader[_FromTwilio] = Reader(_FromTwilio, tag="event")


# --- frames to Twilio, exactly as documented: an unexpected member is warning 31951 ------------------------------------


class _Payload(Struct, forbid_unknown_fields=True):
    payload: bytes


class _Name(Struct, forbid_unknown_fields=True):
    name: str


class _SendMedia(Struct, tag_field="event", tag="media", rename="camel", forbid_unknown_fields=True):
    stream_sid: str
    media: _Payload


class _SendMark(Struct, tag_field="event", tag="mark", rename="camel", forbid_unknown_fields=True):
    stream_sid: str
    mark: _Name


class _SendClear(Struct, tag_field="event", tag="clear", rename="camel", forbid_unknown_fields=True):
    stream_sid: str


_ToTwilio = _SendMedia | _SendMark | _SendClear
_to_twilio: Reader[_ToTwilio] = Reader(_ToTwilio, tag="event", strict=True)


class Codec:
    """Our half. A listening stream accepts nothing: Twilio answers any frame on it with protocol error 31924."""

    __slots__ = ("_media_prefix", "_sid", "accepts", "limits")

    def __init__(self, settings: Settings) -> None:
        converse = settings.mode == "converse"
        self.accepts: frozenset[type[Message]] = frozenset({Audio, Checkpoint, Clear, Stop} if converse else ())
        self.limits = Limits(settings.lead_ms or _LIMITS.lead_ms, _LIMITS.ceiling_ms, _LIMITS.frame_ms, _LIMITS.max_frame_ms)
        self._sid: str | None = None
        self._media_prefix = ""  # of a media frame, once audio can be sent

    def decode(self, frame: str | bytes) -> Iterable[Event]:
        """Events of one frame; media is looked at first. Raises MalformedFrame and nothing else."""
        message = _from_twilio.read(frame)
        if isinstance(message, _Media):
            if message.stream_sid != self._sid:
                self._check_sid(message.stream_sid)
            sound = message.media
            if not sound.payload:
                raise MalformedFrame("empty_payload", "media without audio")
            return (Audio(sound.payload, sound.track, sound.timestamp),)
        if isinstance(message, Unknown):
            return (message,)
        match message:
            case _Connected():
                return ()
            case _Start():
                return self._start(message)
            case _Dtmf():
                event: Event = Dtmf(_account.heard_digits(str(message.dtmf.digit)))
            case _Mark():
                event = Checkpoint(str(message.mark.name), Outcome.PLAYED)
            case _Stop():
                event = Stop(StopReason.CALLER_HANGUP)
            case _:
                assert_never(message)
        self._check_sid(message.stream_sid)
        return (event,)

    def number(self, frame: str | bytes) -> int | None:
        """One counter over all of Twilio's messages."""
        return sequence_number(frame)

    def encode(self, command: Command) -> Iterable[str | bytes]:
        """Frames of one command; none for Stop: any stream is ended by closing its socket. See the contract for errors."""
        if self._media_prefix and isinstance(command, Audio):
            return self._media(command.payload)
        if isinstance(command, Stop):
            return ()
        if type(command) not in self.accepts:
            raise _account.unsupported("Twilio Media Streams", command, self.accepts)
        sid = self._sid
        if sid is None:
            raise NotStarted("Twilio has not named the stream yet, so nothing can be sent")
        match command:
            case Checkpoint():
                return (write(_SendMark(sid, _Name(command.name))),)
            case Clear():
                return (write(_SendClear(sid)),)
            case _:
                return ()

    def _start(self, message: _Start) -> Iterable[Event]:
        stream = message.start
        sid = message.stream_sid or stream.stream_sid
        if not sid:
            raise MalformedFrame("missing_field", "start has no streamSid")
        if stream.stream_sid and stream.stream_sid != sid:
            raise MalformedFrame("wrong_stream", "start names two different streams")
        if self._sid is not None:
            if sid == self._sid:
                return ()
            raise MalformedFrame("second_start", f"the stream is {self._sid}, and another start names {sid[:64]}")
        form = stream.media_format
        if (form.encoding.lower(), form.sample_rate, form.channels) != ("audio/x-mulaw", 8000, 1):
            raise MalformedFrame("unsupported_format", f"{form.encoding[:64]}, {form.sample_rate} Hz, {form.channels} channels")
        parameters = texts(stream.custom_parameters)
        caller, called, direction = _account.take_facts(parameters)
        start = Start(
            stream_id=sid,
            call_id=stream.call_sid,
            account_id=stream.account_sid or "",
            caller=caller,
            called=called,
            direction=direction,
            media_format=MULAW_8K,
            tracks=tuple(stream.tracks or (Track.INBOUND,)),
            accepts=_account.accepted(self.accepts),
            parameters=parameters,
        )
        self._sid = sid
        if Audio in self.accepts:
            self._media_prefix = write(_SendMedia(sid, _Payload(b"")))[: -len('"}}')]
        return (start,)

    def _media(self, payload: bytes) -> Iterable[str]:
        if 0 < len(payload) <= _MOST_PER_FRAME:
            return (self._media_prefix + b2a_base64(payload, newline=False).decode() + '"}}',)
        pieces = (payload[at : at + _MOST_PER_FRAME] for at in range(0, len(payload), _MOST_PER_FRAME))
        return [self._media_prefix + b2a_base64(piece, newline=False).decode() + '"}}' for piece in pieces]

    def _check_sid(self, sid: str | None) -> None:
        """Frames before the start name a stream that is not known yet; frames that name none belong to this socket's."""
        if sid is not None and self._sid is not None and sid != self._sid:
            raise MalformedFrame("wrong_stream", f"the stream is {self._sid}, and the frame is for {sid[:64]}")


class Carrier:
    """Twilio's half: one counter over everything after `connected`, chunks counted over both tracks, numbers as strings."""

    habits: ClassVar[Habits] = Habits(says_stop=True, echoes_cleared=True, id_prefixes=("CA", "MZ", "AC"))

    def __init__(self) -> None:
        self._start: Start | None = None
        self._sid_json = ""
        self._sequence = 0
        self._chunk = 0
        self._position = dict.fromkeys(Track, 0.0)

    def encode(self, event: Event) -> Iterable[str | bytes]:
        """Twilio's frames for one event; its Start comes first and names the ids. Raises NotStarted without one."""
        if isinstance(event, Start):
            return self._open(event)
        if self._start is None:
            raise NotStarted("the carrier half learns its ids from a Start, which comes first")
        match event:
            case Audio():
                return (self._media(event),)
            case Dtmf():
                return [self._frame("dtmf", {"track": "inbound_track", "digit": digit}) for digit in event.digits]
            case Checkpoint(outcome=Outcome.LOST):
                return ()
            case Checkpoint():
                return (self._frame("mark", {"name": event.name}),)
            case Stop():
                return (self._frame("stop", {"accountSid": self._start.account_id, "callSid": self._start.call_id}),)
            case Clear() | Transcript() | BargeIn() | Speech() | Spoken() | Gap() | Flow() | Fault() | Unknown():
                return ()
            case _:
                assert_never(event)

    def decode(self, frame: str | bytes) -> Iterable[Command]:
        """The command of one frame, read as strictly as Twilio does. Raises MalformedFrame("31950" | "31951" | "31924")."""
        if self._start is not None and Track.OUTBOUND in self._start.tracks:
            raise MalformedFrame("31924", "a frame on a unidirectional stream")
        if isinstance(frame, bytes):
            raise MalformedFrame("31950", f"a binary frame of {len(frame)} bytes")
        try:
            message = _to_twilio.read(frame)
        except MalformedFrame as error:
            raise MalformedFrame("31951", str(error)) from error
        if isinstance(message, Unknown):
            raise MalformedFrame("31951", f"unknown event {message.kind!r}")
        if self._start is None or message.stream_sid != self._start.stream_id:
            raise MalformedFrame("31951", f"streamSid {message.stream_sid[:64]!r} is not this stream's")
        match message:
            case _SendMedia():
                return (Audio(message.media.payload),)
            case _SendMark():
                return (Checkpoint(message.mark.name),)
            case _SendClear():
                return (Clear(),)
            case _:
                assert_never(message)

    def _open(self, start: Start) -> Iterable[str]:
        if start.media_format not in (None, MULAW_8K):
            raise UnsupportedCommand(f"Twilio Media Streams carries mulaw/8000, not {start.media_format}")
        self._start, self._sid_json = start, write(start.stream_id)
        stream = {
            "accountSid": start.account_id,
            "streamSid": start.stream_id,
            "callSid": start.call_id,
            "tracks": start.tracks,
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
            "customParameters": start.parameters,
        }
        return (write({"event": "connected", "protocol": "Call", "version": "1.0.0"}), self._frame("start", stream))

    def _frame(self, event: str, body: dict[str, Any]) -> str:
        self._sequence += 1
        return f'{{"event":"{event}","sequenceNumber":"{self._sequence}","{event}":{write(body)},"streamSid":{self._sid_json}}}'

    def _media(self, audio: Audio) -> str:
        self._sequence += 1
        self._chunk += 1
        at = audio.timestamp_ms
        if at is None:
            at = int(self._position[audio.track])
        self._position[audio.track] = at + MULAW_8K.duration_ms(len(audio.payload))
        return (
            f'{{"event":"media","sequenceNumber":"{self._sequence}","media":{{"track":"{audio.track}","chunk":"{self._chunk}",'
            f'"timestamp":"{at}","payload":"{b2a_base64(audio.payload, newline=False).decode()}"}},"streamSid":{self._sid_json}}}'
        )


class Provider:
    """One Twilio account whose calls come as Media Streams."""

    Config: ClassVar[type[Struct]] = Settings
    title: ClassVar[str] = "Twilio Media Streams"
    docs: ClassVar[str] = "https://www.twilio.com/docs/voice/media-streams/websocket-messages"
    emits: ClassVar[frozenset[type[Message]]] = frozenset({Start, Audio, Dtmf, Checkpoint, Stop})
    subprotocols: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._signer = None if config.auth else _twilio_signature.Signer(config.auth_token, config.signing_key)
        self._api = _twilio_api.Api(config.account_id, config.auth_token, config.api_url)

    def authenticate(self, request: SignedRequest) -> str:
        """The form of the URL that was signed. Raises SignatureMismatch unless a secret of the account signed the request."""
        return self._signer.verify(request) if self._signer is not None else ""

    def identity(self, request: SignedRequest) -> Identity | None:
        """The signature: Twilio signs no nonce. None with `auth: none`."""
        return self._signer.identity(request) if self._signer is not None else None

    def sign(self, request: SignedRequest) -> Mapping[str, str]:
        """Twilio's headers for this request; none with `auth: none`."""
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
        """TwiML that dials `stream_url` and passes the call's facts to our codec. Raises MalformedFrame without a call."""
        config = self._config
        parameters = _twilio.parameters(_account.facts(self.call(request)) | config.parameters)
        attributes: dict[str, _xml.Value] = {"url": stream_url, "name": config.stream_name, "statusCallback": status_url}
        if config.mode == "converse":
            stream = _xml.element("Stream", attributes, *parameters)
            return _twilio.connect(stream, action_url, config.after)
        stream = _xml.element("Stream", attributes | {"track": _TRACK_WORDS[config.track]}, *parameters)
        return _twilio.answer(_xml.element("Start", None, stream), config.then.strip())

    def after(self, request: SignedRequest) -> Answer:
        """The configured elements `after`; without any the call ends."""
        return _account.elements(self._config.after)

    def gone(self, request: SignedRequest) -> Answer:
        """The configured elements `service_lost`, else those of `after`."""
        return _account.elements(self._config.service_lost, self._config.after)

    def overflow(self) -> Answer:
        """The configured elements `overflow`, else a busy tone."""
        return _account.elements(self._config.overflow, _twilio.BUSY)

    def status(self, request: SignedRequest) -> StreamStatus:
        """What a status callback says. Never raises."""
        return _twilio.status(request)

    def call(self, request: SignedRequest) -> Call:
        """The call of a webhook. Raises MalformedFrame when it names none."""
        return _twilio.call(request)

    def place_call(self, to: str, from_: str, answer_url: str, *, status_url: str | None = None) -> HttpRequest:
        """Twilio's request for a call. Raises UnsupportedCommand without `account_id`."""
        return self._api.place(to, from_, answer_url, status_url)

    def hang_up_call(self, call_id: str) -> HttpRequest:
        """Twilio's request to end a call. Raises UnsupportedCommand without `account_id`."""
        return self._api.hang_up(call_id)

    def transfer_call(
        self, call_id: str, *, xml: str = "", url: str = "", publish: Callable[[str], str] | None = None
    ) -> HttpRequest:
        """Twilio's request to go on otherwise. Raises UnsupportedCommand for what can't be asked."""
        return self._api.transfer(call_id, xml=xml, url=url)

    def reply(self, status: int, body: bytes) -> ApiReply:
        """What Twilio answered. Never raises."""
        return _twilio_api.reply(status, body)

    def codec(self) -> Codec:
        """A fresh codec for one stream."""
        return Codec(self._config)

    @classmethod
    def carrier(cls) -> Carrier:
        """A fresh Twilio for one stream."""
        return Carrier()

    @classmethod
    def webhook(cls, call: Call, url: str, ended: StreamEnd | None = None) -> HttpRequest:
        """Twilio's POST that asks `url` what to do with `call`, or what next once its stream `ended` (unsigned)."""
        return _twilio.webhook(call, url, ended)

    @classmethod
    def dial(cls, answer: str) -> Dial:
        """What Twilio reads out of our answer. Raises MalformedFrame with the number of the error it would report."""
        verb, stream = _twilio.noun(answer, "Stream", ("Connect", "Start"))
        url = (stream.get("url") or "").strip()
        _account.check_stream_url(url, scheme="31922", malformed="31923")
        track = stream.get("track", "inbound_track")
        if track not in _TRACKS or (verb.tag == "Connect" and track != "inbound_track"):
            raise MalformedFrame("31941", f"track {track!r} inside <{verb.tag}>")
        return Dial(
            url=url.split("#")[0].split("?")[0],  # "url does not support query string parameters": they never arrive
            parameters=_twilio.read_parameters(stream),
            media_format=MULAW_8K,
            tracks=_TRACKS[track],
            bidirectional=verb.tag == "Connect",
            action_url=verb.get("action"),
            status_url=stream.get("statusCallback"),
        )
