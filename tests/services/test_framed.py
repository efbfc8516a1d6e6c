"""The header of framed mode: sixteen bytes that say which samples these are, read from both sides."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import MalformedFrame
from gateway.media import Track
from gateway.services.framed import HEADER_BYTES, Flags, Header, Numbers, pack, unpack

HEADERS = st.builds(Header, st.sampled_from(Track), st.integers(0, 15), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))


def test_the_layout_is_the_documented_one() -> None:
    header = Header(Track.OUTBOUND, Flags.REPLAYED | Flags.SILENCE, 0x01020304, 0x0A0B0C0D0E0F)
    expected = bytes([0x11, 1, 5, 0, 4, 3, 2, 1, 0x0F, 0x0E, 0x0D, 0x0C, 0x0B, 0x0A, 0, 0])
    assert expected + b"ab" == pack(header, b"ab")
    assert (1, 2, 4, 8) == (Flags.REPLAYED, Flags.DISCONTINUITY, Flags.SILENCE, Flags.LAST)


@settings(deadline=None)  # other tests run beside this one
@given(HEADERS, st.binary(max_size=64))
def test_what_is_packed_is_read(header: Header, samples: bytes) -> None:
    message = pack(header, samples)
    assert header == unpack(message, 1)
    assert samples == message[HEADER_BYTES:]


@settings(deadline=None)  # other tests run beside this one
@given(st.binary(max_size=40), st.sampled_from([1, 2, 4]))
def test_any_bytes_are_a_header_or_malformed(message: bytes, sample_bytes: int) -> None:
    with suppress(MalformedFrame):
        header = unpack(message, sample_bytes)
        assert 0 == (len(message) - HEADER_BYTES) % sample_bytes
        assert message == pack(header, message[HEADER_BYTES:])


@pytest.mark.parametrize(
    ("message", "fragment"),
    [
        (b"", "0 bytes"),
        (b"\x11" * 15, "shorter than the header"),
        (b"\x21" + bytes(15), "0x21"),
        (b"\x11\x02" + bytes(14), "track 2"),
        (b"\x11" + bytes(16), "1 bytes after the header"),
    ],
)
def test_a_mistake_gets_a_sentence(message: bytes, fragment: str) -> None:
    with pytest.raises(MalformedFrame, match=fragment) as caught:
        unpack(message, 2)
    assert "malformed_audio" == caught.value.reason


@settings(deadline=None)  # other tests run beside this one
@given(st.lists(st.integers(0, 30)))
def test_each_number_is_taken_once_and_only_upwards(numbers: list[int]) -> None:
    taken: list[int] = []
    counter = Numbers()
    for number in numbers:
        if counter.take(number):
            taken.append(number)
    assert sorted(set(taken)) == taken
    assert len(numbers) == len(taken) + counter.repeated
    assert counter.next == (max(numbers) + 1 if numbers else 0) == len(taken) + counter.skipped
