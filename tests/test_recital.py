"""Checkpoints of a text-only stream: resolved from the words that the carrier reports as spoken, in pieces of its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.events import After, Checkpoint, Outcome, Say, Stop, StopReason
from gateway.recital import Recital
from tests.playbook import Phone

PLAYED, CLEARED, LOST = Outcome.PLAYED, Outcome.CLEARED, Outcome.LOST


def played(*names: str) -> list[Checkpoint]:
    return [Checkpoint(name, PLAYED) for name in names]


def test_a_checkpoint_is_played_with_the_last_word_before_it() -> None:
    recital = Recital()
    recital.say("Good morning. How can I help?", 0.0)
    assert [] == recital.checkpoint("a")
    assert [] == recital.spoken("Good morning.")
    assert [] == recital.spoken(" How can I")
    assert played("a") == recital.spoken(" help?")


def test_white_space_does_not_count() -> None:
    recital = Recital()
    recital.say(" Good\nmorning. ", 0.0)
    recital.say("Bye.", 0.0)
    recital.checkpoint("a")
    assert [] == recital.spoken("  ")
    assert played("a") == recital.spoken("Good   morning.Bye. ")


def test_a_checkpoint_behind_nothing_is_played_at_once() -> None:
    recital = Recital()
    assert played("a") == recital.checkpoint("a")
    recital.say("Yes.", 0.0)
    recital.spoken("Yes.")
    assert played("a") == recital.checkpoint("a")


def test_digits_are_confirmed_like_words() -> None:
    recital = Recital()
    recital.say("One moment.", 0.0)
    recital.say("42#", 0.0)
    recital.checkpoint("a")
    assert [] == recital.spoken("One moment.")
    assert played("a") == recital.spoken("42#")


def test_digits_that_were_sent_are_told_from_words() -> None:
    recital = Recital()
    recital.say("Dial 42. ", 0.0)
    recital.say("42", 0.0, tones=True)
    recital.say("42", 0.0)
    found = []
    for piece in ("Dial ", "42. ", "42", "42", "42"):
        found.append(recital.is_tones(piece))
        recital.spoken(piece)
    assert [False, False, True, False, False] == found
    recital.say("7", 0.0, tones=True)
    recital.interrupted()
    recital.say("7 is right", 0.0)
    assert not recital.is_tones("7 is right")
    recital.spoken("7 is right")
    assert [] == [*recital._tones]


def test_digits_are_known_behind_preempted_words_and_if_they_were_on_their_way_at_a_barge_in() -> None:
    recital = Recital()
    recital.say("Please hold the line", 0.0)
    recital.say("42#1", 0.0, tones=True)
    assert not recital.is_tones("  ")
    assert recital.is_tones("42#1")
    recital.spoken("42#1")
    recital.say("7890", 0.0, tones=True)
    assert not recital.is_tones("  ")
    recital.interrupted()
    recital.say("Yes?", 0.0)
    for digit in "7890":
        assert recital.is_tones(digit)
        assert [] == recital.spoken(digit)
    assert not recital.is_tones("Yes?")


@pytest.mark.parametrize("greeting", ["Hello, this is Anna.", "Hi", "o", "morning"])
def test_a_greeting_that_nobody_said_proves_nothing(greeting: str) -> None:
    recital = Recital()
    recital.say("Good morning. Hello, this is Anna.", 0.0)
    recital.checkpoint("a")
    assert [] == recital.spoken(greeting)
    assert played("a") == recital.spoken("Good morning. Hello, this is Anna.")


def test_a_checkpoint_in_preempted_text_is_cleared_and_one_behind_what_preempted_it_is_played() -> None:
    recital = Recital()
    recital.say("Please hold the line", 0.0)
    recital.checkpoint("hold")
    recital.say("Here I am.", 1.0)
    recital.checkpoint("here")
    assert [] == recital.spoken("Please hold")
    assert [Checkpoint("hold", CLEARED), *played("here")] == recital.spoken("Here I am.")


def test_a_message_that_was_preempted_before_its_first_word_may_be_skipped_within_one_piece() -> None:
    recital = Recital()
    recital.say("Yes, ", 0.0)
    recital.checkpoint("yes")
    recital.say("please hold ", 0.0)
    recital.checkpoint("hold")
    recital.say("please go on.", 0.0)
    recital.checkpoint("go")
    assert [*played("yes"), Checkpoint("hold", CLEARED), *played("go")] == recital.spoken("Yes, please go on.")


def test_a_short_message_whole_is_recognised_behind_a_preempted_one() -> None:
    recital = Recital()
    recital.say("Please hold the line", 0.0)
    recital.say("OK", 0.0)
    recital.checkpoint("ok")
    assert [] == recital.spoken("Please")
    assert played("ok") == recital.spoken("OK")


def test_what_is_played_without_a_report_is_over_once_later_words_are_spoken() -> None:
    recital = Recital()
    recital.play(0.0)
    assert [] == recital.checkpoint("clip")
    recital.say("Bye.", 0.0)
    recital.checkpoint("bye")
    assert played("clip", "bye") == recital.spoken("Bye.")


def test_words_behind_a_clip_may_leap_over_those_that_were_preempted() -> None:
    recital = Recital()
    recital.play(0.0)
    recital.checkpoint("clip")
    recital.say("Please hold the line.", 0.0)
    recital.checkpoint("hold")
    recital.say("Here I am.", 0.0)
    recital.checkpoint("here")
    assert [] == recital.spoken(" "), "nothing was said, and the clip need not be over"
    assert [*played("clip"), Checkpoint("hold", CLEARED), *played("here")] == recital.spoken("Here I am.")


@pytest.mark.parametrize(("piece", "proof"), [("Wel", False), ("Welc", True)])
def test_four_letters_prove_that_a_message_was_preempted(piece: str, proof: bool) -> None:
    recital = Recital()
    recital.say("Please hold the line.", 0.0)
    recital.checkpoint("hold")
    recital.say("Welcome to the show.", 0.0)
    assert ([Checkpoint("hold", CLEARED)] if proof else []) == recital.spoken(piece)


@pytest.mark.parametrize(("holes", "known"), [(1, True), (3, True), (4, False)])
def test_a_piece_leaps_over_three_preempted_messages_at_most(holes: int, known: bool) -> None:
    recital = Recital()
    for n in range(holes + 1):
        recital.say(f"This is part {n}.", 0.0)
        if n < holes:
            recital.say("Please hold the line.", 0.0)
            recital.checkpoint("hold")
    recital.checkpoint("end")
    piece = " ".join(f"This is part {n}." for n in range(holes + 1))
    assert ([Checkpoint("hold", CLEARED)] * holes + played("end") if known else []) == recital.spoken(piece)


def test_after_a_barge_in_a_piece_may_leap_from_a_later_message_over_the_next() -> None:
    recital = Recital()
    recital.say("one two", 0.0)
    recital.say("three", 0.0)
    recital.spoken("one")
    recital.interrupted()
    for name, text in (("a", "four five six"), ("b", "seven eight"), ("c", "nine ten more")):
        recital.say(text, 1.0)
        recital.checkpoint(name)
    assert [*played("a"), Checkpoint("b", CLEARED), *played("c")] == recital.spoken("four five six nine ten more")


def test_where_the_same_was_said_twice_the_first_counts_as_preempted() -> None:
    recital = Recital()
    for n, text in enumerate(("Hello?", "Yes?", "Hello?", "Hello?", "Yes?", "Yes?", "Hello?")):
        recital.say(text, 0.0)
        recital.checkpoint(str(n))
    outcomes = [each.outcome for each in recital.spoken("Hello? Yes? Hello? Yes? Hello?")]
    assert [PLAYED, PLAYED, CLEARED, PLAYED, CLEARED, PLAYED, PLAYED] == outcomes


def test_what_begins_with_words_that_nobody_said_proves_nothing_though_it_ends_with_others() -> None:
    recital = Recital()
    for text in ("One.", "Two.", "Three."):
        recital.say(text, 0.0)
        recital.checkpoint(text)
    assert [] == recital.spoken("Hey! Three.")
    assert played("One.") == recital.spoken("One.")


def test_words_told_twice_are_not_those_that_were_said_once() -> None:
    recital = Recital()
    recital.say("One moment.", 0.0)
    recital.spoken("One")
    recital.say("Two three.", 0.0)
    recital.interrupted()
    recital.say("Four five.", 0.0)
    recital.checkpoint("a")
    assert [] == recital.spoken("Four five. Four five.")
    assert played("a") == recital.spoken("Four five.")


def test_a_barge_in_clears_what_was_not_spoken() -> None:
    recital = Recital()
    recital.say("One. Two.", 0.0)
    recital.checkpoint("a")
    recital.say("Three.", 0.0)
    recital.checkpoint("b")
    assert [] == recital.spoken("One.")
    assert [Checkpoint("a", CLEARED), Checkpoint("b", CLEARED)] == recital.interrupted()
    assert [] == recital.spoken("Two.")
    recital.say("Four.", 1.0)
    recital.checkpoint("c")
    assert played("c") == recital.spoken("Four.")


def test_words_that_were_on_their_way_at_a_barge_in_do_not_hide_what_was_said_since() -> None:
    recital = Recital()
    recital.say("As I said: ", 0.0)
    recital.say("one. ", 0.0)  # reaches the carrier after the caller spoke, and so is heard
    recital.interrupted()
    assert recital.idle(0.0)
    recital.say("As I said: two.", 0.0)
    recital.checkpoint("a")
    assert [] == recital.spoken("one. As I said:")
    assert played("a") == recital.spoken(" two.")


def test_what_is_repeated_after_a_barge_in_is_not_taken_for_what_was_cut() -> None:
    recital = Recital()
    recital.say("Good morning.", 0.0)
    recital.interrupted()
    recital.say("Good morning.", 0.0)
    recital.checkpoint("a")
    assert played("a") == recital.spoken("Good morning.")


def test_the_end_of_the_stream_loses_what_is_pending() -> None:
    recital = Recital()
    recital.say("One.", 0.0)
    recital.checkpoint("a")
    recital.checkpoint("b")
    assert [Checkpoint("a", LOST), Checkpoint("b", LOST)] == recital.finish()
    assert [] == recital.finish()


def test_ending_waits_for_the_words_but_not_for_ever() -> None:
    recital = Recital()
    assert recital.idle(0.0)
    recital.say("0123456789", 10.0)
    assert recital.next_due() is None
    recital.end()
    assert 16.0 == recital.next_due(), "a tenth of a second for each letter, and five for the report"
    assert not recital.idle(15.999)
    assert recital.idle(16.0)
    recital.spoken("0123456789")
    assert recital.idle(10.5)


def test_ending_waits_ten_seconds_for_a_clip_or_until_nothing_has_sounded_for_one() -> None:
    recital = Recital()
    recital.play(100.0)
    recital.checkpoint("clip")
    recital.end()
    assert 115.0 == recital.next_due(), "five for the report that may come"
    recital.speech(True, 100.5)
    assert 115.0 == recital.next_due()
    recital.speech(False, 103.0)
    assert (104.0, False, True) == (recital.next_due(), recital.idle(103.999), recital.idle(104.0))
    recital.speech(True, 103.5)
    assert (115.0, False) == (recital.next_due(), recital.idle(104.0))
    recital.speech(False, 114.5)
    assert 115.0 == recital.next_due(), "not longer than for a clip that nobody tells of"
    assert ("clip",) == recital.pending
    recital = Recital()
    recital.play(100.0)
    recital.play(101.0)
    recital.say("Bye.", 102.0)
    recital.end()
    recital.speech(False, 103.0)
    assert 125.4 == recital.next_due(), "words are still to come"


def test_a_recital_keeps_nothing_of_what_was_spoken() -> None:
    recital = Recital()
    recital.say("0", 0.0)
    for n in range(1000):
        recital.say(f"Message {n}.", 0.0, tones=n % 2 == 1)
        recital.checkpoint("a")
        assert recital.spoken(f"Message {n - 1}." if n else "0") == played(*"a" * (n > 0))
        kept = {name: len(value) for name, value in vars(recital).items() if hasattr(value, "__len__")}
        assert max(kept.values()) <= len("Message 999."), kept
        assert ("a",) == recital.pending


def test_stop_after_played_ends_once_the_caller_has_heard_the_last_word() -> None:
    phone = Phone("twilio_conversation_relay")
    phone.start()
    phone.perform(Say("Goodbye, and thank you for calling."))
    phone.perform(Checkpoint("bye"))
    phone.perform(Stop(after=After.PLAYED))
    assert not phone.session.over
    phone.wait(10_000)
    assert "Goodbye, and thank you for calling." == phone.voice.spoken
    assert played("bye") == [event for event in phone.events if isinstance(event, Checkpoint)]
    assert [StopReason.SERVICE_STOP] == [event.reason for event in phone.events if isinstance(event, Stop)]


@given(st.data())
def test_a_checkpoint_is_played_exactly_with_its_last_word_however_the_carrier_cuts(data: st.DataObject) -> None:
    words = st.text("ab .\n", min_size=0, max_size=12)
    messages = data.draw(st.lists(words, min_size=1, max_size=6))
    recital = Recital()
    ends: list[tuple[str, int]] = []
    text = ""
    for n, message in enumerate(messages):
        recital.say(message, 0.0)
        text += message
        before = len("".join(text.split()))
        if result := recital.checkpoint(str(n)):
            assert before == 0
            assert played(str(n)) == result
        else:
            ends.append((str(n), before))
    spoken = 0
    while text:
        size = data.draw(st.integers(1, len(text)))
        piece, text = text[:size], text[size:]
        spoken += len("".join(piece.split()))
        due = [name for name, before in ends if before <= spoken]
        ends = [(name, before) for name, before in ends if before > spoken]
        assert played(*due) == recital.spoken(piece)
    assert [] == ends
    assert recital.idle(0.0)
