"""What is left behind is found by the next process, to the byte, and by nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import journal
from gateway.audio import Converter
from gateway.events import Audio, Dtmf, Gap
from gateway.journal import MOST_ANNOUNCED, MOST_ATTEMPTS, Entry, Journal, Legacy, Standing, State, Word
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.services.intake import Intake
from gateway.services.native import NativeCarrier
from gateway.services.ring import Frame
from gateway.services.ring import Word as RingWord

SECRET = "0123456789abcdef"
CALL = ("twilio", "CA1")
PCM_16K = MediaFormat(Encoding.PCM_S16LE, 16000)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def begun(journal: Journal, capacity: int = 1000, session: str = "s1") -> Entry:
    entry, legacy = journal.begin(*CALL, Standing(session, "route-0"), capacity=capacity)
    assert entry is not None
    assert legacy is None
    return entry


def left(journal: Journal, capacity: int = 1000) -> Legacy:
    """What the next stream finds."""
    _, legacy = journal.begin(*CALL, Standing("other", "route-0"), capacity=capacity)
    assert legacy is not None
    return legacy


@given(st.lists(st.binary(min_size=1, max_size=5000), max_size=12), st.integers(1, 20_000))
def test_the_latest_audio_is_found_again_to_the_byte(chunks: list[bytes], capacity: int) -> None:
    journal = Journal(SECRET)
    entry = begun(journal, capacity)
    for chunk in chunks:
        entry.hear(chunk)
    heard = b"".join(chunks)
    for _ in range(2):  # and is handed on whole
        found = left(Journal(SECRET), capacity)
        assert (len(heard), heard[-capacity:]) == (found.heard, found.audio)
    end(journal)


def end(journal: Journal) -> None:
    entry, _ = journal.begin(*CALL, Standing("", ""), capacity=0)
    assert entry is not None
    entry.end(State.ENDED)


def test_numbers_words_and_checkpoints_are_found_again(place: Path) -> None:
    entry = begun(Journal(SECRET, directory=place))
    entry.serve("agent", "shape")
    entry.hear(bytes(160))
    entry.took(7)
    entry.acked(3)
    entry.skipped(320)
    for number in range(3):
        entry.say(Word(number, f'{{"digits":"{number}"}}', 3 + number))
    entry.pending(("greeting", "menu"))
    entry.hear(bytes(160))  # the next frame writes what was put off
    found = left(Journal(SECRET, directory=place))
    assert (320, 3, 7, 320) == (found.heard, found.acked, found.next_out, found.skipped)
    assert (
        Standing(
            "s1",
            "route-0",
            "agent",
            "shape",
            next_number=3,
            checkpoints=("greeting", "menu"),
            words=(Word(1, '{"digits":"1"}', 4), Word(2, '{"digits":"2"}', 5)),
        )
        == found.standing
    ), "the first word stood before a frame that has been acknowledged"


def test_more_words_than_there_is_room_for_cost_the_oldest(place: Path) -> None:
    entry = begun(Journal(SECRET, directory=place), capacity=0)
    for number in range(100):
        entry.say(Word(number, "x" * 200, number))
    words = left(Journal(SECRET, directory=place)).standing.words
    assert 5 < len(words) < 20
    assert [*range(100)][-len(words) :] == [word.number for word in words]


def test_a_process_that_is_killed_leaves_every_byte_that_it_wrote(place: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from gateway.journal import Journal, Standing
entry, _ = Journal({SECRET!r}, directory=Path({str(place)!r})).begin("twilio", "CA1", Standing("s1", "r"), capacity=1000)
for at in range(0, 2000, 8):
    entry.hear(at.to_bytes(8, "big"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert -9 == subprocess.run([sys.executable, "-c", script], check=False, timeout=30).returncode
    found = left(Journal(SECRET, directory=place))
    assert b"".join(at.to_bytes(8, "big") for at in range(1000, 2000, 8)) == found.audio


def test_it_says_nothing_to_whoever_reads_it(place: Path) -> None:
    entry = begun(Journal(SECRET, directory=place))
    entry.serve("canary-service", "canary-shape")
    entry.pending(("canary-checkpoint",))
    entry.say(Word(0, "canary-word", 0))
    for _ in range(20):
        entry.hear(b"canary-audio" + bytes(148))
    (path,) = place.iterdir()
    raw = path.read_bytes()
    assert b"canary" not in raw
    assert "CA1" not in path.name
    assert bytes(8) not in raw[-1000:], "silence neither"
    assert 0o600 == path.stat().st_mode & 0o777
    assert 0o700 == place.stat().st_mode & 0o777
    assert Journal("another secret 0", directory=place).ask(*CALL) is None


def test_the_same_audio_is_never_sealed_the_same_way_twice(place: Path) -> None:
    images = []
    for _ in range(2):
        entry = begun(Journal(SECRET, directory=place), capacity=8000)
        for _ in range(50):
            entry.hear(bytes(160))
        (path,) = place.iterdir()
        images.append(path.read_bytes()[-8000:])
        entry.end(State.ENDED)
    first, second = images
    assert (
        len({*(first[at : at + 16] for at in range(0, 8000, 16)), *(second[at : at + 16] for at in range(0, 8000, 16))}) == 1000
    )


def test_half_written_or_foreign_entries_are_no_legacy(place: Path) -> None:
    random = Random(7)
    for _ in range(300):
        entry = begun(Journal(SECRET, directory=place), capacity=100)
        entry.hear(b"0123456789")
        entry.close()
        (path,) = place.iterdir()
        raw = bytearray(path.read_bytes())
        for _ in range(random.randint(1, 50)):
            raw[random.randrange(700)] = random.randrange(256)
        path.write_bytes(raw[: random.choice((0, 10, 600, len(raw)))])
        again = Journal(SECRET, directory=place)
        again.ask(*CALL)
        again.attempt(*CALL)
        made, _ = again.begin(*CALL, Standing("s2", "r"), capacity=100)
        assert made is not None
        made.end(State.ENDED)
        path.unlink()


def test_a_call_is_taken_up_so_often_and_not_once_it_has_ended(place: Path) -> None:
    first, second = Journal(SECRET, directory=place), Journal(SECRET, directory=place)
    assert second.attempt(*CALL) is None
    entry = begun(first)
    attempts = [second.attempt(*CALL) for _ in range(MOST_ATTEMPTS // 2)]
    entry, legacy = second.begin(*CALL, Standing("s2", "route-0"), capacity=0)  # type: ignore[assignment]
    assert legacy is not None
    attempts += [first.attempt(*CALL) for _ in range(MOST_ATTEMPTS)]
    assert ["route-0"] * MOST_ATTEMPTS == [each for each in attempts if each], "counted over all its streams"
    entry.end(State.LOST)
    assert State.LOST is first.ask(*CALL)
    assert first.attempt(*CALL) is None
    assert "s1" == begun(first).standing.session, "a new call of that id begins anew"
    assert "route-0" == first.attempt(*CALL)


def test_a_call_whose_stream_has_never_come_may_be_asked_for_a_few_times(place: Path) -> None:
    first, second = Journal(SECRET, directory=place), Journal(SECRET, directory=place)
    first.announce(*CALL, "route-7")
    assert State.ANNOUNCED is second.ask(*CALL)
    assert ["route-7"] * MOST_ANNOUNCED + [None] == [second.attempt(*CALL) for _ in range(MOST_ANNOUNCED + 1)]
    entry = begun(second)  # and once it has come it is as good as any
    assert "route-0" == first.attempt(*CALL)
    first.announce(*CALL, "route-7")
    assert State.LIVE is second.ask(*CALL), "one more webhook of a call that goes on"
    entry.end(State.ENDED)
    first.announce(*CALL, "route-7")
    second.conclude(*CALL)
    assert first.attempt(*CALL) is None


def test_who_was_superseded_knows_and_spoils_nothing(place: Path) -> None:
    older = begun(Journal(SECRET, directory=place))
    older.hear(b"first")
    assert not older.superseded
    newer, legacy = Journal(SECRET, directory=place).begin(*CALL, Standing("s2", "r"), capacity=1000)
    assert newer is not None
    assert legacy is not None
    assert older.superseded
    older.hear(b"too late")
    older.end(State.ENDED)
    newer.hear(b" second")
    assert b"first second" == left(Journal(SECRET, directory=place)).audio


def test_what_the_carrier_has_told_another_process_is_known_to_the_stream(place: Path) -> None:
    entry, other = begun(Journal(SECRET, directory=place)), Journal(SECRET, directory=place)
    assert not entry.concluded
    other.conclude(*CALL)
    other.conclude("twilio", "unknown")
    assert entry.concluded
    assert other.attempt(*CALL) is None


def test_what_nobody_needs_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Journal(SECRET, directory=place)
    running, _ = store.begin("twilio", "running", Standing("s", "r"), capacity=10)
    ended, _ = store.begin("twilio", "ended", Standing("s", "r"), capacity=10)
    assert ended is not None
    ended.end(State.ENDED)
    for torn in ("torn.call", "torn.new"):
        (place / torn).write_bytes(b"x")
        os.utime(place / torn, (0, 0))
    (place / "just.new").write_bytes(b"")
    later = journal.monotonic() + 1000
    monkeypatch.setattr(journal, "monotonic", lambda: later)
    fresh = Journal(SECRET, directory=place)
    fresh.sweep(everything=True)
    assert ["running"] == [name for name in ("running", "ended") if fresh.ask("twilio", name)], "its process lives"
    monkeypatch.setattr(journal, "_lives", lambda _: False)
    Journal(SECRET, directory=place).sweep(everything=True)
    assert ["just.new"] == [path.name for path in place.iterdir()], "somebody is about to write it"
    assert running is not None


def test_no_room_is_told_and_carries_calls_all_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = Journal(SECRET, directory=place)
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert (None, None) == store.begin(*CALL, Standing("s", "r"), capacity=10)
    assert 1 == store.unwritten
    assert "No space left" in store.problem
    assert [] == [*place.iterdir()]


# --- a service's frames, made again ---


@pytest.fixture(params=["pcm_16k", "mulaw_8k", "pcm_24k", "pcm_8k"])
def target(request: pytest.FixtureRequest) -> MediaFormat:
    return {
        "pcm_16k": PCM_16K,
        "mulaw_8k": MULAW_8K,
        "pcm_24k": MediaFormat(Encoding.PCM_S16LE, 24000),
        "pcm_8k": MediaFormat(Encoding.PCM_S16LE, 8000),
    }[request.param]


def intake(target: MediaFormat, frame_ms: int) -> Intake:
    protocol = NativeCarrier(
        session="s", provider="p", kind="k", role="speaker", track=Track.INBOUND, media_format=target, frame_ms=frame_ms
    )
    return Intake(MULAW_8K, target, frame_ms=frame_ms, capacity_ms=60_000, track=Track.INBOUND, protocol=protocol)


def told(intake: Intake) -> Iterator[tuple[object, ...]]:
    while (entry := intake.ring.take(keep=True)) is not None:
        match entry:
            case Frame():
                yield entry.seq, entry.pos, entry.payload
            case RingWord():
                yield "word", entry.number, entry.message


@pytest.mark.parametrize("frame_ms", [10, 20, 60])
@pytest.mark.parametrize(("heard", "acked", "capacity_ms"), [(3, -1, 1000), (50, 11, 1000), (200, 150, 10_000), (200, 20, 500)])
def test_frames_made_again_are_the_same_bit_by_bit(
    place: Path, target: MediaFormat, frame_ms: int, heard: int, acked: int, capacity_ms: int
) -> None:
    """One intake goes on without a break; another is made of what the first's journal holds, and hears the same from then on."""
    random = Random(3)
    noise = [random.randbytes(160) for _ in range(heard + 40)]
    events: list[Audio | Dtmf | Gap] = [Audio(each) for each in noise]
    events.insert(heard * 3 // 4, Dtmf("5"))
    events.insert(heard // 2, Gap(60, Track.INBOUND))
    cut = heard + 2
    whole = intake(target, frame_ms)
    whole.journal = begun(Journal(SECRET, directory=place), MULAW_8K.bytes_for(capacity_ms))
    for event in events[:cut]:
        whole.take(event, 0.0)
    acked = max(-1, acked * 20 // frame_ms)
    whole.journal.acked(acked)
    whole.journal.hear(b"")  # what was put off is written
    legacy = left(Journal(SECRET, directory=place), MULAW_8K.bytes_for(capacity_ms))
    whole.journal = None
    again = intake(target, frame_ms)
    again.inherit(legacy, 0.0)
    for event in events[cut:]:
        whole.take(event, 0.0)
        again.take(event, 0.0)
    expected, found = [*told(whole)], [*told(again)]
    oldest = next(each[0] for each in found if each[0] != "word")
    assert isinstance(oldest, int)
    assert acked + 1 == oldest or capacity_ms == 500
    at = expected.index(next(each for each in expected if each[0] == oldest))
    words = [each for each in expected if each[0] == "word"]
    assert [each for each in found if each[0] != "word"] == [each for each in expected[at:] if each[0] != "word"]
    assert len(found) > 10
    assert {each for each in found if each[0] == "word"} <= {*words}
    assert again.ring.next_number == whole.ring.next_number


def test_a_converter_remembers_less_than_is_heard_again(target: MediaFormat) -> None:
    """`BLOCK_MS` is longer than a filter: after it, two converters with different pasts say the same."""
    random = Random(5)
    quiet, loud = Converter(MULAW_8K, target), Converter(MULAW_8K, target)
    loud.convert(random.randbytes(1600))
    warm, after = random.randbytes(160), random.randbytes(1600)
    quiet.convert(warm), loud.convert(warm)
    assert quiet.convert(after) == loud.convert(after)
