"""The JSON Schema of the configuration: as generous as the gateway, and strict where an editor can help. Oracle: jsonschema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft7Validator

import providers
from gateway import cli, config, schema
from gateway.errors import ConfigError
from gateway.settings import Settings
from tests.test_advice import DOUBTFUL
from tests.test_advice import ENVIRON as SECRETS

CONFIG = Path(__file__).parent.parent / "config"
SCHEMA = CONFIG / "gateway.schema.json"
FILES = sorted([*CONFIG.glob("gateway.*.yaml"), *CONFIG.glob("examples/*.yaml")])

MADE = schema.schema()
VALIDATOR = Draft7Validator(MADE)

PHONE = "providers: {p: {kind: twilio_media_streams, auth: none}}\n"
LINE = "providers: {p: {kind: plivo_audio_streaming, auth: none, %s}}\n"
RELAY = "providers: {p: {kind: twilio_conversation_relay, auth: none, %s}}\n"
ECHO = "services: {echo: {kind: echo}}\n"
AGENT = "services: {echo: {kind: websocket, %s}}\n"
ROUTES = "routes: [{service: echo}]\n"
REST = ECHO + ROUTES
BASE = PHONE + REST

MISTAKES = [
    "",
    "[]",
    "text",
    PHONE + ECHO,
    PHONE + ECHO + "routes: []",
    PHONE + ECHO + "routes: {service: echo}",
    "providers: {}\n" + REST,
    'providers: {"p/q": {kind: twilio_media_streams, auth: none}}\n' + REST,
    "providers: {p: {kind: twilio_media_stream, auth: none}}\n" + REST,
    "providers: {p: {auth: none}}\n" + REST,
    "providers: {p: {kind: twilio_media_streams}}\n" + REST,
    "providers: {p: {kind: twilio_media_streams, auth: all}}\n" + REST,
    BASE + "lisen: 127.0.0.1:80",
    BASE + "listen: 8080",
    BASE + "listen: localhost",
    BASE + "public_url: voice.example.com",
    BASE + "public_url: https://voice.example.com/",
    BASE + "public_url: https://voice.example.com?x=1",
    BASE + "secret: short",
    BASE + "tls: {certificate: /etc/c.pem}",
    BASE + "tls: {certificate: file:/etc/c.pem, key: /etc/k.pem}",
    BASE + "max_calls: 0",
    BASE + "max_calls: 2.5",
    BASE + "max_calls: many",
    BASE + "max_calls_per_second: 0",
    BASE + 'hold_ms: "20"',
    BASE + "start_timeout_secs: 61",
    BASE + "log_level: inf",
    LINE % "media_format: {encoding: mulow, sample_rate: 8000}" + REST,
    LINE % "media_format: {encoding: mulaw}" + REST,
    LINE % "media_format: {encoding: mulaw, sample_rate: 800}" + REST,
    LINE % "accept_v2: maybe" + REST,
    LINE % "welcome_greeting: hello" + REST,
    RELAY % "interruptible: sometimes" + REST,
    RELAY % "languages: [{voice: x}]" + REST,
    RELAY % "hints: {a: b}" + REST,
    PHONE + "services: {echo: {kind: recordr}}\n" + ROUTES,
    PHONE + "services: {echo: {delay_ms: 3}}\n" + ROUTES,
    PHONE + "services: {echo: {kind: echo, delay_ms: -1}}\n" + ROUTES,
    PHONE + AGENT % "frame_ms: 20" + ROUTES,
    PHONE + AGENT % 'url: "http://x"' + ROUTES,
    PHONE + AGENT % 'url: "ws://x", frame_ms: 30' + ROUTES,
    PHONE + AGENT % 'url: "ws://x", carrier: plivo' + ROUTES,
    PHONE + AGENT % 'url: "ws://x", track: both' + ROUTES,
    PHONE + ECHO + "routes: [{}]",
    PHONE + ECHO + "routes: [echo]",
    PHONE + ECHO + "routes: [{service: echo, listener: [a]}]",
    PHONE + ECHO + "routes: [{service: echo, called: +14155550100}]",
    PHONE + ECHO + 'routes: [{service: echo, called: "+1 415"}]',
    PHONE + ECHO + "routes: [{service: echo, name: a b}]",
    PHONE + ECHO + "routes: [{service: echo, on_lost: retry}]",
]

FINE = [
    BASE,
    *(text.replace("‸", "") for text, _ in DOUBTFUL),
    BASE + "max_calls: ${CALLS}\nlisten: ${LISTEN}\nlog_level: ${LEVEL:-info}\nstart_timeout_secs: ${SECS:-1}",
    LINE % 'accept_v2: "${FLAG:-true}", parameters: {a: b}' + REST,
    RELAY % "hints: [a, b], speech_timeout: 700, languages: [{code: de-DE}], elevenlabs_text_normalization: on" + REST,
    RELAY % "hints: a, speech_timeout: auto" + REST,
    PHONE + AGENT % 'url: "ws://${HOST}:9000", frame_ms: "${FRAME:-20}"' + ROUTES,
]
ENVIRON = SECRETS | {"CALLS": "7", "LISTEN": "127.0.0.1:0", "HOST": "127.0.0.1"}


def complaints(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(text))]


def test_the_schema_is_one() -> None:
    Draft7Validator.check_schema(MADE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_schema_accepts_every_file_in_config(path: Path) -> None:
    assert [] == complaints(path.read_text())


@pytest.mark.parametrize("text", FINE, ids=range(len(FINE)))
def test_the_schema_accepts_what_the_gateway_accepts(text: str) -> None:
    config.parse(text, environ=ENVIRON)
    assert [] == complaints(text)


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_the_schema_refuses_a_mistake_that_the_gateway_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse(text, environ={})
    assert complaints(text)


def test_a_provider_of_ones_own_may_have_any_options() -> None:
    assert [] == complaints("providers: {p: {kind: acme.carrier, colour: blue}}\n" + REST)


def nodes(made: Any) -> Iterator[dict[str, Any]]:
    if isinstance(made, dict):
        yield made
    for inner in made.values() if isinstance(made, dict) else made if isinstance(made, list) else []:
        yield from nodes(inner)


def test_every_option_is_explained_and_every_default_is_one_that_may_be_written() -> None:
    options = [(name, option) for node in nodes(MADE) for name, option in node.get("properties", {}).items()]
    assert len(options) > 80
    for name, option in options:
        assert option["description"], name
        if "default" in option:
            part = Draft7Validator({**option, "definitions": MADE["definitions"]})
            assert part.is_valid(option["default"]), name


def test_the_schema_has_every_option_of_every_kind() -> None:
    assert [*MADE["properties"]] == [field.encode_name for field in msgspec.structs.fields(Settings)]
    for kind in providers.names():
        fields = {field.encode_name for field in msgspec.structs.fields(providers.load(kind).Config)}
        assert {"kind", "auth", *fields} == {*MADE["definitions"][kind]["properties"]}


def test_references_lead_somewhere() -> None:
    for node in nodes(MADE):
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/definitions/") in MADE["definitions"]
            assert node.keys() == {"$ref"}, "what stands beside a reference is not read"


def test_the_schema_in_config_is_current_and_the_command_prints_it() -> None:
    assert schema.text() == SCHEMA.read_text(), "run `python -m tests.test_config`"
    printed = CliRunner().invoke(cli.main, ["schema"])
    assert (0, MADE) == (printed.exit_code, json.loads(printed.output))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_in_config_tells_editors_where_the_schema_is(path: Path) -> None:
    first = path.read_text().partition("\n")[0]
    marker = "# yaml-language-server: $schema="
    assert first.startswith(marker)
    assert SCHEMA == (path.parent / first.removeprefix(marker)).resolve()
