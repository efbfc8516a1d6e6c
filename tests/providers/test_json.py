"""JSON at the edge: what is told of a frame that can't be read, and how values are written as text."""

from __future__ import annotations

import pytest
from msgspec import Struct

from gateway.errors import MalformedFrame, UnsupportedCommand
from gateway.events import Unknown
from providers import _json


class Begun(Struct, tag_field="event", tag="begun"):
    id: _json.Id
    at: _json.Milliseconds


class Over(Struct, tag_field="event", tag="over"):
    pass


reader: _json.Reader[Begun | Over] = _json.Reader(Begun | Over, tag="event")


@pytest.mark.parametrize("id", ["x", "x" * 256])
@pytest.mark.parametrize("at", [0, 2**53])
def test_ids_and_times_are_taken_up_to_their_bounds(id: str, at: int) -> None:
    assert Begun(id, at) == reader.read(f'{{"event":"begun","id":"{id}","at":{at}}}')
    assert Begun(id, at) == reader.read(f'{{"event":"begun","id":"{id}","at":"{at}"}}')


@pytest.mark.parametrize(("id", "at"), [("", 0), ("x" * 257, 0), ("x", -1), ("x", 2**53 + 1)])
def test_ids_and_times_beyond_their_bounds_are_told_from_frames_of_another_kind(id: str, at: int) -> None:
    with pytest.raises(MalformedFrame):
        reader.read(f'{{"event":"begun","id":"{id}","at":{at}}}')
    assert Unknown("ended") == reader.read(f'{{"event":"ended","id":"{id}","at":{at}}}')


def test_null_is_empty_and_everything_else_is_written_as_json_does() -> None:
    assert {} == _json.texts(None)
    values = {"a": "x", "b": None, "c": 1.5, "d": True, "e": [1, {"f": None}]}
    assert {"a": "x", "b": "", "c": "1.5", "d": "true", "e": '[1,{"f":null}]'} == _json.texts(values)


def test_a_foreign_text_is_cut_for_a_human() -> None:
    assert "x" * 200 == _json.excerpt("x" * 200)
    assert "x" * 199 + "…" == _json.excerpt("x" * 201)
    assert "xx…" == _json.excerpt("xxxx", 3)
    assert "hello" == _json.text({"error": "hello"}, "error")
    assert "" == _json.text({"error": 7}, "error") == _json.text({}, "error")


def test_an_object_is_read_and_nothing_else() -> None:
    assert {"a": 1} == _json.read_object('{"a":1}')
    for text in ("", "[1]", "{", '"a"', "null", "\ud800", '{"a":' * 5000):
        assert _json.read_object(text) is None


def test_a_number_is_read_out_of_any_frame() -> None:
    assert 7 == _json.sequence_number('{"event":"x","sequenceNumber":"7"}') == _json.sequence_number('{"sequenceNumber":7}')
    for frame in ("", "{}", '{"sequenceNumber":"x"}', '{"sequenceNumber":null}', "\ud800", b"\xff", '{"a":' * 5000):
        assert _json.sequence_number(frame) is None


def test_text_that_utf_8_can_not_carry_is_refused() -> None:
    assert '{"a":"é"}' == _json.write({"a": "é"})
    with pytest.raises(UnsupportedCommand, match="the text can't be written as UTF-8: surrogates not allowed"):
        _json.write({"a": "\ud800"})


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"12", "binary_frame"),
        ('{"event":"start","start":{"callSid":"' + "x" * 257 + '"}}', "wrong_type"),
        ('{"event":"media","media":' + '{"a":' * 5000, "too_deep"),
        ('{"event":"new","x":' + '{"a":' * 5000, "too_deep"),
        ("\ud800", "invalid_unicode"),
    ],
)
def test_what_can_not_be_read_has_a_reason_and_a_short_detail(frame: str | bytes, reason: str) -> None:
    from providers.twilio_media_streams import Provider, Settings

    with pytest.raises(MalformedFrame) as caught:
        Provider(Settings(auth="none")).codec().decode(frame)
    assert reason == caught.value.reason
    assert 0 < len(str(caught.value)) < 300
