"""The client's half of pipecat's `ProtobufFrameSerializer`: binary messages, each a protobuf `Frame` of audio or an interruption.

From `frames.proto` of pipecat-ai 1.14, read November 2026. The messages are built when they are first wanted, so that the package
`protobuf` (the extra `pipecat`) is nobody else's need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

from gateway.errors import LocalError, MalformedFrame, UnsupportedCommand
from gateway.events import Audio, Clear, Command, Event, Start
from gateway.media import Encoding, MediaFormat
from gateway.provider import Habits, SignedRequest

KIND = "pipecat"

DEFAULT_FORMAT = MediaFormat(Encoding.PCM_S16LE, 16000)
"""pipecat's own default for what it hears."""

WAV_HEADER_BYTES = 44

_PACKAGE = "pipecat"
_AUDIO = (("audio", 3, "TYPE_BYTES"), ("sample_rate", 4, "TYPE_UINT32"), ("num_channels", 5, "TYPE_UINT32"))
# Ids, names and presentation times mean nothing here: fields that are left out pass unread.
_MESSAGES: dict[str, tuple[tuple[str, int, str], ...]] = {
    "TextFrame": (),
    "AudioRawFrame": _AUDIO,
    "TranscriptionFrame": (),
    "MessageFrame": (),
    "InterruptionFrame": (),
}
_FRAME = {
    "text": ("TextFrame", 1),
    "audio": ("AudioRawFrame", 2),
    "transcription": ("TranscriptionFrame", 3),
    "message": ("MessageFrame", 4),
    "interruption": ("InterruptionFrame", 5),
}


class MissingExtra(LocalError):
    """The package `protobuf` is not installed."""


@cache
def frame_class() -> Any:
    """The class of the message `pipecat.Frame`. Raises MissingExtra."""
    try:
        descriptor_pb2, descriptor_pool, message_factory = (
            import_module(f"google.protobuf.{name}") for name in ("descriptor_pb2", "descriptor_pool", "message_factory")
        )
    except ImportError:
        raise MissingExtra("it needs a package more: pip install 'telephony-audio-gateway[pipecat]'") from None
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="frames.proto", package=_PACKAGE, syntax="proto3")
    for name, members in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for member, number, kind in members:
            message.field.add(name=member, number=number, type=getattr(field, kind), label=field.LABEL_OPTIONAL)
    frame = file.message_type.add(name="Frame")
    frame.oneof_decl.add(name="frame")
    for member, (name, number) in _FRAME.items():
        one = frame.field.add(name=member, number=number, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL, oneof_index=0)
        one.type_name = f".{_PACKAGE}.{name}"
    pool = descriptor_pool.DescriptorPool()  # of our own: pipecat itself may be in this process
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Frame"))


class Account:
    """Who plays a client of pipecat's. It signs nothing; `authorization` is what such a bot can ask for."""

    def carrier(self) -> PipecatClient:
        """A fresh client for one stream. Raises MissingExtra."""
        return PipecatClient()

    def sign(self, request: SignedRequest) -> Mapping[str, str]:
        """No headers."""
        return {}


class PipecatClient:
    """Audio both ways, and interruptions as clears. There is no word for a start, a key, a checkpoint or an end."""

    habits: ClassVar[Habits] = Habits(says_stop=False)

    def __init__(self) -> None:
        self._frame = frame_class()
        self._heard = DEFAULT_FORMAT
        self.spoken = DEFAULT_FORMAT
        """Of the audio that was decoded last: a bot hears and speaks at rates of its own."""

    def encode(self, event: Event) -> Iterable[str | bytes]:
        """The message of one event; none but of audio. Raises UnsupportedCommand for a Start of audio that is not 16-bit PCM."""
        match event:
            case Start():
                self._heard = event.media_format or DEFAULT_FORMAT
                if self._heard.encoding is not Encoding.PCM_S16LE:
                    raise UnsupportedCommand(f"pipecat carries pcm_s16le at any rate, not {self._heard}")
                return ()
            case Audio():
                frame = self._frame()
                frame.audio.audio = event.payload
                frame.audio.sample_rate = self._heard.sample_rate
                frame.audio.num_channels = 1
                return (frame.SerializeToString(),)
            case _:
                return ()

    def decode(self, frame: str | bytes) -> Iterable[Command]:
        """The command of one message; none for captions and messages to a client. Raises MalformedFrame."""
        if isinstance(frame, str):
            raise MalformedFrame("text_message", f"{len(frame)} characters; protobuf comes in binary messages")
        try:
            message = self._frame.FromString(frame)
        except Exception as error:  # DecodeError, of a package that may not be imported here
            raise MalformedFrame("bad_protobuf", str(error)) from error
        match message.WhichOneof("frame"):
            case "audio":
                return self._audio(message.audio)
            case "interruption":
                return (Clear(),)
            case None:
                raise MalformedFrame("empty_frame", f"none of {', '.join(_FRAME)}")
            case _:
                return ()

    def _audio(self, audio: Any) -> Iterable[Command]:
        if audio.num_channels != 1 or not 8000 <= audio.sample_rate <= 48000:
            raise MalformedFrame("unsupported_format", f"{audio.sample_rate} Hz, {audio.num_channels} channels")
        if self.spoken.sample_rate != audio.sample_rate:
            self.spoken = MediaFormat(Encoding.PCM_S16LE, audio.sample_rate)
        samples = audio.audio
        if samples[:4] == b"RIFF" and samples[8:16] == b"WAVEfmt ":  # a transport with `add_wav_header` writes one each time
            samples = samples[WAV_HEADER_BYTES:]
        return (Audio(samples),) if samples else ()
