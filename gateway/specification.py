"""The service protocol for machines: JSON Schemas and an AsyncAPI 3 document, made from the structs that speak it. Pure.

`gateway/asyncapi.yaml` is `asyncapi()`, written by `telephony-gateway protocol`. Texts come from the structs' docstrings.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec
from msgspec import Struct

from gateway.events import Account, After, FlowState, GapReason, Outcome, Party, StopReason
from gateway.media import Encoding, MediaFormat, Track
from gateway.services import native
from gateway.services.framed import HEADER_BYTES, SUBPROTOCOL_FRAMED, VERSION_AUDIO, Flags, Header, pack
from gateway.services.native import SUBPROTOCOL_RAW, Down, Up
from gateway.services.retry import Verdict, verdict

Json = dict[str, Any]

FROM_GATEWAY: tuple[type[Up], ...] = tuple(Up.__subclasses__())
FROM_SERVICE: tuple[type[Down], ...] = tuple(Down.__subclasses__())

NUMBERED = {
    "n": {"type": "integer", "minimum": 0, "description": "Framed mode: the text's number; a service may take each once."},
    "replayed": {"const": True, "description": "Framed mode: the text is from before this connection."},
}
"""What framed mode adds to each text from the gateway but `start` and `ack`."""

HEADER = (
    (0, "u8", "version and kind", f"0x{VERSION_AUDIO:02x}: version 1 (high nibble), audio (low nibble)"),
    (1, "u8", "track", "0 inbound, 1 outbound"),
    (2, "u16", "flags", "1 replayed, 2 discontinuity before this frame, 4 synthesized silence, 8 last of an utterance"),
    (4, "u32", "seq", "the frame's number: +1 per frame and direction, from 0, across connections"),
    (8, "u64", "pos", "index of the first sample since the stream began, at the agreed rate"),
)
"""Offset, type, name and meaning, little-endian."""

CLOSE_CODES = {
    1000: "done: the call is over",
    1001: "going away: restarting, or shutting down",
    1008: "the gateway broke the protocol",
    1011: "failed",
    1012: "restarting",
    1013: "try again later",
    4001: "unauthorised",
    4003: "no common mode or audio format",
    4008: "from the gateway: no `ready` within 5 s",
    4009: "too slow: the other side takes nothing",
    4029: "full: no room for one more call",
    4400: "the gateway broke the protocol",
    4404: "no such call or path here",
    4409: "replaced by a newer connection",
}

_CONSEQUENCES = {
    Verdict.DONE: "the call ends",
    Verdict.RETRY: "the gateway dials again",
    Verdict.NEXT: "the gateway tries the next service",
    Verdict.FINAL: "the gateway does not dial again",
}


def message_schemas(*, ref_prefix: str = "#/$defs/") -> Json:
    """A JSON Schema for each message and each of its parts, by name."""
    _, schemas = msgspec.json.schema_components((*FROM_GATEWAY, *FROM_SERVICE), ref_template=f"{ref_prefix}{{name}}")
    structs: tuple[type[Struct], ...] = (*FROM_GATEWAY, *FROM_SERVICE, native.Resume, Account, MediaFormat)
    parts = {struct.__name__: struct for struct in structs}
    enums = {each.__name__: each for each in (After, Encoding, FlowState, GapReason, Outcome, Party, StopReason, Track)}
    for name, schema in schemas.items():
        if name in enums:
            schema["description"] = inspect.getdoc(enums[name])
            schema["enum"] = [str(each) for each in enums[name]]
        if (struct := parts.get(name)) is None:
            continue
        about, meanings = describe(struct)
        schema["description"] = about
        for field, text in meanings.items():
            schema["properties"][field] = _described(schema["properties"][field], text)
        if not issubclass(struct, Down):
            # What the gateway sends is complete, and what later versions add is to be ignored.
            schema["required"] = list(schema["properties"])
            schema.pop("additionalProperties", None)
        if issubclass(struct, Up) and struct not in (native.StartUp, native.AckUp):
            schema["properties"] |= NUMBERED
    return schemas


def json_schema() -> Json:
    """One JSON Schema of every text message: `FromGateway` and `FromService` among its definitions are the two directions."""
    definitions = message_schemas()
    directions: dict[str, tuple[type[Struct], ...]] = {"FromGateway": FROM_GATEWAY, "FromService": FROM_SERVICE}
    for name, structs in directions.items():
        definitions[name] = {"oneOf": [{"$ref": f"#/$defs/{struct.__name__}"} for struct in structs]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Telephony audio gateway: texts of the service protocol, version 1",
        "anyOf": [{"$ref": "#/$defs/FromGateway"}, {"$ref": "#/$defs/FromService"}],
        "$defs": definitions,
    }


def asyncapi() -> Json:
    """The AsyncAPI 3 document of a service: it is the server, and `receive` is what it receives."""
    up, down = [_message(struct) for struct in FROM_GATEWAY], [_message(struct) for struct in FROM_SERVICE]
    messages = dict((*up, *down)) | _audio_messages()
    received = [*(name for name, _ in up), "audioRaw", "audioFramed"]
    sent = [*(name for name, _ in down), "audioRaw", "audioFramed"]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Telephony audio gateway: service protocol",
            "version": "1",
            "description": (
                "What a service says and is told. The service is a WebSocket server; the gateway dials it once per call. Text "
                "messages are JSON, binary messages are audio. Told in prose in gateway/PROTOCOL.md."
            ),
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "service": {"host": "127.0.0.1:9000", "protocol": "ws", "description": "Your service: `url` in the configuration."}
        },
        "channels": {
            "call": {
                "address": "/",
                "title": "One call",
                "description": (
                    "One connection for each call: `start` first, `stop` last. Ignore messages and fields that you do not know."
                ),
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
                "bindings": {"ws": {"method": "GET", "headers": _handshake()}},
                "x-close-codes": {
                    str(code): f"{meaning}; {_CONSEQUENCES[verdict(code)]}" for code, meaning in sorted(CLOSE_CODES.items())
                },
            }
        },
        "operations": {
            "listen": _operation("receive", "What the gateway tells.", received),
            "speak": _operation("send", "What the service may send; none of it is required in raw mode.", sent),
        },
        "components": {"messages": messages, "schemas": message_schemas(ref_prefix="#/components/schemas/")},
    }


def describe(struct: type[Struct]) -> tuple[str, dict[str, str]]:
    """What a struct's docstring says of it, and of its fields in lines `field: text`, which may go on indented."""
    text = inspect.getdoc(struct) or ""
    fields: dict[str, str] = {}
    about: list[str] = []
    name = None
    for line in text.splitlines():
        if found := re.fullmatch(r"([a-z_]+): (.+)", line):
            name, fields[found[1]] = found[1], found[2]
        elif name is not None and line.startswith("  "):
            fields[name] += f" {line.strip()}"
        else:
            name = None
            about.append(line)
    return " ".join(line for line in about if line), {key: _sentence(value) for key, value in fields.items()}


