"""The configuration as a JSON Schema (draft 7, which editors know best), made from the structs and their docstrings.

It is a little more generous than `gateway.config`, never stricter: what depends on other keys, on files or on the environment is
for `telephony-gateway check` to tell. Wherever a value may stand, `${VAR}` and `file:/path` may stand too.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct
from msgspec import inspect as types

import providers
from gateway.settings import ProviderEntry, Settings

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-07/schema#"
_REFERENCE = {
    "description": "${VAR}, ${VAR:-default}, or file:/path for the text of a file.",
    "type": "string",
    "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}|^file:",
}
_NAME = {"pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"}
_GROUPED = {"type": "string", "pattern": "^[0-9]+(_[0-9]+)+$"}
"""`60_000`, a number in YAML 1.1, which we read, and text in YAML 1.2, which many editors read."""

_CREDENTIALS = ("auth_token", "signing_key", "auth")


def schema() -> Schema:
    """The whole file."""
    maker = _Maker()
    root = maker.struct(types.type_info(Settings))
    for key in ("providers", "services"):
        root["properties"][key] |= {"minProperties": 1, "propertyNames": _NAME}
    root["properties"]["routes"] |= {"minItems": 1}
    return {
        "$schema": _DRAFT,
        "title": "telephony-gateway",
        **root,
        "definitions": {"reference": _REFERENCE, **dict(sorted(maker.definitions.items()))},
    }


def text() -> str:
    """The whole file's schema as `telephony-gateway schema` prints it."""
    return msgspec.json.format(msgspec.json.encode(schema())).decode() + "\n"


def meanings(struct: type[Struct]) -> dict[str, str]:
    """The lines `name: meaning` of a struct's docstring; several names may share one."""
    found = {}
    for line in (struct.__doc__ or "").splitlines():
        names, colon, meaning = line.strip().partition(": ")
        if colon and re.fullmatch(r"[a-z0-9_]+(, [a-z0-9_]+)*", names):
            found.update(dict.fromkeys(names.split(", "), meaning))
    return found


class _Maker:
    """Types to schemas; structs are collected in `definitions`."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def of(self, want: types.Type) -> Schema:
        """What a value may be that `gateway.config` reads as `want`."""
        also: Schema = {}
        while isinstance(want, types.Metadata):
            also |= want.extra_json_schema or {}
            if (want.extra or {}).get("file"):  # the file itself is wanted, never what it holds
                return {"type": "string", "not": {"pattern": "^file:"}}
            want = want.type
        match want:
            case types.UnionType():
                return self._any_of([self.of(one) for one in want.types])
            case types.StructType() if want.cls is ProviderEntry:
                return self._defined("provider", self._provider)
            case types.StructType():
                name = str(want.tag or want.cls.__name__)
                return self._defined(name, lambda: self.struct(want))
            case types.DictType():
                return {"type": "object", "additionalProperties": self.of(want.value_type)}
            case types.ListType() | types.VarTupleType():
                one = self.of(want.item_type)
                several = {"type": "array", "items": one}
                return several if "$ref" in one and one["$ref"] != _refer("reference")["$ref"] else self._any_of([one, several])
            case types.StrType():
                limits: Schema = {"minLength": want.min_length, "maxLength": want.max_length, "pattern": want.pattern}
                text = {"type": "string", **_given(limits), **also}
                return text if text.keys() == {"type"} else self._any_of([text, _refer("reference")])
            case types.IntType() | types.FloatType():
                limits = {"minimum": want.ge, "exclusiveMinimum": want.gt, "maximum": want.le, "exclusiveMaximum": want.lt}
                number = {"type": "integer" if isinstance(want, types.IntType) else "number", **_given(limits)}
                return self._any_of([number, _refer("reference"), _GROUPED])
            case types.BoolType():
                return self._any_of([{"type": "boolean"}, _refer("reference")])
            case types.EnumType():
                return self._any_of([{"enum": [member.value for member in want.cls]}, _refer("reference")])
            case types.LiteralType():
                return self._any_of([{"enum": [*want.values]}, _refer("reference")])
            case types.NoneType():
                return {"type": "null"}
            case _:
                return {}

    def struct(self, want: types.Type, extra: tuple[types.Field, ...] = ()) -> Schema:
        """An object with this struct's keys, and `extra` ones."""
        assert isinstance(want, types.StructType)  # noqa: S101 — for the type checker
        fields = {field.encode_name: self._field(field, want.cls) for field in (*extra, *want.fields)}
        kind = {want.tag_field: {"description": "What it is.", "const": want.tag}} if want.tag_field else {}
        required = [*kind, *(field.encode_name for field in want.fields if field.required)]
        return {
            "description": _about(want.cls),
            "type": "object",
            "properties": {**kind, **fields},
            **({"required": required} if required else {}),
            "additionalProperties": False,
        }

    def _field(self, field: types.Field, cls: type[Struct]) -> Schema:
        about = meanings(cls).get(field.encode_name) or _about(cls)
        made = self.of(field.type)
        if "$ref" in made:  # whatever stands beside a $ref is not read
            made = {"allOf": [made]}
        default = (
            {}
            if field.default in (msgspec.NODEFAULT, None, "")
            else {"default": msgspec.json.decode(msgspec.json.encode(field.default))}
        )
        return {"description": about[:1].upper() + about[1:], **made, **default}

    def _provider(self) -> Schema:
        """One of the kinds in this tree, or of a module of one's own, whose options nobody here knows."""
        kinds = [self._defined(kind, lambda kind=kind: self._kind(kind)) for kind in providers.names()]
        told = meanings(ProviderEntry)["kind"]
        foreign = {
            "type": "object",
            "properties": {"kind": {"description": told, "type": "string", "pattern": r"\."}},
            "required": ["kind"],
        }
        return {"anyOf": [*kinds, foreign]}

    def _kind(self, kind: str) -> Schema:
        want = types.type_info(providers.load(kind).Config)
        assert isinstance(want, types.StructType)  # noqa: S101 — the contract of a provider
        entry = types.type_info(ProviderEntry)
        assert isinstance(entry, types.StructType)  # noqa: S101 — for the type checker
        own = {field.encode_name for field in want.fields}
        extra = tuple(field for field in entry.fields if field.encode_name == "auth" and "auth" not in own)
        made = self.struct(want, extra)
        made["properties"] = {"kind": {"description": meanings(ProviderEntry)["kind"], "const": kind}, **made["properties"]}
        made["required"] = ["kind", *made.get("required", [])]
        ways = [key for key in _CREDENTIALS if key in made["properties"]]
        return made | {"anyOf": [{"required": [way]} for way in ways]}

    def _defined(self, name: str, make: Any) -> Schema:
        if name not in self.definitions:
            self.definitions[name] = {}  # a struct may hold itself
            self.definitions[name] = make()
        return _refer(name)

    def _any_of(self, choices: list[Schema]) -> Schema:
        """One level of alternatives, each once."""
        flat: list[Schema] = []
        for choice in choices:
            inner = choice["anyOf"] if choice.keys() == {"anyOf"} else [choice]
            flat += [each for each in inner if each not in flat]
        return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _about(cls: type[Struct]) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


def _refer(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _given(limits: dict[str, Any]) -> Schema:
    return {name: limit for name, limit in limits.items() if limit is not None}
