"""The ledger: a nonce is used once, whoever asks, and nobody else on the host can change that."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from gateway import ledger
from gateway.ledger import KEEP_SECS, Ledger

SECRET = "correct horse battery staple"
NOW = 1_800_000_000.0
EXPIRES = int(NOW) + 60


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "used"


@pytest.fixture
def book(place: Path) -> Iterator[Ledger]:
    made = Ledger(SECRET, directory=place)
    yield made
    made.close()


def entries(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_a_nonce_is_used_once(book: Ledger) -> None:
    assert [book.use(nonce, EXPIRES, NOW) for nonce in (b"a", b"b", b"a", b"b")] == [True, True, False, False]
    assert book.problem == ""


def test_looking_uses_nothing_up(book: Ledger, place: Path) -> None:
    other = Ledger(SECRET, directory=place)
    assert [False, False] == [each.used(b"a", EXPIRES) for each in (book, other)]
    assert [] == entries(place)
    assert book.use(b"a", EXPIRES, NOW)
    assert [True, True] == [each.used(b"a", EXPIRES) for each in (book, other)]
    assert not other.used(b"b", EXPIRES)
    other.close()
    assert not other.used(b"a", EXPIRES), "nobody can be asked"


def test_another_process_and_one_that_comes_later_know_it(book: Ledger, place: Path) -> None:
    book.use(b"a", EXPIRES, NOW)
    other = Ledger(SECRET, directory=place)

    assert other.use(b"a", EXPIRES, NOW + 60) is False
    assert other.use(b"b", EXPIRES, NOW + 60) is True
    other.close()
    assert book.use(b"b", EXPIRES, NOW + 60) is False


RACER = """
import sys
from pathlib import Path
from gateway.ledger import Ledger
book = Ledger(sys.argv[1], directory=Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
print("".join(str(int(book.use(b"%d" % n, int(sys.argv[3]) + n, int(sys.argv[3])))) for n in range(500)), book.problem)
"""


def test_of_several_processes_exactly_one_is_first(place: Path) -> None:
    """They also race for the directory and for the buckets in it."""
    command = [sys.executable, "-c", RACER, SECRET, str(place), str(EXPIRES)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        results = [racer.communicate(timeout=30)[0].removesuffix(" \n") for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()

    assert {len(result) for result in results} == {500}
    assert [sum(int(result[n]) for result in results) for n in range(500)] == [1] * 500


def test_what_expired_long_ago_is_used(book: Ledger) -> None:
    """A stream may start some time after its token was read, but not when nobody would remember any more."""
    assert book.use(b"a", EXPIRES, EXPIRES + KEEP_SECS) is True
    assert book.use(b"b", EXPIRES, EXPIRES + KEEP_SECS + 1) is False


def test_expired_entries_are_removed_a_few_at_a_time(book: Ledger, place: Path) -> None:
    for n in range(100):
        book.use(b"%d" % n, EXPIRES + n % 20, NOW)
    assert len(entries(place)) == 100
    later = NOW + 1_000
    counts = []
    for n in range(6):
        book.use(b"later %d" % n, int(later) + 60, later)
        counts.append(len(entries(place)))

    assert all(before - after <= 32 for before, after in pairwise(counts))
    assert counts[-1] == 6
    assert len([*place.iterdir()]) == 1


def test_two_processes_that_sweep_do_not_hinder_each_other(book: Ledger, place: Path) -> None:
    other = Ledger(SECRET, directory=place)
    for n in range(100):
        book.use(b"%d" % n, EXPIRES, NOW)
    later = NOW + 1_000
    for n in range(10):
        assert book.use(b"book %d" % n, int(later), later)
        assert other.use(b"other %d" % n, int(later), later)

    assert len(entries(place)) == 20
    assert (book.problem, other.problem) == ("", "")
    other.close()


def test_what_can_not_be_used_any_more_is_never_swept_too_early(book: Ledger, place: Path) -> None:
    book.use(b"a", EXPIRES, NOW)
    for now in range(int(NOW), EXPIRES + KEEP_SECS, 7):
        book.use(b"%d" % now, now + 60, now)

    other = Ledger(SECRET, directory=place)
    assert other.use(b"a", EXPIRES, EXPIRES + KEEP_SECS) is False
    other.close()


def test_more_than_the_capacity_is_refused(place: Path) -> None:
    book = Ledger(SECRET, directory=place, capacity=10)

    assert [book.use(b"%d" % n, EXPIRES, NOW) for n in range(12)] == [True] * 10 + [False] * 2
    assert "10 stream tokens" in book.problem
    assert book.use(b"later", int(NOW) + 1_000, NOW + 1_000) is True
    assert book.problem == ""
    book.close()


def test_names_say_nothing(book: Ledger, place: Path) -> None:
    nonce = bytes(range(16))
    book.use(nonce, EXPIRES, NOW)

    (name,) = entries(place)
    assert nonce.hex() not in name
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert (place / name).stat().st_size == 0
    other = Ledger(SECRET + "!", directory=place)
    assert other.use(nonce, EXPIRES, NOW) is True  # another secret, another name
    other.close()


def test_the_directory_is_in_memory_and_belongs_to_user_and_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SHARED_MEMORY", tmp_path)
    books = [Ledger(SECRET), Ledger(SECRET), Ledger(SECRET + "!")]

    assert books[0].directory == books[1].directory != books[2].directory
    assert books[0].directory.parent == tmp_path
    assert f"-{os.geteuid()}-" in books[0].directory.name
    assert SECRET not in str(books[0].directory)
    for book in books:
        book.close()


def test_without_shared_memory_it_is_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SHARED_MEMORY", tmp_path / "missing")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    book = Ledger(SECRET)

    assert book.directory.parent == tmp_path
    assert book.use(b"a", EXPIRES, NOW) is True
    assert book.problem == ""
    book.close()


# --- a directory that can't be trusted -----------------------------------------------------------------------------------


def alone(book: Ledger) -> None:
    """It says so, and still knows what this process has used."""
    assert [book.use(nonce, EXPIRES, NOW) for nonce in (b"a", b"a", b"b")] == [True, False, True]
    assert "known to this process only" in book.problem
    book.close()


def test_a_link_is_not_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")

    alone(Ledger(SECRET, directory=place))
    assert [*(tmp_path / "elsewhere").iterdir()] == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(place: Path, mode: int) -> None:
    place.mkdir()
    place.chmod(mode)

    alone(Ledger(SECRET, directory=place))
    assert [*place.iterdir()] == []


def test_a_directory_of_somebody_else_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    book = Ledger(SECRET, directory=place)

    assert f"belongs to user {me}" in book.problem
    alone(book)


def test_a_file_in_its_place(place: Path) -> None:
    place.write_text("")

    alone(Ledger(SECRET, directory=place))


def test_a_place_that_does_not_exist(tmp_path: Path) -> None:
    alone(Ledger(SECRET, directory=tmp_path / "no" / "such"))


def test_a_link_in_an_entrys_place_counts_as_used(book: Ledger, place: Path) -> None:
    book.use(b"a", EXPIRES, NOW)
    (name,) = entries(place)
    (place / name).unlink()
    (place / name).symlink_to("/nowhere")
    other = Ledger(SECRET, directory=place)

    assert other.use(b"a", EXPIRES, NOW) is False
    other.close()


def test_foreign_files_are_left_alone(book: Ledger, place: Path) -> None:
    (place / "note").write_text("")
    (place / "²").mkdir()
    (place / "12").write_text("")
    book.use(b"a", EXPIRES, NOW)

    assert {"note", "12"} < {*entries(place)}
    assert book.problem == ""


def test_a_removed_directory_is_made_again_and_nothing_is_forgotten_here(book: Ledger, place: Path) -> None:
    book.use(b"a", EXPIRES, NOW)
    shutil.rmtree(place)

    assert book.use(b"b", EXPIRES, NOW) is True
    assert book.use(b"a", EXPIRES, NOW) is False
    assert len(entries(place)) == 1
    assert book.problem == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_becomes_read_only_and_writable_again(book: Ledger, place: Path) -> None:
    place.chmod(0o500)
    assert book.use(b"a", EXPIRES, NOW) is True
    assert "Permission denied" in book.problem
    place.chmod(0o700)
    assert book.use(b"a", EXPIRES, NOW) is False
    assert book.use(b"b", EXPIRES, NOW) is True
    assert book.problem == ""


def test_a_full_disk_costs_the_sharing_not_the_call(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_keys: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    assert [book.use(b"a", EXPIRES, NOW), book.use(b"a", EXPIRES, NOW)] == [True, False]
    assert "No space left" in book.problem


def noted(*words: str) -> list[bytes]:
    return [word.encode().ljust(ledger.NOTE_BYTES) for word in words]


def test_notes_come_back_in_their_order_and_to_everybody(book: Ledger, place: Path) -> None:
    other = Ledger(SECRET, directory=place)
    for number, (subject, word) in enumerate([(b"a", "one"), (b"b", "two"), (b"a", "three")]):
        (book, other)[number % 2].note(subject, *noted(word), NOW + number)
    for each in (book, other):
        assert [noted("one", "three"), noted("two"), []] == [each.notes(subject, NOW + 3) for subject in (b"a", b"b", b"c")]
    assert "a" not in str(entries(place))


def test_notes_are_kept_for_ten_minutes_and_removed_after_thirty(book: Ledger, place: Path) -> None:
    book.note(b"a", *noted("one"), NOW)
    assert noted("one") == book.notes(b"a", NOW + 600)
    assert [] == book.notes(b"a", NOW + 1200)
    for minute in range(31):
        book.use(b"%d" % minute, EXPIRES + 60 * minute, NOW + 60 * minute)
    assert all(len(Path(entry).name) == 32 for entry in entries(place))


def test_what_lies_across_the_border_of_two_notes_is_nobodys(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    book.note(b"a", *noted("one"), NOW)
    (file,) = [path for path in book.directory.rglob("*") if path.is_file()]
    line = file.read_bytes()
    file.write_bytes(line[:8] + b"...." + line[:8] + b"." + line)
    assert [b"...." + line[:8] + b".", *noted("one")] == book.notes(b"a", NOW)


def test_notes_have_a_limit_and_say_so(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_SHARD_BYTES", 100)
    for _ in range(10):
        book.note(b"a", *noted("one"), NOW)
    assert 5 == len(book.notes(b"a", NOW))
    assert "too many calls" in book.problem
    with pytest.raises(ValueError, match="13 bytes, not 1"):
        book.note(b"a", b"x", NOW)


def test_notes_that_can_not_be_written_are_known_here(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_keys: object) -> int:
        raise OSError(28, "No space left on device")

    book.note(b"a", *noted("one"), NOW)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        for number in range(5000):
            book.note(b"a", *noted(f"{number}"), NOW)
        assert "No space left" in book.problem
        assert 3000 < len(book.notes(b"a", NOW)) < 3200
        book.note(b"b", *noted("later"), NOW + 1800)
        assert noted("later") == book.notes(b"b", NOW + 1800)
        assert [] == book.notes(b"a", NOW)
    assert noted("one") == book.notes(b"a", NOW)


def test_a_use_is_quick_among_many(book: Ledger) -> None:
    for n in range(3_000):
        book.use(b"%d" % n, EXPIRES + n // 50, NOW + n // 50)
    took = []
    for n in range(300):
        began = time.perf_counter()
        book.use(b"more %d" % n, EXPIRES + 300, NOW + 300)
        took.append(time.perf_counter() - began)

    assert sorted(took)[150] < 0.005