def examples() -> dict[type[Up] | type[Down], Json]:
    """One message of each kind, as it goes over the wire."""
    accepts = ("audio", "checkpoint", "clear", "stop")
    start = native.StartUp(
        session="8f14e45fceea4c7f9d3b",
        provider="twilio",
        kind="a carrier's protocol",
        stream_id="MZ18ad3ab5a668481ce02b83e7395059f0",
        call_id="CA5cf22ab7bc5ed7e9d5e1a1aec2f1a4f5",
        account_id="AC4c1b0f1b6a4e4f0f8f6d0f0d8c5a5a5a",
        caller="+15550100001",
        called="+15550100002",
        direction="inbound",
        role="speaker",
        track=Track.INBOUND,
        media_format=MediaFormat(Encoding.PCM_S16LE, 16000),
        frame_ms=20,
        accepts=accepts,
        parameters={"language": "en"},
    )
    account = Account(received=61_240, forwarded=61_240, queued=9_000, played=6_800, cleared=2_200)
    made: tuple[Up | Down, ...] = (
        start,
        native.DtmfUp("1"),
        native.CheckpointUp("greeting", Outcome.PLAYED, 1_840),
        native.ClearUp(620, 2_200),
        native.TranscriptUp("Where is my order?", True, "en-US"),
        native.BargeInUp("Your order is", 900),
        native.SpeechUp(Party.CALLER, True),
        native.SpokenUp("Your order is on its way."),
        native.GapUp(Track.INBOUND, 240, GapReason.CARRIER),
        native.FlowUp(FlowState.PAUSE, 60_000),
        native.FaultUp("unsupported_command", "this stream can't carry out 'say'; it accepts: " + ", ".join(accepts), "c7"),
        native.AckUp(149),
        native.StopUp(StopReason.CALLER_HANGUP, account),
        native.CheckpointDown(name="greeting"),
        native.ClearDown(),
        native.DtmfDown(digits="12#"),
        native.SayDown(text="Your order is on its way.", id="c7"),
        native.PlayDown(source="https://media.example.com/hold.mp3", loop=2),
        native.LanguageDown(speech="de-DE", transcription="de-DE"),
        native.StopDown(after=After.PLAYED),
        native.Ready(next=0),
        native.Ack(seq=149),
    )
    found: dict[type[Up] | type[Down], Json] = {}
    for message in made:
        payload: Json = msgspec.json.decode(msgspec.json.encode(message))
        if isinstance(message, Down):
            defaults = {field.name: field.default for field in msgspec.structs.fields(type(message))}
            payload = {name: value for name, value in payload.items() if name == "type" or defaults.get(name) != value}
        found[type(message)] = payload
    return found


