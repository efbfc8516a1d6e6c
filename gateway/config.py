"""A YAML file to frozen `Settings`, or every error in it at once: `file:line:column: key: what is wrong: value; what to write`.

YAML is read event by event, so that each value keeps its place and its spelling: the type that a field wants decides how a
value is read, never YAML's own guesses (`+14155550100` an integer, `012` ten, `no` false).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from msgspec import inspect as types

import providers
from gateway import advice
from gateway.errors import ConfigError, LocalError, UnsupportedCommand
from gateway.events import Start
from gateway.media import MULAW_8K
from gateway.services import dialect_pipecat
from gateway.services.dialect import Account
from gateway.settings import MASKED, ProviderEntry, Route, Settings, WebsocketService, host_port, is_loopback
from gateway.yaml_nodes import MAX_BYTES, Findings, Node, printable, read, shown

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<broken>\$\{)")
_SECRET_KEY = re.compile(r"(?i)(secret|token|password|authorization|credential|(api|signing)_?key)s?$")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NEEDED = {
    "secret": "make one with `openssl rand -hex 32` and write secret: ${GATEWAY_SECRET}",
    "public_url": "write what carriers dial, for instance public_url: https://voice.example.com",
}
"""Without these no signature can be checked and no stream URL signed."""

Path_ = tuple[str | int, ...]


def load(path: str | Path, *, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in a YAML file. Raises ConfigError with every finding, one per line, and nothing else."""
    return examine(path, environ=environ)[0]


