"""Foreign, strict doubles of everything the gateway talks to, written from the protocol pages alone."""

from .calling import Calling
from .conversation_relay import ConversationRelay
from .plivo import ABSENT, EXTRA_HEADERS_FORMS, Plivo
from .service import FRAMED, RAW, EchoService20, Link, Memory, RecordingService, scripted
from .twilio_media import TwilioMedia
from .wire import Refused

__all__ = [
    "ABSENT",
    "EXTRA_HEADERS_FORMS",
    "FRAMED",
    "RAW",
    "Calling",
    "ConversationRelay",
    "EchoService20",
    "Link",
    "Memory",
    "Plivo",
    "RecordingService",
    "Refused",
    "TwilioMedia",
    "scripted",
]