def _message(struct: type[Up] | type[Down]) -> tuple[str, Json]:
    tag = str(struct.__struct_config__.tag)
    about, _ = describe(struct)
    origin = "FromGateway" if issubclass(struct, Up) else "FromService"
    name = re.sub("_(.)", lambda found: found[1].upper(), tag) + origin
    return name, {
        "name": tag,
        "title": f"{tag}, {'from the gateway' if issubclass(struct, Up) else 'from the service'}",
        "summary": about,
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{struct.__name__}"},
        "examples": [{"payload": examples()[struct]}],
    }


def _audio_messages() -> Json:
    payload = {"type": "string", "format": "binary"}
    flags = Flags.DISCONTINUITY
    return {
        "audioRaw": {
            "name": "audio",
            "title": "audio in raw mode, both ways",
            "summary": "A binary message: samples as `start.media_format` says, multi-byte ones little-endian, any whole number.",
            "contentType": "application/octet-stream",
            "payload": payload,
        },
        "audioFramed": {
            "name": "audio",
            "title": "audio in framed mode, both ways",
            "summary": f"A binary message: a header of {HEADER_BYTES} bytes, little-endian, then the samples.",
            "contentType": "application/octet-stream",
            "payload": payload,
            "x-header": [
                {"offset": offset, "type": kind, "field": field, "meaning": meaning} for offset, kind, field, meaning in HEADER
            ],
            "x-header-example": {
                "hex": pack(Header(Track.OUTBOUND, flags, 150, 48_000), b"").hex(" "),
                "track": 1,
                "flags": int(flags),
                "seq": 150,
                "pos": 48_000,
            },
        },
    }


def _handshake() -> Json:
    modes = (
        f"Offered: `{SUBPROTOCOL_RAW}, {SUBPROTOCOL_FRAMED}`. Select nothing or `{SUBPROTOCOL_RAW}` for raw mode, "
        f"`{SUBPROTOCOL_FRAMED}` for framed mode."
    )
    return {
        "type": "object",
        "properties": {
            "Sec-WebSocket-Protocol": {"type": "string", "description": modes},
            "Authorization": {"type": "string", "description": "`Bearer` and the token, where the configuration has one."},
        },
        "required": ["Sec-WebSocket-Protocol"],
    }


def _operation(action: str, summary: str, names: list[str]) -> Json:
    return {
        "action": action,
        "channel": {"$ref": "#/channels/call"},
        "summary": summary,
        "messages": [{"$ref": f"#/channels/call/messages/{name}"} for name in names],
    }


def _described(schema: Json, text: str) -> Json:
    # Beside `$ref`, older readers of JSON Schema see nothing.
    return {"allOf": [schema], "description": text} if "$ref" in schema else schema | {"description": text}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