def parse(text: str, *, source: str = "<text>", environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in `text`; `source` names it in errors, `environ` (default: the process's) answers `${VAR}`.

    Raises ConfigError with every finding, one per line, and nothing else.
    """
    return examine_text(text, source=source, environ=environ)[0]


def examine(path: str | Path, *, environ: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
    """Like `load`, with warnings: `file:line:column: warning: …`, what works and is probably not meant."""
    return examine_text(read_file(path), source=str(path), environ=environ)


def read_file(path: str | Path) -> str:
    """The text of a configuration file. Raises ConfigError."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise ConfigError(f"{printable(str(path))}: can't be read: {reason}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", "replace")
        place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise ConfigError(f"{printable(str(path))}:{place}: not UTF-8: byte 0x{raw[error.start]:02x}; save it as UTF-8") from None


def examine_text(text: str, *, source: str = "<text>", environ: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
    """Like `parse`, with warnings: `source:line:column: warning: …`."""
    findings = Findings(source)
    root = read(text, findings, _SHORTEST)
    reader = _Reader(findings, os.environ if environ is None else environ)
    settings = reader.settings(root) if root is not None else None
    findings.raise_if_any()
    assert settings is not None  # noqa: S101 — whoever returns None has reported why
    return settings, reader.warnings(source, settings)


def dialect(kind: str, token: str | None) -> Account:
    """Who plays the carrier `kind` towards a service, signing with `token`. Raises whatever its options say."""
    if kind == dialect_pipecat.KIND:
        if token is not None:
            raise ConfigError("pipecat knows no signatures; write `authorization` in place of `dialect_token`")
        return dialect_pipecat.Account()
    provider = providers.load(kind)
    options = {"auth": "none"} if token is None else {"auth_token": token}
    return provider(provider.Config(**options))


# --- nodes to structs ----------------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """This value won't do. `what; hint`: the value is put between the two, unless the sentence says all there is to say."""

    def __init__(self, sentence: str, *, show: bool = True) -> None:
        super().__init__(sentence)
        self.show = show


_BAD: Any = type("_Bad", (), {"__repr__": lambda _: "<reported>"})()
"""Stands for a value whose error has been reported."""


class _Reader:
    """Walks nodes and the fields they are meant for, side by side, and reports whatever does not fit."""

    def __init__(self, findings: Findings, environ: Mapping[str, str]) -> None:
        self._findings = findings
        self._environ = environ
        self._secrets: set[str] = set()
        self._known: dict[str, list[str]] = {}
        self._signed: list[str] = []
        self._unsigned: list[str] = []
        self._labels: set[str] = set()
        self._given: dict[Path_, tuple[Node, Any]] = {}

    def warnings(self, source: str, settings: Settings) -> list[str]:
        """What works and is probably not meant; only for a file without mistakes."""
        given = {
            path: advice.Given(node.text if node.kind == "scalar" else None, value, _is_secret(path))
            for path, (node, value) in self._given.items()
        }
        found = Findings(source)
        for path, text in advice.warnings(settings, given, signed=self._signed):
            at = next(self._given[path[:length]][0] for length in range(len(path), -1, -1) if path[:length] in self._given)
            found.add(at.line, at.column, self._masked(f"warning: {_dotted(path)}: {text}"))
        return found.lines()

    def settings(self, root: Node) -> Settings | None:
        for top, entries in root.pairs:
            if top.text in ("providers", "services") and entries.kind == "mapping":
                self._known[top.text.removesuffix("s")] = list(dict.fromkeys(name.text for name, _ in entries.pairs))
        want = types.type_info(Settings)
        assert isinstance(want, types.StructType)  # noqa: S101 — for the type checker
        if root.kind != "mapping":
            known = ", ".join(field.encode_name for field in want.fields)
            self._report(root, (), "expected keys and values", f"known keys: {known}")
            return None
        self._given[()] = root, None
        values, nodes = self._fields(root, want, ())
        for key in ("providers", "services", "routes"):
            if key in values and not values[key]:
                self._report(nodes[key], (key,), "must not be empty", "no call could be taken")
        listen = values.get("listen", Settings.__struct_defaults__[0])
        if self._unsigned and listen is not _BAD and not is_loopback(host_port(listen)[0]):
            who = f"provider {self._unsigned[0]} has `auth: none`, so anybody could call; give it its account's `auth_token`"
            self._report(nodes["listen"], ("listen",), "not a loopback address", who, shown=shown(listen))
        for key, hint in _NEEDED.items():
            if self._signed and values.get(key) is None:
                self._report(nodes.get(key, root), (), f"missing key {key}", f"provider {self._signed[0]} needs it; {hint}")
        if values.get("admin") == listen and listen is not _BAD and host_port(listen)[1]:
            self._report(nodes["admin"], ("admin",), "the same as `listen`", "give it a port of its own", shown=shown(listen))
        built = self._build(Settings, values, root, nodes, ())
        return built if isinstance(built, Settings) else None

    # -- findings

    def _report(self, node: Node, path: Path_, what: str, hint: str = "", *, shown: str = "") -> Any:
        if node.kind != "broken":
            parts = [f"{_dotted(path)}: " if path else "", what, f": {shown}" if shown else "", f"; {hint}" if hint else ""]
            self._findings.add(node.line, node.column, "".join(parts))
        return _BAD

    def _unknown(self, node: Node, path: Path_, what: str, value: str, known: Iterable[str]) -> Any:
        known = list(known)
        close = get_close_matches(value, known, n=1)
        hint = (f"did you mean {close[0]}? " if close else "") + (f"known: {', '.join(known)}" if known else "none is known")
        return self._report(node, path, f"unknown {what}", printable(hint), shown=_display(value, path))

    # -- containers

    def convert(self, node: Node, want: types.Type, path: Path_) -> Any:
        """The value of `node` as `want` has it, or `_BAD` once what is wrong has been reported."""
        if node.kind == "broken":
            return _BAD
        checks = []
        while isinstance(want, types.Metadata):
            extra = want.extra or {}
            checks += [extra.get("check"), _readable if extra.get("file") else None]
            want = want.type
        try:
            if _readable in checks and node.text.startswith("file:"):
                raise _Wrong("what a file holds, where the path itself is wanted; write it without `file:`")
            if node.tag in ("int", "float"):  # a bare port is no address, with or without quotes
                for check in filter(None, checks):
                    check(node.text)
            value = self._converted(node, want, path)
            for check in checks:
                if check is not None and value is not _BAD:
                    check(value)
        except (_Wrong, ValueError) as error:
            what, _, hint = str(error).partition("; ")
            show = node.kind == "scalar" and (node.text or node.tag != "null") and getattr(error, "show", True)
            return self._report(node, path, what, hint, shown=_display(node.text, path) if show else "")
        self._given[path] = node, value
        return value

    def _converted(self, node: Node, want: types.Type, path: Path_) -> Any:
        if isinstance(want, types.UnionType):
            return self._one_of(node, want.types, path)
        if isinstance(want, types.StructType):
            if want.cls is ProviderEntry:
                return self._provider(node, path)
            values, nodes = self._fields(node, want, path)
            if want.cls is Route:
                self._check_route(values, nodes, path)
            if want.cls is WebsocketService:
                self._check_dialect(values, nodes, path)
            return self._build(want.cls, values, node, nodes, path)
        if isinstance(want, types.DictType):
            return self._dict(node, want, path)
        if isinstance(want, (types.ListType, types.VarTupleType)):
            if node.kind == "scalar" and node.tag != "null" and not isinstance(_bare(want.item_type), types.StructType):
                items: Sequence[Node] = [node]  # one stands for a list of one
            elif node.kind == "sequence":
                items = node.items
            else:
                raise _Wrong("expected a list; begin each of its entries with `- `")
            result = [
                self.convert(item, want.item_type, (*path, at) if items is node.items else path) for at, item in enumerate(items)
            ]
            return tuple(result) if isinstance(want, types.VarTupleType) else result
        if node.kind != "scalar" and not isinstance(want, types.AnyType):
            raise _Wrong(f"expected {_describe(want)}, found a {'list' if node.kind == 'sequence' else 'mapping'}")
        return self._scalar(node, want, path)

    def _one_of(self, node: Node, wants: Sequence[types.Type], path: Path_) -> Any:
        if node.kind == "scalar" and node.tag == "null" and any(isinstance(want, types.NoneType) for want in wants):
            return None
        structs = [want for want in wants if isinstance(want, types.StructType)]
        lists = [want for want in wants if isinstance(want, (types.ListType, types.VarTupleType))]
        rest = [want for want in wants if want not in structs and want not in lists and not isinstance(want, types.NoneType)]
        if structs and (node.kind == "mapping" or not (lists or rest)):
            return self.convert(node, structs[0], path) if len(structs) == 1 else self._tagged(node, structs, path)
        if lists and (node.kind == "sequence" or not rest):
            return self.convert(node, lists[0], path)
        if len(rest) == 1:
            return self.convert(node, rest[0], path)
        self._resolve(node, path)  # so that a missing variable is told as such
        for want in rest:
            attempt = _Reader(Findings(""), self._environ)
            value = attempt.convert(node, want, path)
            if value is not _BAD:
                return value
        raise _Wrong(f"unexpected value; expected {' or '.join(map(_describe, rest))}")

    def _tagged(self, node: Node, structs: Sequence[types.StructType], path: Path_) -> Any:
        by_tag = {str(want.tag): want for want in structs}
        field = structs[0].tag_field or "kind"
        kind = self._kind(node, field, by_tag, path)
        if kind is _BAD:
            return _BAD
        if kind not in by_tag:
            at = next(value for key, value in node.pairs if key.text == field)
            return self._unknown(at, (*path, field), field, kind, by_tag)
        return self.convert(node, by_tag[kind], path)

    def _kind(self, node: Node, field: str, known: Iterable[str], path: Path_) -> Any:
        """The value of the key that says which struct a mapping is meant for."""
        self._expect_mapping(node, (field,))
        for key, value in node.pairs:
            if key.text == field:
                return self.convert(value, types.StrType(), (*path, field))
        return self._report(node, path, f"missing key {field}", f"write {field}: and one of {', '.join(known)}")

    def _expect_mapping(self, node: Node, known: Iterable[str]) -> None:
        if node.kind != "mapping":
            raise _Wrong(f"expected keys and values; known keys: {', '.join(known)}")

    def _fields(
        self, node: Node, want: types.StructType, path: Path_, ignored: Sequence[str] = ()
    ) -> tuple[dict[str, Any], dict[str, Node]]:
        """Every field that the mapping gives, converted or `_BAD`, and where its value stands."""
        by_key = {field.encode_name: field for field in want.fields}
        known = [*ignored, *([want.tag_field] if want.tag_field and want.tag_field not in by_key else []), *by_key]
        self._expect_mapping(node, known)
        values: dict[str, Any] = {}
        nodes: dict[str, Node] = {}
        for key, value in self._pairs(node, path):
            if key.text in by_key:
                field = by_key[key.text]
                nodes[field.name] = value if value.tag != "null" or value.text else key
                values[field.name] = self.convert(
                    value._replace(line=nodes[field.name].line, column=nodes[field.name].column), field.type, (*path, key.text)
                )
            elif key.text not in known:
                self._unknown(key, path, "key", key.text, known)
        for field in want.fields:
            if field.required and field.name not in values:
                example = "" if path else f", for instance `{field.encode_name}: {_EXAMPLES[field.encode_name]}`"
                self._report(node, path, f"missing key {field.encode_name}", f"expected {_describe(field.type)}{example}")
                values[field.name] = _BAD
        return values, nodes

    def _pairs(self, node: Node, path: Path_) -> Iterator[tuple[Node, Node]]:
        """The entries of a mapping; keys that are not plain text or come twice are reported and left out."""
        seen: dict[str, Node] = {}
        for key, value in node.pairs:
            if key.kind == "broken":
                continue
            if key.kind != "scalar":
                self._report(key, path, "a key must be text", 'a value that begins with { or [ needs quotes: "${VAR}"')
            elif key.tag == "merge":
                self._report(key, path, "merge keys are refused", "write the values out", shown="<<")
            elif key.tag != "str":
                self._report(
                    key, path, f"a key that YAML reads as {key.tag}", "write it in quotes", shown=_display(key.text, path)
                )
            elif key.text in seen:
                first = seen[key.text]
                where = f"it stands in line {first.line} already; keep one"
                self._report(key, path, "duplicate key", where, shown=_display(key.text, path))
            else:
                seen[key.text] = key
                yield key, value

    def _dict(self, node: Node, want: types.DictType, path: Path_) -> Any:
        if node.kind != "mapping":
            raise _Wrong("expected names and values; write `name: …` lines")
        result = {}
        for key, value in self._pairs(node, path):
            if path in (("providers",), ("services",)) and not _NAME.fullmatch(key.text):
                self._report(key, path, "not a name", "names are letters, digits, - and _, at most 64", shown=shown(key.text))
            result[key.text] = self.convert(value, want.value_type, (*path, key.text))
        return result

    def _build(self, cls: type, values: dict[str, Any], node: Node, nodes: Mapping[str, Node], path: Path_) -> Any:
        if _is_bad(values):
            return _BAD
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            # A struct's own objection; a key as its first word tells where it belongs.
            for problem in error.args or (str(error),):
                field = re.split(r"[ :]", str(problem), maxsplit=1)[0].strip("`")
                self._report(
                    nodes.get(field, node),
                    (*path, field) if field in nodes else path,
                    self._masked(str(problem).removeprefix(f"{field}: ")),
                )
            return _BAD

    def _masked(self, text: str) -> str:
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, MASKED)
        return printable(text)

    # -- what this gateway knows about itself

    def _provider(self, node: Node, path: Path_) -> Any:
        kind = self._kind(node, "kind", providers.names(), path)
        if kind is _BAD:
            return _BAD
        at = next(value for key, value in node.pairs if key.text == "kind")
        if "." not in kind and kind not in providers.names():
            return self._unknown(at, (*path, "kind"), "provider kind", kind, providers.names())
        try:
            want = types.type_info(providers.load(kind).Config)
        except Exception as error:  # a foreign module may fail to import in any way
            reason = self._masked(f"{type(error).__name__}: {error}")
            return self._report(at, (*path, "kind"), "can't be loaded", reason, shown=shown(kind))
        assert isinstance(want, types.StructType)  # noqa: S101 — the contract of a provider
        own_auth = any(field.encode_name == "auth" for field in want.fields)
        values, nodes = self._fields(node, want, path, ("kind",) if own_auth else ("kind", "auth"))
        given = next((value for key, value in node.pairs if key.text == "auth"), None)
        if own_auth:
            auth = values.get("auth")
        elif given is not None:
            auth = self.convert(given, types.type_info(Literal["none"] | None), (*path, "auth"))
        else:
            auth = None
        if auth == "none":
            self._unsigned.append(str(path[-1]))
        elif auth is None:
            credentials = {field.name for field in want.fields if _SECRET_KEY.search(field.name)}
            if nodes.keys() & credentials or not credentials:  # one of another kind may know its carrier in its own way
                self._signed.append(str(path[-1]))
            else:
                how = "write auth_token: ${NAME} with the account's token, or `auth: none` where `listen` is a loopback address"
                return self._report(node, path, "missing key auth_token", how)
        config = self._build(want.cls, values, node, nodes, path)
        return _BAD if _BAD in (auth, config) else ProviderEntry(kind=kind, config=config, auth=auth)

    def _check_dialect(self, values: dict[str, Any], nodes: Mapping[str, Node], path: Path_) -> None:
        kind, media_format = values.get("dialect"), values.get("media_format")
        if kind is _BAD:
            return
        if kind is None:
            if "dialect_token" in nodes:
                self._report(nodes["dialect_token"], (*path, "dialect_token"), "has no effect without `dialect`", "write it, too")
            return
        known = [*providers.names(), dialect_pipecat.KIND]
        if "." not in kind and kind not in known:
            values["dialect"] = self._unknown(nodes["dialect"], (*path, "dialect"), "dialect", kind, known)
            return
        try:
            token = values.get("dialect_token")
            carrier = dialect(kind, None if token is _BAD else token).carrier()
        except Exception as error:  # a foreign module may fail in any way
            ours = isinstance(error, (ConfigError, LocalError))
            reason = self._masked(str(error) if ours else f"{type(error).__name__}: {error}")
            values["dialect"] = self._report(nodes["dialect"], (*path, "dialect"), "can't be spoken", reason, shown=shown(kind))
            return
        if media_format is None:
            values["media_format"] = dialect_pipecat.DEFAULT_FORMAT if kind == dialect_pipecat.KIND else MULAW_8K
        elif media_format is not _BAD and not carrier.habits.text:
            try:
                [*carrier.encode(Start("stream", "call", media_format=media_format))]
            except UnsupportedCommand as error:
                where = (*path, "media_format")
                values["media_format"] = self._report(
                    nodes["media_format"], where, str(error), "leave it out for the dialect's own"
                )

    def _check_route(self, values: dict[str, Any], nodes: Mapping[str, Node], path: Path_) -> None:
        provider: Any = values.get("provider")
        if provider not in (None, _BAD, *self._known.get("provider", (provider,))):
            self._unknown(nodes["provider"], (*path, "provider"), "provider", provider, self._known["provider"])
        label = values.get("name")
        if isinstance(label, str):
            if label in self._labels:
                self._report(nodes["name"], (*path, "name"), "a second route of this name", "choose another", shown=shown(label))
            self._labels.add(label)
        speakers: Any = values.get("service") if isinstance(values.get("service"), tuple) else ()
        if not speakers and "service" in nodes and values["service"] is not _BAD:
            self._report(nodes["service"], (*path, "service"), "an empty list", "name one of `services`")
        for key in ("service", "listeners"):
            names: Any = values.get(key)
            if not isinstance(names, tuple) or key not in nodes:
                continue
            at = nodes[key]
            for place, (name, node) in enumerate(zip(names, at.items or [at], strict=False)):
                if name not in (_BAD, *self._known.get("service", (name,))):
                    self._unknown(node, (*path, key), "service", name, self._known["service"])
                elif key == "listeners" and name is not _BAD and name in speakers:
                    hint = "what it hears of the call it gets as the speaker already; take it out here"
                    self._report(node, (*path, key), "speaks on this route", hint, shown=shown(name))
                elif key == "listeners" and name is not _BAD and name in names[:place]:
                    self._report(node, (*path, key), "listens already", "name it once", shown=shown(name))

    # -- scalars

    def _scalar(self, node: Node, want: types.Type, path: Path_) -> Any:
        if isinstance(want, types.AnyType):
            return self._anything(node, path)
        text, resolved = self._resolve(node, path)
        tag = "str" if resolved and node.tag != "str" else node.tag
        if tag == "null" and not isinstance(want, types.NoneType):
            raise _Wrong(f"no value; expected {_describe(want)}")
        if isinstance(want, types.EnumType):
            return self._choice(node, path, text, {str(member.value): member for member in want.cls})
        if isinstance(want, types.LiteralType):
            return self._choice(node, path, text, {str(value): value for value in want.values})
        if isinstance(want, types.StrType):
            return _string(text, tag, want)
        if isinstance(want, types.BoolType):
            if tag == "bool" or (resolved and text.lower() in ("true", "false")):
                return text.lower() in ("true", "yes", "on")
            raise _Wrong("expected true or false; write it without quotes")
        if isinstance(want, (types.IntType, types.FloatType)):
            return _number(text, tag, resolved, want)
        raise _Wrong(f"a type that no file can express ({type(want).__name__}); leave it out")

    def _anything(self, node: Node, path: Path_) -> Any:
        if node.kind == "mapping":
            return {key.text: self._anything(value, (*path, key.text)) for key, value in self._pairs(node, path)}
        if node.kind == "sequence":
            return [self._anything(item, (*path, at)) for at, item in enumerate(node.items)]
        kind: dict[str, types.Type] = {"int": types.IntType(), "float": types.FloatType(), "bool": types.BoolType()}
        return None if node.tag == "null" else self.convert(node, kind.get(node.tag, types.StrType()), path)

    def _choice(self, node: Node, path: Path_, text: str, known: Mapping[str, Any]) -> Any:
        if text in known:
            return known[text]
        return self._unknown(node._replace(text=text), path, "value", text if text == node.text else node.text, known)

    def _resolve(self, node: Node, path: Path_) -> tuple[str, bool]:
        """The text with `${VAR}`, `${VAR:-default}` and `file:/path` put in, and whether anything was put in."""
        text = node.text
        if node.tag != "str":
            return text, False

        def value_of(reference: re.Match[str]) -> str:
            if reference["broken"]:
                raise _Wrong("not a reference; write ${NAME} or ${NAME:-default}, or $${ for the two characters", show=False)
            if (name := reference["name"]) is None:
                return "${"
            value = self._environ.get(name, "")
            if not value and reference["default"] is None:
                state = "is set but empty" if name in self._environ else "is not set"
                otherwise = "" if _is_secret(path) else f", or write ${{{name}:-default}}"
                raise _Wrong(f"environment variable {name} {state}; set it{otherwise}", show=False)
            return value or reference["default"] or ""

        resolved = _REFERENCE.sub(value_of, text)
        if text.startswith("file:"):
            resolved = _file(resolved.removeprefix("file:"))
        if resolved and (resolved != text or _is_secret(path)):
            self._secrets.add(resolved)
        return resolved, resolved != text


def _file(name: str) -> str:
    path = Path(name)
    if not path.is_absolute():
        raise _Wrong("not an absolute path; write file:/run/secrets/name")
    try:
        if not path.is_file():
            raise _Wrong("no such file; write file:/run/secrets/name of a file that exists")
        with path.open("rb") as file:
            text = file.read(65_537).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise _Wrong(f"the file can't be read; {reason}") from None
    if len(text) > 65_536 or not text.strip():
        raise _Wrong("the file is empty or larger than 64 KiB; write the one value into it")
    return text.removesuffix("\n").removesuffix("\r")


def _readable(name: str) -> None:
    """Raises ValueError unless `name` is a file that this process may read."""
    hint = "write the path of a file that this user may read"
    try:
        if not Path(name).is_file():  # opening a FIFO would wait
            raise ValueError(f"no such file; {hint}")
        with Path(name).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}; {hint}") from None


def _string(text: str, tag: str, want: types.StrType) -> str:
    if tag != "str":
        read = {"int": "a number", "float": "a number", "bool": "true or false", "timestamp": "a date"}.get(tag, tag)
        raise _Wrong(f"YAML reads this as {read}; write it in quotes: {_quoted(text)}")
    if want.min_length is not None and len(text) < want.min_length:
        raise _Wrong(f"too short; at least {want.min_length} characters")
    if want.max_length is not None and len(text) > want.max_length:
        raise _Wrong(f"too long; at most {want.max_length} characters")
    if want.pattern is not None and not re.search(want.pattern, text):
        raise _Wrong(f"does not match; expected the pattern {want.pattern}")
    return text


def _number(text: str, tag: str, resolved: bool, want: types.IntType | types.FloatType) -> float:
    whole = isinstance(want, types.IntType)
    form = r"[-+]?(0|[1-9][0-9_]*)" if whole else r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?"
    if not re.fullmatch(form, text) or len(text) > 20:
        raise _Wrong(
            f"expected {_describe(want)}; write digits only" if whole else f"expected {_describe(want)}; write for instance 2.5"
        )
    if tag == "str" and not resolved and not re.search("[eE]", text):
        raise _Wrong("expected a number, found text; write it without quotes")
    value = int(text) if whole else float(text)
    fits = (
        (want.ge is None or value >= want.ge)
        and (want.gt is None or value > want.gt)
        and (want.le is None or value <= want.le)
        and (want.lt is None or value < want.lt)
    )
    if not fits:
        raise _Wrong(f"out of range; expected {_describe(want)}")
    return value


# --- words ---------------------------------------------------------------------------------------------------------------


def _bare(want: types.Type) -> types.Type:
    while isinstance(want, types.Metadata):
        want = want.type
    return want


def _describe(want: types.Type) -> str:
    """What to write for `want`, in words."""
    want = _bare(want)
    if isinstance(want, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(one) for one in want.types if not isinstance(one, types.NoneType)))
    if isinstance(want, (types.IntType, types.FloatType)):
        words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
        limits = [f"{word} {limit}" for name, word in words.items() if (limit := getattr(want, name)) is not None]
        return " ".join(["a whole number" if isinstance(want, types.IntType) else "a number", *limits])
    if isinstance(want, types.EnumType):
        return f"one of {', '.join(str(member.value) for member in want.cls if isinstance(member, Enum))}"
    if isinstance(want, types.LiteralType):
        return f"{'one of ' if len(want.values) > 1 else ''}{', '.join(map(str, want.values))}"
    if isinstance(want, types.StructType):
        return "keys and values"
    if isinstance(want, types.DictType):
        return "names and values"
    if isinstance(want, (types.ListType, types.VarTupleType)):
        inner = _describe(want.item_type)
        return inner if inner == "text" else "a list"
    return {types.StrType: "text", types.BoolType: "true or false"}.get(type(want), "a value")


def _is_bad(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_bad, value.values()))
    return any(map(_is_bad, value)) if isinstance(value, (list, tuple)) else value is _BAD


def _is_secret(path: Path_) -> bool:
    return bool(_SECRET_KEY.search(next((part for part in reversed(path) if isinstance(part, str)), "")))


def _display(text: str, path: Path_) -> str:
    return MASKED if _is_secret(path) else shown(text)


def _quoted(text: str) -> str:
    return f'"{text}"' if text.isprintable() and len(text) <= 60 else 'like "this"'


def _dotted(path: Path_) -> str:
    result = ""
    for part in path:
        if isinstance(part, int):
            result += f"[{part}]"
        else:
            result += ("." if result else "") + (part if _NAME.fullmatch(part) else shown(part))
    return result


_EXAMPLES = {
    "providers": f"{{phone: {{kind: {next(iter(providers.names()), 'KIND')}, auth: none}}}}",
    "services": "{echo: {kind: echo}}",
    "routes": "[{service: echo}]",
}
_SHORTEST = "\n".join(f"  {key}: {value}" for key, value in _EXAMPLES.items())
