"""Twilio ConversationRelay: words in JSON text frames, speech recognition and synthesis being Twilio's.

Wire facts: twilio.com/docs/voice/conversationrelay/websocket-messages and /voice/twiml/connect/conversationrelay, read
November 2026; the shape of `info` is in no page and comes from recorded sessions.
"""

from __future__ import annotations

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
    Language,
    Message,
    Party,
    Play,
    Say,
    Speech,
    Spoken,
    Start,
    Stop,
    Transcript,
    Unknown,
)
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
from ._json import Id, Milliseconds, Reader, excerpt, texts, write

_ACCEPTS: frozenset[type[Message]] = frozenset({Say, Play, Language, Dtmf, Checkpoint, Stop})
_SENDABLE = frozenset("0123456789w#*")
_EVENTS = "speaker-events tokens-played"
_SPEAKERS = {"agentSpeaking": Party.AGENT, "clientSpeaking": Party.CALLER}
_SPEAKER_NAMES = {party: name for name, party in _SPEAKERS.items()}
_SWITCH = {"on": True, "off": False}
_INVALID = "64107"  # "invalid message received"

Trigger = Literal["none", "dtmf", "speech", "any"]
"""What the caller can interrupt with."""


class SpokenLanguage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A language prepared with <Language>, for a later switch.

    code: BCP-47 tag, or `multi` for automatic; required.
    tts_provider, voice, transcription_provider, speech_model: as in the account, for this language; default Twilio's.
    """

    code: str
    tts_provider: str | None = None
    voice: str | None = None
    transcription_provider: str | None = None
    speech_model: str | None = None


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An account whose calls are carried by ConversationRelay. Options left out keep Twilio's own defaults.

    auth_token: the account's primary auth token, or a list of tokens while rotating; required unless `auth` is given.
    signing_key: secret of a signing key (SharedKey), or a list, for requests that Twilio signs by HMAC-SHA256; default none.
    auth: `none` admits unsigned requests (loopback only); default: signatures are required.
    account_id: the Account SID (AC…), for placing, transferring and ending calls by Twilio's API; default none, it is not asked.
    api_url: where Twilio's API is, up to but without its version; default https://api.twilio.com.
    after: TwiML elements that run once the session has ended; default none, the call ends.
    service_lost: TwiML elements that run instead where the service was lost; default `after`.
    overflow: TwiML elements for a call that there is no room for; default <Reject reason="busy"/>.
    parameters: names and values passed to the session as <Parameter>, under 500 characters a pair; default none.
    welcome_greeting: text spoken first; default none.
    welcome_greeting_interruptible: what cuts the greeting: `none`, `dtmf`, `speech`, `any`; default Twilio's, any.
    language: BCP-47 tag of both directions, or `multi`; default Twilio's, en-US.
    tts_language: language of synthesis; default `language`.
    transcription_language: language of recognition; default `language`.
    tts_provider: `Google`, `Amazon` or `ElevenLabs`; default Twilio's, ElevenLabs.
    voice: a voice of that provider; default Twilio's.
    transcription_provider: `Google` or `Deepgram`; default Twilio's, Deepgram.
    speech_model: a model of that provider, such as `flux`; default Twilio's.
    interruptible: what cuts our speech: `none`, `dtmf`, `speech`, `any`; default Twilio's, any.
    interrupt_sensitivity: `low`, `medium`, `high`; default Twilio's, high.
    dtmf_detection: whether keys are told; default true.
    report_input_during_agent_speech: what is told while we speak: `none`, `dtmf`, `speech`, `any`; default Twilio's, none.
    preemptible: whether a later text may cut an earlier one; default Twilio's, false.
    hints: words and phrases to expect, a list; default none.
    partial_prompts: whether unfinished transcripts are told; default true.
    profanity_filter: whether transcripts are cleaned; default Twilio's.
    deepgram_smart_format: whether Deepgram formats numbers and dates; default Twilio's, true.
    speech_timeout: silence that ends an utterance, milliseconds from 600 to 5000, or `auto`; default Twilio's, auto.
    eot_threshold: confidence at which `flux` ends a turn, 0.5 to 0.9; default Twilio's, 0.8.
    ignore_backchannel: whether "uh-huh" is no interruption; default Twilio's, false.
    elevenlabs_text_normalization: `on`, `auto`, `off`; default Twilio's, off.
    debug: `debugging` adds round trip times, which arrive as unknown events; default none.
    intelligence_service: SID or name of a Conversational Intelligence service; default none.
    background_noise_reduction: how the caller's audio is cleaned, a word of Twilio's; default Twilio's.
    conversation_configuration: SID of a configuration of Twilio's Conversations; default none.
    conversation_id: an existing conversation that the session belongs to; default none.
    languages: languages to prepare, a list of <Language>; default none.
    """

    auth_token: str | list[str] | None = None
    signing_key: str | list[str] | None = None
    auth: Literal["none"] | None = None
    account_id: str | None = None
    api_url: str = _twilio_api.API_URL
    after: str = ""
    service_lost: str = ""
    overflow: str = ""
    parameters: dict[str, str] = member(default_factory=dict)
    welcome_greeting: str | None = None
    welcome_greeting_interruptible: Trigger | None = None
    language: str | None = None
    tts_language: str | None = None
    transcription_language: str | None = None
    tts_provider: str | None = None
    voice: str | None = None
    transcription_provider: str | None = None
    speech_model: str | None = None
    interruptible: Trigger | None = None
    interrupt_sensitivity: Literal["low", "medium", "high"] | None = None
    dtmf_detection: bool = True
    report_input_during_agent_speech: Trigger | None = None
    preemptible: bool | None = None
    hints: list[str] | None = None
    partial_prompts: bool = True
    profanity_filter: bool | None = None
    deepgram_smart_format: bool | None = None
    speech_timeout: int | Literal["auto"] | None = None
    eot_threshold: float | None = None
    ignore_backchannel: bool | None = None
    elevenlabs_text_normalization: Literal["on", "auto", "off"] | bool | None = None  # YAML reads a bare on and off as booleans
    debug: Literal["debugging"] | None = None
    intelligence_service: str | None = None
    background_noise_reduction: str | None = None
    conversation_configuration: str | None = None
    conversation_id: str | None = None
    languages: list[SpokenLanguage] = member(default_factory=list)

    def __post_init__(self) -> None:
        _account.object_to(
            _account.check_tokens(self.auth, auth_token=self.auth_token, signing_key=self.signing_key),
            _twilio_api.check(self.account_id, self.auth_token, self.api_url),
            _account.check_names(self.parameters),
            _twilio.check_parameters(self.parameters),
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
        if isinstance(self.speech_timeout, int) and not 600 <= self.speech_timeout <= 5000:
            yield f"speech_timeout: {self.speech_timeout} is out of range; Twilio takes 600 to 5000 milliseconds, or auto"
        if self.eot_threshold is not None and not 0.5 <= self.eot_threshold <= 0.9:
            yield f"eot_threshold: {self.eot_threshold} is out of range; Twilio takes 0.5 to 0.9"


# --- frames from Twilio, as tolerantly as we read them -----------------------------------------------------------------


class _Setup(Struct, tag_field="type", tag="setup", rename="camel"):
    session_id: Id
    call_sid: Id
    account_sid: str | None = None
    caller: str | None = member(default=None, name="from")
    called: str | None = member(default=None, name="to")
    direction: str | None = None
    custom_parameters: dict[str, Any] | None = None


class _Prompt(Struct, tag_field="type", tag="prompt", rename="camel"):
    voice_prompt: str
    last: bool
    lang: str | None = None


class _Key(Struct, tag_field="type", tag="dtmf"):
    digit: str | int


class _Interrupt(Struct, tag_field="type", tag="interrupt", rename="camel"):
    utterance_until_interrupt: str | None = None
    duration_until_interrupt_ms: Milliseconds | None = None


class _Info(Struct, tag_field="type", tag="info"):
    name: str
    value: Any = None


class _Error(Struct, tag_field="type", tag="error"):
    description: str | None = None


_FromTwilio = _Setup | _Prompt | _Key | _Interrupt | _Info | _Error
_from_twilio: Reader[_FromTwilio] = Reader(_FromTwilio, tag="type")


# --- frames to Twilio, exactly as documented: ten bad ones in a row close the session -----------------------------------


class _Text(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    token: str
    last: bool | UnsetType = UNSET
    lang: str | UnsetType = UNSET
    interruptible: bool | UnsetType = UNSET
    preemptible: bool | UnsetType = UNSET


class _Play(Struct, tag_field="type", tag="play", forbid_unknown_fields=True):
    source: str
    loop: int | UnsetType = UNSET
    preemptible: bool | UnsetType = UNSET
    interruptible: bool | UnsetType = UNSET


class _SendDigits(Struct, tag_field="type", tag="sendDigits", forbid_unknown_fields=True):
    digits: str


class _Switch(Struct, tag_field="type", tag="language", rename="camel", forbid_unknown_fields=True):
    tts_language: str | UnsetType = UNSET
    transcription_language: str | UnsetType = UNSET


class _End(Struct, tag_field="type", tag="end", rename="camel", forbid_unknown_fields=True):
    handoff_data: str | UnsetType = UNSET


_ToTwilio = _Text | _Play | _SendDigits | _Switch | _End
_to_twilio: Reader[_ToTwilio] = Reader(_ToTwilio, tag="type", strict=True)


class Codec:
    """Our half. Text frames carry no stream id: what comes on this socket belongs to the session that `setup` named."""

    __slots__ = ("_session_id", "accepts", "limits")

    def __init__(self) -> None:
        self.accepts = _ACCEPTS
        self.limits = Limits()
        self._session_id: str | None = None

    def decode(self, frame: str | bytes) -> Iterable[Event]:
        """Events of one frame. Raises MalformedFrame and nothing else."""
        message = _from_twilio.read(frame)
        match message:
            case Unknown():
                return (message,)
            case _Setup():
                return self._setup(message)
            case _Prompt():
                return (Transcript(message.voice_prompt, message.last, message.lang or ""),)
            case _Key():
                return (Dtmf(_account.heard_digits(str(message.digit))),)
            case _Interrupt():
                return (BargeIn(message.utterance_until_interrupt or "", message.duration_until_interrupt_ms or 0),)
            case _Info():
                return (_info(message),)
            case _Error():
                return (Fault("carrier_error", excerpt(message.description or "")),)
            case _:
                assert_never(message)

    def encode(self, command: Command) -> Iterable[str | bytes]:
        """Frames of one command; none for a checkpoint. See the contract for errors."""
        if type(command) not in self.accepts:
            raise _account.unsupported("ConversationRelay", command, self.accepts)
        if self._session_id is None:
            raise NotStarted("Twilio has not sent its setup yet, so nothing can be sent")
        match command:
            case Say():
                return (
                    write(
                        _Text(
                            command.text,
                            command.final,
                            _or_unset(command.language),
                            _or_unset(command.interruptible),
                            _or_unset(command.preemptible),
                        )
                    ),
                )
            case Play():
                if not command.source or command.loop < 0:
                    raise UnsupportedCommand(
                        f"Twilio plays a URL 0 (endlessly) or more times, not {command.source!r} {command.loop} times"
                    )
                choices = (_or_unset(command.preemptible), _or_unset(command.interruptible))
                return (write(_Play(command.source, command.loop, *choices)),)
            case Language():
                if not command.speech and not command.transcription:
                    raise UnsupportedCommand("a language switch names a language of speech, of transcription, or both")
                return (write(_Switch(command.speech or UNSET, command.transcription or UNSET)),)
            case Dtmf():
                if not command.digits or not _SENDABLE.issuperset(command.digits):
                    raise UnsupportedCommand(f"ConversationRelay sends the digits 0-9 w # *, not {excerpt(command.digits, 64)!r}")
                return (write(_SendDigits(command.digits)),)
            case Stop():
                return (write(_End(_or_unset(command.handoff))),)
            case _:
                # A Checkpoint has no frame: the session knows what was said before it, and resolves it from `Spoken`.
                return ()

    def _setup(self, message: _Setup) -> Iterable[Event]:
        if self._session_id is not None:
            if message.session_id == self._session_id:
                return ()
            raise MalformedFrame(
                "second_start", f"the session is {self._session_id}, and another setup names {message.session_id}"
            )
        self._session_id = message.session_id
        start = Start(
            stream_id=message.session_id,
            call_id=message.call_sid,
            account_id=message.account_sid or "",
            caller=message.caller or "",
            called=message.called or "",
            direction=_twilio.direction(message.direction or ""),
            media_format=None,
            tracks=(),
            accepts=_account.accepted(_ACCEPTS),
            parameters=texts(message.custom_parameters),
        )
        return (start,)


def _info(info: _Info) -> Event:
    if info.name in _SPEAKERS:
        if not isinstance(info.value, str) or info.value not in _SWITCH:
            raise MalformedFrame("bad_value", f"{info.name} is {excerpt(str(info.value), 64)!r}, neither on nor off")
        return Speech(_SPEAKERS[info.name], _SWITCH[info.value])
    if info.name == "tokensPlayed":
        return Spoken(texts({"value": info.value})["value"])
    return Unknown(f"info:{info.name[:59]}")


def _or_unset(value: Any) -> Any:
    return UNSET if value is None else value


def _or_none(value: Any) -> Any:
    return None if value is UNSET else value


class Carrier:
    """Twilio's half: no counters, no timestamps, no ids but in `setup`."""

    habits: ClassVar[Habits] = Habits(text=True, says_stop=False, id_prefixes=("CA", "VX", "AC"), tells_hangup=True)

    def __init__(self) -> None:
        self._started = False
        self._answered = False

    def come_back(self) -> None:
        """The call was answered by its first session."""
        self._answered = True

    def encode(self, event: Event) -> Iterable[str | bytes]:
        """Twilio's frames for one event; its Start comes first. Raises NotStarted without one."""
        if not self._started and not isinstance(event, Start):
            raise NotStarted("a session begins with its setup, which is encoded from a Start")
        match event:
            case Start():
                self._started = True
                return (write(_setup(event, answered=self._answered or event.direction == "outbound")),)
            case Transcript():
                prompt = {"type": "prompt", "voicePrompt": event.text, "lang": event.language, "last": event.final}
                return (write(prompt),)
            case Dtmf():
                return [write({"type": "dtmf", "digit": digit}) for digit in event.digits]
            case BargeIn():
                cut = {"utteranceUntilInterrupt": event.heard, "durationUntilInterruptMs": event.after_ms}
                return (write({"type": "interrupt", **cut}),)
            case Speech():
                return (_tell(_SPEAKER_NAMES[event.who], "on" if event.active else "off"),)
            case Spoken():
                return (_tell("tokensPlayed", event.text),)
            case Fault():
                return (write({"type": "error", "description": event.message}),)
            case Audio() | Checkpoint() | Clear() | Gap() | Flow() | Unknown() | Stop():
                return ()
            case _:
                assert_never(event)

    def decode(self, frame: str | bytes) -> Iterable[Command]:
        """The command of one frame, read as strictly as Twilio does. Raises MalformedFrame("64107", what it would say)."""
        try:
            message = _to_twilio.read(frame)
        except MalformedFrame as error:
            raise _refused(frame, str(error)) from error
        match message:
            case Unknown():
                raise _refused(frame, f"unknown type {message.kind!r}")
            case _Text():
                choices = (_or_none(message.lang), _or_none(message.interruptible), _or_none(message.preemptible))
                return (Say(message.token, _or_none(message.last) or False, *choices),)
            case _Play():
                loop = 1 if message.loop is UNSET else message.loop
                if not message.source or loop < 0:
                    raise _refused(frame, "no source to play, or a negative loop")
                return (Play(message.source, loop, _or_none(message.interruptible), _or_none(message.preemptible)),)
            case _SendDigits():
                if not message.digits or not _SENDABLE.issuperset(message.digits):
                    raise _refused(frame, "digits are 0-9 w # *")
                return (Dtmf(message.digits),)
            case _Switch():
                if message.tts_language is UNSET and message.transcription_language is UNSET:
                    raise _refused(frame, "a language message without a language")
                return (Language(_or_none(message.tts_language), _or_none(message.transcription_language)),)
            case _End():
                return (Stop(handoff=_or_none(message.handoff_data)),)
            case _:
                assert_never(message)


def _setup(start: Start, *, answered: bool) -> dict[str, Any]:
    return {
        "type": "setup",
        "sessionId": start.stream_id,
        "callSid": start.call_id,
        "parentCallSid": "",
        "from": start.caller,
        "to": start.called,
        "forwardedFrom": "",
        "callerName": "",
        "direction": "outbound-api" if start.direction == "outbound" else "inbound",
        "callType": "PSTN",
        "callStatus": "IN_PROGRESS" if answered else "RINGING",
        "accountSid": start.account_id,
        "customParameters": start.parameters,
    }


def _tell(name: str, value: str) -> str:
    return write({"type": "info", "name": name, "value": value})


def _refused(frame: str | bytes, why: str) -> MalformedFrame:
    raw = frame if isinstance(frame, str) else f"{len(frame)} bytes"
    return MalformedFrame(_INVALID, f"Invalid message received, code: {_INVALID}, {excerpt(raw)} ({why})")


class Provider:
    """One Twilio account whose calls come through ConversationRelay."""

    Config: ClassVar[type[Struct]] = Settings
    title: ClassVar[str] = "Twilio ConversationRelay"
    docs: ClassVar[str] = "https://www.twilio.com/docs/voice/conversationrelay/websocket-messages"
    emits: ClassVar[frozenset[type[Message]]] = frozenset({Start, Dtmf, Transcript, BargeIn, Speech, Spoken, Fault})
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
        """TwiML that opens a session with `stream_url`. The setup frame tells the call's facts itself.

        `status_url` has no place here: of a session's end Twilio tells the action URL, and `status` reads that.
        """
        attributes = {"url": stream_url} | _attributes(self._config)
        if resumed:  # Twilio speaks the greeting of each session
            attributes = {name: value for name, value in attributes.items() if not name.startswith("welcomeGreeting")}
        languages = [_xml.element("Language", _language(language)) for language in self._config.languages]
        parameters = _twilio.parameters(self._config.parameters)
        session = _xml.element("ConversationRelay", attributes, *languages, *parameters)
        return _twilio.connect(session, action_url, self._config.after)

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
        """A fresh codec for one session."""
        return Codec()

    @classmethod
    def carrier(cls) -> Carrier:
        """A fresh Twilio for one session."""
        return Carrier()

    @classmethod
    def webhook(cls, call: Call, url: str, ended: StreamEnd | None = None) -> HttpRequest:
        """Twilio's POST that asks `url` what to do with `call`, or what next once its stream `ended` (unsigned)."""
        return _twilio.webhook(call, url, ended, session=True)

    @classmethod
    def dial(cls, answer: str) -> Dial:
        """What Twilio reads out of our answer. Raises MalformedFrame with the number of the error it would report."""
        connect, session = _twilio.noun(answer, "ConversationRelay", ("Connect",))
        url = (session.get("url") or "").strip()
        _account.check_stream_url(url, scheme="64102", malformed="64102")
        return Dial(
            url,
            _twilio.read_parameters(session),
            media_format=None,
            tracks=(),
            action_url=connect.get("action"),
            greeting=session.get("welcomeGreeting", ""),
        )


def _attributes(config: Settings) -> dict[str, _xml.Value]:
    normalization = config.elevenlabs_text_normalization
    return {
        "welcomeGreeting": config.welcome_greeting,
        "welcomeGreetingInterruptible": config.welcome_greeting_interruptible,
        "language": config.language,
        "ttsLanguage": config.tts_language,
        "transcriptionLanguage": config.transcription_language,
        "ttsProvider": config.tts_provider,
        "voice": config.voice,
        "transcriptionProvider": config.transcription_provider,
        "speechModel": config.speech_model,
        "interruptible": config.interruptible,
        "interruptSensitivity": config.interrupt_sensitivity,
        "dtmfDetection": config.dtmf_detection,
        "reportInputDuringAgentSpeech": config.report_input_during_agent_speech,
        "preemptible": config.preemptible,
        "hints": ",".join(config.hints) if config.hints else None,
        "partialPrompts": config.partial_prompts,
        "profanityFilter": config.profanity_filter,
        "deepgramSmartFormat": config.deepgram_smart_format,
        "speechTimeout": config.speech_timeout,
        "eotThreshold": config.eot_threshold,
        "ignoreBackchannel": config.ignore_backchannel,
        "elevenlabsTextNormalization": ("off", "on")[normalization] if isinstance(normalization, bool) else normalization,
        "events": _EVENTS,
        "debug": config.debug,
        "intelligenceService": config.intelligence_service,
        "backgroundNoiseReduction": config.background_noise_reduction,
        "conversationConfiguration": config.conversation_configuration,
        "conversationId": config.conversation_id,
    }


def _language(language: SpokenLanguage) -> dict[str, _xml.Value]:
    return {
        "code": language.code,
        "ttsProvider": language.tts_provider,
        "voice": language.voice,
        "transcriptionProvider": language.transcription_provider,
        "speechModel": language.speech_model,
    }
