"""JSON at the edge: the one place where frames become structs, and where all that can go wrong becomes MalformedFrame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, TypeVar, get_args

from msgspec import DecodeError, Meta, MsgspecError, Struct, ValidationError, defstruct
from msgspec.json import Decoder, Encoder

from gateway.errors import MalformedFrame, UnsupportedCommand
from gateway.events import Unknown

T = TypeVar("T")

Id = Annotated[str, Meta(min_length=1, max_length=256)]
"""An identifier that a carrier gave a stream or a call."""

Milliseconds = Annotated[int, Meta(ge=0, le=2**53)]
"""A time on the wire; the bound keeps every later computation in exact floats."""

# msgspec raises more than its own error: UnicodeEncodeError for lone surrogates in a str, UnicodeDecodeError for bytes,
# RecursionError for deep nesting, also inside members that nobody asked for.
_UNREADABLE = (MsgspecError, UnicodeError, RecursionError)
_MAX_KIND = 64
_MAX_DETAIL = 200


class _Numbered(Struct, rename="camel"):
    sequence_number: int


_encode = Encoder().encode
_decode_number = Decoder(_Numbered, strict=False).decode
_decode_object = Decoder(dict[str, Any]).decode


class Reader(Generic[T]):
    """Reads frames of one union of tagged structs. Tolerant, unless `strict`: then `"8000"` is no number.

    The union is decoded first; only when that fails is the tag looked at, to tell a frame of another kind (`Unknown`) from a
    broken one.
    """

    __slots__ = ("_decode", "_decode_tag", "_kinds")

    def __init__(self, frames: Any, *, tag: str, strict: bool = False) -> None:
        self._decode = Decoder(frames, strict=strict).decode
        self._kinds = frozenset(frame.__struct_config__.tag for frame in get_args(frames))
        self._decode_tag: Callable[[str], Any] = Decoder(defstruct("Tagged", [("kind", str)], rename={"kind": tag})).decode

    def read(self, frame: str | bytes) -> T | Unknown:
        """The struct of this frame, or `Unknown`. Raises MalformedFrame and nothing else. Binary frames are malformed."""
        if isinstance(frame, bytes):
            raise MalformedFrame("binary_frame", f"{len(frame)} bytes")
        try:
            return self._decode(frame)  # type: ignore[no-any-return]
        except ValidationError as error:
            return self._other(frame, error)
        except _UNREADABLE as error:
            raise _malformed(error) from error

    def _other(self, frame: str, refused: ValidationError) -> Unknown:
        try:
            kind: str = self._decode_tag(frame).kind
        except _UNREADABLE as error:
            raise _malformed(error) from error
        if kind in self._kinds:
            raise _malformed(refused) from refused
        return Unknown(kind[:_MAX_KIND])


def _malformed(error: Exception) -> MalformedFrame:
    text = str(error)
    match error:
        case ValidationError() if "base64" in text:
            reason = "bad_base64"
        case ValidationError() if "missing required field" in text:
            reason = "missing_field"
        case ValidationError() if text.startswith("Invalid"):
            reason = "bad_value"
        case ValidationError():
            reason = "wrong_type"
        case DecodeError():
            reason = "invalid_json"
        case RecursionError():
            reason = "too_deep"
        case _:
            reason = "invalid_unicode"
    return MalformedFrame(reason, text[:_MAX_DETAIL])


def write(value: object) -> str:
    """One JSON text frame. Raises UnsupportedCommand for text that UTF-8 can't carry (lone surrogates)."""
    try:
        return _encode(value).decode()
    except UnicodeEncodeError as error:
        raise UnsupportedCommand(f"the text can't be written as UTF-8: {error.reason}") from error


def sequence_number(frame: str | bytes) -> int | None:
    """The number of a carrier's message; None where there is none that can be read."""
    try:
        return _decode_number(frame).sequence_number
    except _UNREADABLE:
        return None


def read_object(text: str) -> dict[str, Any] | None:
    """`text` as a JSON object, or None if it is no such thing."""
    try:
        return _decode_object(text)
    except _UNREADABLE:
        return None


def texts(values: Mapping[str, Any] | None) -> dict[str, str]:
    """A JSON object as text to text: null is the empty string, numbers and booleans as JSON writes them."""
    return {name: value if isinstance(value, str) else _text(value) for name, value in (values or {}).items()}


def text(values: Mapping[str, Any], key: str) -> str:
    """The beginning of the text under `key`; empty where there is none."""
    value = values.get(key)
    return excerpt(value) if isinstance(value, str) else ""


def _text(value: object) -> str:
    return "" if value is None else _encode(value).decode()


def excerpt(text: str, size: int = _MAX_DETAIL) -> str:
    """The beginning of a foreign text, for a message to a human."""
    return text if len(text) <= size else text[: size - 1] + "…"
