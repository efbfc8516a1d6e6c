"""What only Media Streams has: the shape of the hot frame, its bound, and one counter over everything."""

from __future__ import annotations

import json

import pytest

from gateway.errors import UnsupportedCommand
from gateway.events import Audio, Checkpoint, Clear, Dtmf, Outcome, Start, Stop
from gateway.media import Encoding, MediaFormat, Track
from gateway.provider import Limits
from providers.twilio_media_streams import Carrier, Provider, Settings


def test_media_frames_have_no_member_too_many_for_any_stream_id() -> None:
    """The prefix is made once, by the JSON encoder: an id with quotes can't break out of it."""
    for stream_id in ("MZ1", 'M"Z\\1', "MZ\u00fc"):
        codec, carrier = Provider(Settings(auth="none")).codec(), Carrier()
        for frame in carrier.encode(Start(stream_id, "CA1")):
            list(codec.decode(frame))
        [frame] = codec.encode(Audio(b"\xff\x7f\x00"))
        assert json.loads(frame) == {"event": "media", "streamSid": stream_id, "media": {"payload": "/38A"}}
        assert list(codec.encode(Audio(b""))) == []


def test_long_audio_is_cut_at_200_ms() -> None:
    codec, carrier = Provider(Settings(auth="none")).codec(), Carrier()
    for frame in carrier.encode(Start("MZ1", "CA1")):
        list(codec.decode(frame))
    sizes = [len(command.payload) for frame in codec.encode(Audio(bytes(3300))) for command in carrier.decode(frame)]
    assert sizes == [1600, 1600, 100]


def test_one_counter_over_everything_and_one_over_all_media() -> None:
    """Sequence numbers begin with the start; chunks count both tracks; time goes on by itself where none is given."""
    carrier = Carrier()
    connected, start = (json.loads(frame) for frame in carrier.encode(Start("MZ1", "CA1")))
    assert "sequenceNumber" not in connected
    assert "streamSid" not in connected
    events = [Audio(bytes(160), timestamp_ms=57), Audio(bytes(160)), Audio(bytes(160), Track.OUTBOUND), Dtmf("12"), Stop()]
    events.insert(3, Checkpoint("a", Outcome.PLAYED))
    frames = [start, *(json.loads(frame) for event in events for frame in carrier.encode(event))]
    assert [frame["sequenceNumber"] for frame in frames] == [str(number) for number in range(1, 9)]
    codec = Provider(Settings(auth="none")).codec()
    assert [codec.number(json.dumps(frame)) for frame in (connected, *frames)] == [None, *range(1, 9)]
    media = [frame["media"] for frame in frames if frame["event"] == "media"]
    assert [(each["chunk"], each["timestamp"], each["track"]) for each in media] == [
        ("1", "57", "inbound"),
        ("2", "77", "inbound"),
        ("3", "0", "outbound"),
    ]


def test_marks_of_a_clear_are_echoed_and_lost_ones_are_not() -> None:
    """Twilio says nothing about a clear; every mark that was cut comes back just as if it had played."""
    carrier = Carrier()
    list(carrier.encode(Start("MZ1", "CA1")))
    assert [len(list(carrier.encode(Checkpoint("a", outcome)))) for outcome in Outcome] == [1, 1, 0]
    assert list(carrier.encode(Clear())) == []
    assert carrier.habits.echoes_cleared


def test_a_call_sounds_200_ms_ahead_in_frames_of_20_to_60_ms() -> None:
    assert Provider(Settings(auth="none")).codec().limits == Limits(200, 5000, 20, 60)
    assert Provider(Settings(auth="none", lead_ms=5000)).codec().limits == Limits(5000, 5000, 20, 60)


@pytest.mark.parametrize("mode", [{}, {"mode": "listen", "then": "<Hangup/>"}])
def test_any_stream_is_ended_by_closing_its_socket(mode: dict[str, str]) -> None:
    """Also one that has not started, and one that takes nothing."""
    assert list(Provider(Settings(auth="none", **mode)).codec().encode(Stop())) == []  # type: ignore[arg-type]


def test_a_start_without_an_account_has_none() -> None:
    stream = {"callSid": "CA1", "streamSid": "MZ1", "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000}}
    [start] = Provider(Settings(auth="none")).codec().decode(json.dumps({"event": "start", "start": stream}))
    assert isinstance(start, Start)
    assert (start.account_id, start.tracks, start.parameters) == ("", (Track.INBOUND,), {})


def test_the_carrier_half_is_twilio() -> None:
    assert Carrier.habits.id_prefixes == ("CA", "MZ", "AC")
    with pytest.raises(UnsupportedCommand, match="carries mulaw/8000, not pcm_s16le/16000"):
        Carrier().encode(Start("MZ1", "CA1", media_format=MediaFormat(Encoding.PCM_S16LE, 16000)))
