"""What one stream of words promises, as transcripts. `>>` happens, `<<` must come out of it."""

from __future__ import annotations

import pytest

from gateway.events import (
    Account,
    After,
    Audio,
    Checkpoint,
    Dtmf,
    Fault,
    Language,
    Outcome,
    Party,
    Play,
    Say,
    Speech,
    Spoken,
    Stop,
    StopReason,
)
from gateway.playout import CONFIRM_SECS
from gateway.recital import CLIP_SECS, SPEECH_SECS_PER_CHARACTER
from tests.playbook import Stage, check

KIND = "twilio_conversation_relay"


def started() -> Stage:
    stage = Stage(KIND)
    stage.start()
    stage.events.clear()
    return stage


def test_words_go_up_and_down() -> None:
    stage = check(
        KIND,
        """
        >> start
        << start
        >> prompt Hello?
        << transcript Hello?
        >> say Good morning.
        << text Good morning.
        >> checkpoint morning
        >> speech agent on
        << speech agent
        >> spoken Good
        << spoken Good
        >> spoken morning.
        << spoken morning.
        << checkpoint morning played 0
        >> play https://h/a.mp3
        << play
        >> checkpoint clip
        >> send 42
        << digits 42
        >> checkpoint digits
        >> keys 5
        << keys 5
        >> spoken 42
        << spoken 42
        << checkpoint clip played 0
        << checkpoint digits played 0
        >> say And so on
        << text And so on
        >> checkpoint more
        >> barge_in And
        << bargein
        << checkpoint more cleared 0
        >> say Sorry
        << text Sorry
        >> checkpoint sorry
        >> drop
        << checkpoint sorry lost 0
        << stop carrier_closed
        """,
    )
    assert {Outcome.PLAYED: 3, Outcome.CLEARED: 1, Outcome.LOST: 1} == stage.session.outcomes
    assert [False, False, True] == [event.tones for event in stage.events if isinstance(event, Spoken)]
    assert Account() == stage.session.account(stage.now)


def test_a_language_is_switched_at_once() -> None:
    stage = started()
    stage.perform(Language("de-DE", "en-US"))
    assert [Language("de-DE", "en-US")] == stage.commands


def test_a_stop_hangs_up_by_a_farewell_and_waits_for_the_carrier_to_close() -> None:
    stage = check(
        KIND,
        """
        >> start
        << start
        >> say Good morning.
        << text Good morning.
        >> stop
        << stop
        << stop service_stop
        """,
    )
    assert (True, True, 1000) == (stage.session.over, stage.session.farewell, stage.session.close_code)


def test_a_stop_after_a_clip_is_over_once_the_agent_has_been_silent_for_a_second() -> None:
    """That the caller is silent says nothing."""
    check(
        KIND,
        """
        >> start
        << start
        >> play https://h/a.mp3
        << play
        >> stop played
        >> say Wait
        << fault stopping None
        >> speech caller on
        << speech caller
        >> speech caller off
        << speech caller
        >> wait 2000
        >> speech agent on
        << speech agent
        >> wait 2000
        >> speech agent off
        << speech agent
        >> wait 999
        >> wait 2
        << stop
        << stop service_stop
        """,
    )


@pytest.mark.parametrize(
    ("last", "secs"),
    [
        (Say("0123456789"), 10 * SPEECH_SECS_PER_CHARACTER),
        (Dtmf("0123456789"), 10 * SPEECH_SECS_PER_CHARACTER),
        (Play("https://h/a.mp3"), CLIP_SECS),
    ],
)
def test_a_stop_does_not_wait_for_ever_and_says_until_when(last: Say | Dtmf | Play, secs: float) -> None:
    stage = started()
    stage.perform(last)
    assert stage.session.next_due() is None
    stage.perform(Stop(handoff="{}", after=After.PLAYED))
    over_at = stage.now + secs + CONFIRM_SECS
    assert over_at == stage.session.next_due()
    assert stage.session.next_frame(over_at - 0.001) is None
    assert not stage.session.over
    farewell = stage.session.next_frame(over_at)
    assert farewell is not None
    assert [Stop(handoff="{}")] == [*stage.carrier.decode(farewell)]
    assert [Stop(StopReason.SERVICE_STOP, "{}", account=Account())] == stage.events
    assert (None, None) == (stage.session.next_due(), stage.session.next_frame(over_at))


def test_what_is_to_be_spoken_and_has_not_been_is_told_by_name() -> None:
    stage = started()
    stage.perform(Say("Good morning."))
    stage.perform(Checkpoint("a"))
    assert (0, ("a",)) == stage.session.pending(stage.now)


def test_audio_has_no_place_in_it_which_is_said_once() -> None:
    stage = started()
    stage.session.follow_playout(stage.now)
    for _ in range(2):
        stage.perform(Audio(b"\x55" * 160))
    why = "this stream can't carry out 'audio'; it accepts: checkpoint, dtmf, language, play, say, stop"
    assert [Fault("unsupported_command", why)] == stage.events
    assert {"unsupported_command": 1} == stage.session.faults


def test_what_the_carrier_objects_to_is_counted_remarked_and_told_to_who_is_there() -> None:
    stage = Stage(KIND)
    stage.session.receive('{"type": "error", "description": "too early"}', stage.now)
    assert [] == stage.events
    stage.start()
    stage.tell(Fault("carrier_error", "64107: no such voice"))
    assert [Fault("carrier_error", "64107: no such voice")] == stage.events[1:]
    assert {"carrier_error": 2} == stage.session.faults
    assert ["carrier_fault", "carrier_fault"] == stage.notes
    assert {"code": "carrier_error", "message": "64107: no such voice"} == stage.details[-1]


def test_before_the_start_nothing_is_heard_and_nothing_is_done() -> None:
    stage = Stage(KIND)
    stage.session.receive('{"type": "info", "name": "agentSpeaking", "value": "off"}', stage.now)
    for command in (Say("Hello"), Stop(after=After.PLAYED)):
        stage.perform(command)
    assert {"before_start": 1} == stage.session.bad
    assert ["not_started", "not_started"] == [event.code for event in stage.events if isinstance(event, Fault)]
    assert (None, (0, ())) == (stage.session.next_due(), stage.session.pending(stage.now))
    stage.start()
    assert Speech(Party.AGENT, active=False) not in stage.events
    assert not stage.session.over
