"""YAML text to nodes that keep their place and their spelling, or findings that say where the text is no YAML.

Aliases, anchors, tags, merge keys and second documents are findings too. Nothing here knows what a configuration means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import yaml

from gateway.errors import ConfigError

MAX_BYTES = 1 << 20

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {"str", "int", "float", "bool", "null", "timestamp", "merge", "value"}
# Characters that YAML forbids, so that they can be shown with their place before a parser sees them.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


class Findings:
    """What is wrong, with places."""

    def __init__(self, source: str) -> None:
        self._source = printable(source)
        self._found: dict[tuple[int, int, str], None] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, line: int, column: int, text: str) -> None:
        self._found[line, column, text] = None

    def lines(self) -> list[str]:
        """`file:line:column: what`, in the order of the file."""
        return [f"{self._source}:{line}:{column}: {text}" for line, column, text in sorted(self._found, key=_place)]

    def raise_if_any(self) -> None:
        if self._found:
            raise ConfigError("\n".join(self.lines()))


def _place(finding: tuple[int, int, str]) -> tuple[int, int]:
    return finding[:2]


class Node(NamedTuple):
    """One value with its place (from 1). `tag` is YAML's guess at a scalar's type; `text` is the scalar as written."""

    kind: Literal["scalar", "mapping", "sequence", "broken"]
    line: int
    column: int
    tag: str = ""
    text: str = ""
    items: Sequence[Node] = ()
    pairs: Sequence[tuple[Node, Node]] = ()


def read(text: str, findings: Findings, shortest: str) -> Node | None:
    """The one document in `text`; None (and a finding) if there is none or it can't be parsed. `shortest` is an example."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES:
        findings.add(1, 1, f"too large: {len(text)} characters; a configuration has at most {MAX_BYTES}")
        return None
    if bad := _FORBIDDEN.search(text):
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        findings.add(line, column, f"character that YAML does not allow: U+{ord(bad[0]):04X}; delete it")
        return None
    loader = _Loader(text)
    try:
        root = _document(loader, findings)
    except yaml.MarkedYAMLError as error:
        _syntax_error(error, text, findings)
        return None
    except (yaml.YAMLError, ValueError, OverflowError):  # PyYAML without libyaml: "\UFFFFFFFF" and the like, no place given
        findings.add(1, 1, "not YAML: a character that does not exist; look for escapes like \\U in double quotes")
        return None
    finally:
        loader.dispose()
    if root is None or (root.kind == "scalar" and root.tag == "null"):
        findings.add(1, 1, f"empty; the shortest useful file is:\n{shortest}")
        return None
    return root


def _document(loader: Any, findings: Findings) -> Node | None:
    root = None
    while (event := loader.get_event()) is not None:
        if not isinstance(event, yaml.DocumentStartEvent):
            continue
        if root is not None:
            mark: Any = event.start_mark
            findings.add(mark.line + 1, mark.column + 1, "a second document; write one file with one document, without `---`")
            break
        root = _node(loader, loader.get_event(), findings, 0)
    return root


def _node(loader: Any, event: Any, findings: Findings, depth: int) -> Node:
    line, column = event.start_mark.line + 1, event.start_mark.column + 1
    if isinstance(event, yaml.AliasEvent):
        name = shown(f"*{event.anchor}")
        findings.add(
            line, column, f"aliases are refused: {name}; write the value out, or in quotes if the asterisk is part of it"
        )
        return Node("broken", line, column)
    if event.anchor is not None:
        findings.add(line, column, f"anchors are refused: {shown(f'&{event.anchor}')}; write the value out wherever it is needed")
    tag = event.tag
    if isinstance(event, yaml.ScalarEvent):
        if tag is None or tag == "!":
            tag = loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        known = tag.removeprefix(_TAG)
        if known in _SCALAR_TAGS:
            return Node("scalar", line, column, known, event.value)
        findings.add(line, column, f"YAML tags are refused: {shown(tag)}; write the plain value")
        return Node("broken", line, column)
    if tag not in (None, "!"):
        findings.add(line, column, f"YAML tags are refused: {shown(tag)}; write the plain value")
    if depth == _MAX_DEPTH:
        # Nothing behind it can be placed sensibly: stop here, as a syntax error would.
        raise yaml.MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=event.start_mark)

    def nodes(end: type[object]) -> Iterator[Node]:
        while not isinstance(following := loader.get_event(), end):
            yield _node(loader, following, findings, depth + 1)

    if isinstance(event, yaml.SequenceStartEvent):
        return Node("sequence", line, column, items=list(nodes(yaml.SequenceEndEvent)))
    flat = list(nodes(yaml.MappingEndEvent))
    return Node("mapping", line, column, pairs=list(zip(flat[::2], flat[1::2], strict=True)))


def _syntax_error(error: yaml.MarkedYAMLError, text: str, findings: Findings) -> None:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    lines = text.splitlines()
    written = lines[line] if line < len(lines) else ""
    problem = " ".join(str(part) for part in (error.context, error.problem) if part)
    if "\t" in written[: len(written) - len(written.lstrip())] or written[column : column + 1] == "\t":
        hint = "indent with spaces, never with tabs"
    elif "alias" in problem or "anchor" in problem:
        hint = 'text that begins with * or & needs quotes: "*"'
    elif "${" in written:
        hint = 'inside {…} and […] a reference needs quotes: "${VAR}"'
    elif "mapping values" in problem:
        hint = 'check the indentation; text with a colon and a space needs quotes: "a: b"'
    elif "cannot start any token" in problem:
        hint = "text that begins with this character needs quotes"
    else:
        hint = "check brackets, quotes and indentation here and in the line above"
    findings.add(line + 1, column + 1, f"not YAML: {printable(problem)}; {hint}")


def shown(text: str) -> str:
    """The value as the file has it, short and printable."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
