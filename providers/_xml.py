"""XML that is well-formed for every string. ElementTree and quoteattr write U+0000 and U+000B through; this does not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from xml.etree import ElementTree

from gateway.errors import MalformedFrame

# XML 1.0 (fifth edition), production 2: Char ::= #x9 | #xA | #xD | [#x20-#xD7FF] | [#xE000-#xFFFD] | [#x10000-#x10FFFF]
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# White space is escaped too: a parser turns a raw newline in an attribute into a space, and a raw CR anywhere into LF.
_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
)

Value = str | int | float | bool | None


def escape(text: str) -> str:
    """`text` for an attribute or an element; characters that XML 1.0 has no way to write are dropped."""
    return _NOT_XML.sub("", text).translate(_ESCAPES)


def element(name: str, attributes: Mapping[str, Value] | None = None, *children: str) -> str:
    """`<name …>children</name>`. Attributes that are None are left out; children are XML: use `escape` for text."""
    written = "".join(f' {key}="{_write(value)}"' for key, value in (attributes or {}).items() if value is not None)
    content = "".join(children)
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def response(*children: str) -> str:
    """The document that both carriers want: `<Response>` with these children."""
    return '<?xml version="1.0" encoding="UTF-8"?>' + element("Response", None, *children)


def check_elements(key: str, text: str) -> Iterable[str]:
    """Option `key` is well-formed XML elements and nothing beside them; else yields what is wrong with it."""
    try:
        root = ElementTree.fromstring(f"<Response>{text}</Response>")  # noqa: S314 - the operator's own configuration
    except (ElementTree.ParseError, ValueError) as error:
        yield f"{key}: not well-formed XML ({error}); write elements like <Hangup/>"
        return
    if (root.text or "").strip() or any((child.tail or "").strip() for child in root):
        yield f"{key}: has text outside its XML elements; write elements like <Hangup/>"


def parse(document: str, complaint: str) -> ElementTree.Element:
    """The `<Response>` of an answer, as a carrier reads it. Raises MalformedFrame(complaint) if there is none."""
    try:
        root = ElementTree.fromstring(document)  # noqa: S314 - read by doubles of a carrier: our own answer
    except (ElementTree.ParseError, ValueError) as error:
        raise MalformedFrame(complaint, f"the answer is not well-formed XML: {error}") from error
    if root.tag != "Response":
        raise MalformedFrame(complaint, f"the answer's root is <{root.tag}>, not <Response>")
    return root


def _write(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return escape(str(value))
