"""The specification for machines says what the code does: no drift, no message without words, examples that are true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator, ValidationError

from gateway import cli, specification
from gateway.services import native
from gateway.services.framed import HEADER_BYTES, Flags, unpack
from gateway.services.retry import _CLOSE_CODES
from tests.doubles import service as double

ROOT = Path(__file__).parent.parent
STRUCTS = (*specification.FROM_GATEWAY, *specification.FROM_SERVICE)


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(specification.json_schema() | {"anyOf": [{"$ref": f"#/$defs/{name}"}]})


def test_the_committed_document_is_what_the_structs_say() -> None:
    committed = (ROOT / "gateway" / "asyncapi.yaml").read_text()
    assert cli.asyncapi_yaml() == committed, "run `telephony-gateway protocol > gateway/asyncapi.yaml`"


def test_the_command_prints_both_forms() -> None:
    printed = CliRunner().invoke(cli.main, ["protocol"])
    assert yaml.safe_load(printed.output) == specification.asyncapi()
    schema = CliRunner().invoke(cli.main, ["protocol", "--json-schema"])
    Draft202012Validator.check_schema(json.loads(schema.output))


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_message_and_every_field_has_a_description(struct: type[msgspec.Struct]) -> None:
    about, meanings = specification.describe(struct)
    own = {field.encode_name for field in msgspec.structs.fields(struct)} - {"id"}
    assert about.endswith(".")
    assert own == set(meanings)
    schema = specification.message_schemas()[struct.__name__]
    assert all("description" in schema["properties"][name] for name in own)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_message_has_an_example_that_its_own_direction_takes(struct: type[msgspec.Struct]) -> None:
    example = specification.examples()[struct]
    up = issubclass(struct, native.Up)
    validator("FromGateway" if up else "FromService").validate(example)
    assert msgspec.convert(example, struct, strict=True)
    if not up:
        native.NativeCarrier(
            session="", provider="", kind="", role="speaker", track="inbound", media_format=None, frame_ms=20
        ).read(json.dumps(example))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ({"type": "checkpoint", "name": "a"}, True),
        ({"type": "checkpoint", "name": "a", "id": 3}, True),
        ({"type": "checkpoint", "nmae": "a"}, False),
        ({"type": "checkpoint", "name": 1}, False),
        ({"type": "sing"}, False),
        ({"type": "stop", "after": "later"}, False),
        ({"type": "ready", "next": None}, True),
        ({"type": "ready", "next": -1}, False),
        ({"type": "ready"}, True),
        ({"type": "ack"}, False),
        ({"type": "dtmf", "digits": "1", "duration": 5}, False),
        ([], False),
    ],
)
def test_the_schema_and_the_parser_agree_on_what_a_service_may_say(text: object, good: bool) -> None:
    carrier = native.NativeCarrier(
        session="", provider="", kind="", role="speaker", track="inbound", media_format=None, frame_ms=20
    )
    try:
        carrier.read(json.dumps(text))
    except native.Malformed:
        assert not good
    else:
        assert good
    assert good is validator("FromService").is_valid(text)


def test_services_may_rely_on_every_field_and_must_ignore_new_ones() -> None:
    start = specification.examples()[native.StartUp]
    validator("FromGateway").validate(start | {"novelty": 1})
    with pytest.raises(ValidationError):
        validator("FromGateway").validate({name: value for name, value in start.items() if name != "resume"})


def test_a_foreign_reading_of_the_protocol_has_the_same_words() -> None:
    schemas = specification.message_schemas()
    mine = {}
    for struct in specification.FROM_GATEWAY:
        fields = set(schemas[struct.__name__]["properties"]) - {"type", "n", "replayed"}
        mine[struct.__struct_config__.tag] = fields
    assert {kind: set(fields) for kind, fields in double.TELLS.items()} == mine


def test_every_reference_leads_somewhere() -> None:
    document = specification.asyncapi()
    references = re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))
    assert references
    for reference in references:
        place: Any = document
        for part in reference.split("/"):
            place = place[part]


def test_the_header_is_described_as_it_is_packed() -> None:
    audio = specification.asyncapi()["components"]["messages"]["audioFramed"]
    sizes = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
    at = 0
    for field in audio["x-header"]:
        assert at == field["offset"]
        at += sizes[field["type"]]
    assert HEADER_BYTES == at
    example = audio["x-header-example"]
    header = unpack(bytes.fromhex(example["hex"]), 2)
    assert ("outbound", example["flags"], example["seq"], example["pos"]) == (header.track, header.flags, header.seq, header.pos)
    for flag in Flags:
        assert re.search(rf"\b{int(flag)} ", audio["x-header"][2]["meaning"])


def test_every_close_code_with_a_meaning_is_told() -> None:
    told = specification.asyncapi()["channels"]["call"]["x-close-codes"]
    assert set(_CLOSE_CODES) - {1005} <= {int(code) for code in told}


def test_the_call_in_the_prose_follows_the_schemas() -> None:
    found = re.search(r"<!-- call -->\n```\n(.*?)```", (ROOT / "gateway" / "PROTOCOL.md").read_text(), re.DOTALL)
    assert found
    texts = [line for line in found[1].splitlines() if line[2] == "{"]
    for line in texts:
        validator("FromGateway" if line[0] == "<" else "FromService").validate(json.loads(line[2:]))
    told = [json.loads(line[2:]) for line in texts]
    assert ("start", "stop") == (told[0]["type"], told[-1]["type"])
    account = told[-1]["account"]
    assert account["queued"] == account["played"] + account["cleared"] + account["lost"]


def test_prose_and_schemas_have_the_same_close_codes() -> None:
    prose = (ROOT / "gateway" / "PROTOCOL.md").read_text()
    told = specification.asyncapi()["channels"]["call"]["x-close-codes"]
    assert set(told) <= set(re.findall(r"\b(?:1|4)\d{3}\b", prose[prose.index("| close code") :]))
