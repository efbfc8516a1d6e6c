"""What one stream promises, as transcripts. `>>` happens, `<<` must come out of it."""

from __future__ import annotations

import re
import weakref

import pytest

import providers
from gateway.events import (
    Account,
    After,
    Audio,
    Checkpoint,
    Clear,
    Dtmf,
    Fault,
    Flow,
    FlowState,
    Outcome,
    Say,
    Start,
    Stop,
    StopReason,
    Unknown,
)
from gateway.media import MULAW_8K
from tests.playbook import AUDIO_KINDS, L16_16K, Stage, check

pytestmark = pytest.mark.parametrize("kind", AUDIO_KINDS)


def test_audio_goes_up_and_down(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> caller 20 @40
        << heard 20
        >> caller 20 @60
        << heard 20
        >> keys 5
        << keys 5
        >> audio 20
        << media 20
        >> drop
        << stop carrier_closed
        """,
    )


def test_audio_before_the_start_is_held_and_comes_after_it(kind: str) -> None:
    # The carrier half can't speak before its start, so an earlier stream's start is what it learns the ids from.
    stage = Stage(kind)
    stage.carrier = providers.load(kind).carrier()
    start_frames = [*stage.carrier.encode(_start(stage))]
    media = [frame for at in (40, 60) for frame in stage.carrier.encode(_caller(stage, at))]
    for frame in (*media, *start_frames):
        stage.session.receive(frame, stage.now)
    assert ["Start", "Audio", "Audio"] == [type(event).__name__ for event in stage.events]


def test_audio_before_the_start_is_bounded(kind: str) -> None:
    stage = Stage(kind)
    start_frames = [*stage.carrier.encode(_start(stage))]
    for n in range(40):
        for frame in stage.carrier.encode(_caller(stage, 20 * n)):
            stage.session.receive(frame, stage.now)
    for frame in start_frames:
        stage.session.receive(frame, stage.now)
    assert 25 == sum(type(event).__name__ == "Audio" for event in stage.events)
    assert 15 == stage.session.bad["before_start"]


def test_stop_comes_once_and_last(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> hangup
        << stop {}
        >> caller 20 @100
        >> drop
        >> audio 20
        """.format("caller_hangup" if providers.load(kind).carrier().habits.says_stop else "carrier_closed"),
    )


def test_a_hole_in_the_timestamps_is_told_and_a_duplicate_is_dropped(kind: str) -> None:
    stage = check(
        kind,
        """
        >> start
        << start
        >> caller 20 @1000
        << heard 20
        >> caller 20 @1000
        >> caller 20 @1020
        << heard 20
        >> caller 20 @1100
        << gap 60
        << heard 20
        >> caller 20 @1119
        << heard 20
        >> caller 20 @1141
        << heard 20
        """,
    )
    assert (160, 60) == (stage.session.duplicate_bytes, stage.session.gap_ms)


def test_audio_without_timestamps_is_passed_on_as_it_comes(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    for frame in [frame for _ in range(3) for frame in stage.carrier.encode(_caller(stage, 0))]:
        stage.session.receive(re.sub(r'"timestamp":"\d+",', "", str(frame)), stage.now)
    assert [None] * 3 == [event.timestamp_ms for event in stage.events if isinstance(event, Audio)]
    assert (480, 0, 0) == (stage.session.received_bytes, stage.session.duplicate_bytes, stage.session.gap_ms)


def test_a_checkpoint_is_played_when_the_carrier_says_so(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 100
        << media 100
        >> checkpoint a
        << mark 1
        >> audio 40
        << media 40
        >> checkpoint b
        << mark 2
        >> wait 100
        >> echo 1
        << checkpoint a played 100
        >> wait 40
        >> echo 2
        << checkpoint b played 40
        """,
    )


def test_a_checkpoint_on_an_empty_line_still_goes_to_the_carrier(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> checkpoint a
        << mark 1
        >> echo 1
        << checkpoint a played 0
        """,
    )


def test_the_same_name_twice_comes_back_twice(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 20
        << media 20
        >> checkpoint a
        << mark 1
        >> audio 20
        << media 20
        >> checkpoint a
        << mark 2
        >> echo 2
        << checkpoint a played 20
        << checkpoint a played 20
        >> echo 1
        >> echo 2
        """,
    )


def test_a_clear_cuts_at_once_and_tells_what_was_heard(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 1000
        << media 240
        >> checkpoint a
        >> audio 500
        >> checkpoint b
        >> wait 400
        << media 420
        >> clear
        << cut
        << checkpoint a cleared 400
        << checkpoint b cleared 0
        << clear 400 1100
        >> echo? g0.1
        >> cleared
        >> audio 60
        << media 60
        >> checkpoint c
        << mark 1
        >> wait 60
        >> echo 1
        << checkpoint c played 60
        """,
    )


def test_late_echoes_of_a_cleared_checkpoint_are_swallowed(kind: str) -> None:
    stage = check(
        kind,
        """
        >> start
        << start
        >> audio 100
        << media 100
        >> checkpoint a
        << mark 1
        >> wait 50
        >> clear
        << cut
        << checkpoint a cleared 50
        << clear 50 50
        >> echo 1
        >> checkpoint a
        << mark 2
        >> echo 1
        >> echo 2
        << checkpoint a played 0
        """,
    )
    assert stage.session.playout is not None
    assert 2 == stage.session.playout.stale_echoes


def test_what_was_heard_whole_is_played_although_its_echo_is_still_on_the_way(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 100
        << media 100
        >> checkpoint a
        << mark 1
        >> audio 100
        << media 100
        >> wait 150
        >> clear
        << cut
        << checkpoint a played 100
        << clear 50 50
        """,
    )


def test_a_clear_on_a_line_that_never_played_does_not_bother_the_carrier(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> clear
        << clear 0 0
        """,
    )


def test_a_lost_echo_is_made_up_by_the_next_one(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 20
        << media 20
        >> checkpoint a
        << mark 1
        >> audio 20
        << media 20
        >> checkpoint b
        << mark 2
        >> wait 40
        >> echo 2
        << checkpoint a played 20
        << checkpoint b played 20
        """,
    )


def test_a_mark_that_never_returns_is_taken_as_played_five_seconds_after_it_was_due(kind: str) -> None:
    stage = check(
        kind,
        """
        >> start
        << start
        >> audio 100
        << media 100
        >> checkpoint a
        << mark 1
        >> wait 5080
        >> wait 40
        << checkpoint a played 100
        """,
    )
    assert ["checkpoint_unconfirmed"] == stage.notes
    assert [{"name": "a", "waited_secs": 5.0}] == stage.details


def test_checkpoints_still_pending_at_the_end_are_lost(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 300
        << media 240
        >> checkpoint a
        >> audio 300
        >> checkpoint b
        >> wait 100
        << media 60
        << mark 1
        << media 60
        >> drop
        << checkpoint a lost 100
        << checkpoint b lost 0
        << stop carrier_closed
        """,
    )


@pytest.mark.parametrize(("reason", "heard_ms"), [(StopReason.CARRIER_CLOSED, 450), (StopReason.DRAIN, 500)])
def test_a_carrier_that_hangs_up_did_so_before_we_know(kind: str, reason: StopReason, heard_ms: int) -> None:
    """By as much as its echoes are late; what we end ourselves ends when we say so."""
    stage = check(
        kind,
        """
        >> start
        << start
        >> audio 100
        << media 100
        >> checkpoint a
        << mark 1
        >> wait 150
        >> echo 1
        << checkpoint a played 100
        >> audio 1000
        << media 240
        >> checkpoint b
        >> wait 500
        << media 480
        """,
    )
    stage.session.end(reason, stage.now)
    assert [Checkpoint("b", Outcome.LOST, heard_ms), _stop(stage)] == stage.events[-2:]
    assert {Outcome.PLAYED: 1, Outcome.LOST: 1} == stage.session.outcomes


def test_last_words_leave_at_once_and_their_end_is_confirmed(kind: str) -> None:
    """Less than a frame of them would wait for company; that they are over is known by a mark of our own."""
    check(
        kind,
        """
        >> start
        << start
        >> audio 107
        << media 100
        >> stop played
        << media 7
        << mark 1
        >> wait 150
        >> echo 1
        << stop service_stop
        """,
    )


def test_stop_after_played_ends_when_the_caller_has_heard_it_all(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 500
        << media 240
        >> checkpoint bye
        >> stop played
        >> audio 20
        << fault stopping None
        >> audio 20
        >> checkpoint more
        << fault stopping c
        >> wait 400
        << media 260
        << mark 1
        >> wait 90
        >> wait 20
        >> echo 1
        << checkpoint bye played 500
        << stop service_stop
        """,
    )


def test_a_clear_after_stop_after_played_ends_at_once(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 500
        << media 240
        >> stop played
        >> wait 100
        << media 120
        >> clear
        << cut
        << clear 100 400
        << stop service_stop
        """,
    )


def test_stop_now_ends_at_once(kind: str) -> None:
    check(
        kind,
        """
        >> start
        << start
        >> audio 500
        << media 240
        >> stop
        << stop service_stop
        """,
    )


def test_flow_is_told_at_half_and_at_a_quarter_and_too_much_is_refused_once(kind: str) -> None:
    stage = check(
        kind,
        """
        >> start
        << start
        >> audio 900
        << media 240
        >> audio 900
        << flow pause
        >> audio 1000
        << fault playout_overflow None
        >> audio 20
        >> wait 1480
        << media 1500
        << flow resume
        >> audio 20
        """,
        capacity_ms=2000,
    )
    assert stage.session.playout is not None
    assert 8 * 580 == stage.session.playout.refused


def test_what_the_wire_cannot_say_comes_back_as_a_fault_with_its_ref(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    stage.events.clear()
    stage.perform(Say("hello", ref="s1"))
    (fault,) = stage.events
    assert isinstance(fault, Fault)
    assert ("unsupported_command", "s1") == (fault.code, fault.ref)
    assert "'say'" in fault.message


def test_rubbish_is_counted_remarked_once_and_the_call_goes_on(kind: str) -> None:
    stage = check(
        kind,
        """
        >> start
        << start
        >> raw {
        >> raw [1]
        >> raw {"event": "media", "media": 7}
        >> raw {"event": "surprise"}
        << unknown surprise
        >> raw {"event": "surprise"}
        << unknown surprise
        >> caller 20 @0
        << heard 20
        """,
    )
    assert 3 == sum(stage.session.bad.values())
    assert {"surprise": 2} == stage.session.unknown
    assert 1 == stage.notes.count("unknown_frame")
    assert len(stage.session.bad) == stage.notes.count("bad_frame")


def test_too_much_rubbish_in_too_little_time_ends_the_stream(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    for _ in range(50):
        stage.session.receive("{", stage.now)
    stage.now += 11
    stage.session.receive("{", stage.now)
    assert not stage.session.over
    for _ in range(60):
        stage.session.receive("{", stage.now)
    assert stage.session.over
    assert 1008 == stage.session.close_code
    assert 1 == sum(type(event).__name__ == "Stop" for event in stage.events)


def _start(stage: Stage) -> Start:
    return Start("MZ" + "0" * 32, "CA" + "1" * 32, "AC" + "2" * 32, media_format=stage.media_format)


def _caller(stage: Stage, at: int) -> Audio:
    return Audio(b"\x40" * 160, timestamp_ms=at)


def test_commands_for_a_carrier_that_does_not_read_are_bounded(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    if Dtmf not in stage.codec.accepts:
        return
    for n in range(1003):
        stage.session.perform(Dtmf("1", ref=n), stage.now)
    message = "1000 frames wait for the carrier already"
    refused = [event for event in stage.events if isinstance(event, Fault)]
    assert [Fault("carrier_stalled", message, 1000 + n) for n in range(3)] == refused


def test_a_carrier_that_confirms_nothing_is_remarked_on_once(kind: str) -> None:
    stage = check(
        kind,
        """
        >> start
        << start
        >> audio 20
        << media 20
        >> checkpoint a
        << mark 1
        >> checkpoint b
        << mark 2
        >> wait 5200
        << checkpoint a played 20
        << checkpoint b played 0
        """,
    )
    assert ["checkpoint_unconfirmed"] == stage.notes


def test_fifty_bad_frames_in_ten_seconds_are_borne_and_one_more_is_not(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    for borne in (50, 50):
        for _ in range(borne):
            stage.session.receive("{", stage.now)
        assert not stage.session.over
        stage.now += 10.001
    for _ in range(50):
        stage.session.receive("{", stage.now)
    stage.now += 10.0
    stage.session.receive("{", stage.now)
    assert (True, 1008) == (stage.session.over, stage.session.close_code)
    assert ["bad_frame", "too_many_bad_frames"] == stage.notes
    assert {"frames": 51, "within_secs": 10.0} == stage.details[-1]
    assert StopReason.PROTOCOL_ERROR is _stop(stage).reason


def test_a_start_of_another_stream_ends_this_one(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    for frame in providers.load(kind).carrier().encode(Start("MZ" + "9" * 32, "CA" + "1" * 32, media_format=MULAW_8K)):
        stage.session.receive(frame, stage.now)
    assert (1008, StopReason.PROTOCOL_ERROR) == (stage.session.close_code, _stop(stage).reason)
    assert {"kind": "second_start"} == {"kind": stage.details[-1]["kind"]}


def test_twenty_kinds_of_frames_are_remarked_on_and_the_rest_is_counted_together(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    for n in range(25):
        stage.session.receive(f'{{"event": "new{n}"}}', stage.now)
    stage.session.receive('{"event": "new0"}', stage.now)
    assert {"new0": 2} | {f"new{n}": 1 for n in range(1, 20)} | {"other": 5} == stage.session.unknown
    assert ["unknown_frame"] * 21 == stage.notes
    assert [{"kind": "new0", "detail": ""}, {"kind": "other", "detail": ""}] == [stage.details[0], stage.details[-1]]
    assert 26 == sum(isinstance(event, Unknown) for event in stage.events)


def test_a_remark_is_short(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    stage.session.receive('{"event": "dtmf", "dtmf": {"digit": "' + "?" * 1000 + '"}}', stage.now)
    assert "bad_digit" == stage.details[0]["kind"]
    assert len(str(stage.details[0]["detail"])) <= 200


def test_a_long_remark_is_cut(kind: str) -> None:
    """Of a second start, which names both streams."""
    stage = Stage(kind)
    for stream_id in ("M" * 256, "N" * 256):
        for frame in providers.load(kind).carrier().encode(Start(stream_id, "CA" + "1" * 32, media_format=MULAW_8K)):
            stage.session.receive(frame, stage.now)
    assert "second_start: the stream is " + "M" * 172 == stage.details[0]["detail"]


def test_before_the_start_nothing_but_audio_is_kept(kind: str) -> None:
    stage = Stage(kind)
    stage.session.receive('{"event": "surprise"}', stage.now)
    stage.session.receive('{"event": "dtmf", "dtmf": {"digit": "1"}}', stage.now)
    stage.session.receive("{", stage.now)
    assert [] == stage.events
    assert {"before_start": 1, "invalid_json": 1} == stage.session.bad
    assert {"surprise": 1} == stage.session.unknown
    stage.session.follow_playout(stage.now)
    for command in (Checkpoint("a", ref=1), Clear(ref=2), Stop(ref=3), Stop(after=After.PLAYED, ref=4), *[Audio(b"\x55")] * 2):
        stage.perform(command)
    why = "the stream has not started: nothing can be carried out yet"
    faults = [Fault("not_started", why, ref) for ref in (1, 2, 3, 4, None)]
    assert faults == stage.events
    assert stage.session.next_frame(stage.now) is None
    assert (0, ()) == stage.session.pending(stage.now)
    stage.session.end(StopReason.CARRIER_CLOSED, stage.now)
    assert (True, faults) == (stage.session.over, stage.events), "nobody was told of a start"
    assert Stop(StopReason.CARRIER_CLOSED, account=Account()) == stage.session.stop


def test_frames_and_what_is_on_its_way_are_counted(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    begun = len([*providers.load(kind).carrier().encode(_start(stage))])
    stage.tell(_caller(stage, 0))
    stage.tell(_caller(stage, 20))
    stage.perform(Audio(b"\x55" * 8 * 500))
    stage.perform(Checkpoint("a"))
    stage.perform(Checkpoint("b"))
    assert (begun + 2, 4) == (stage.session.frames_in, stage.session.frames_out)
    assert (500, ("a", "b")) == stage.session.pending(stage.now)
    stage.wait(100)
    assert (400, ("a", "b")) == stage.session.pending(stage.now)
    assert Account(received=40, queued=500, played=100, lost=400) == stage.session.account(stage.now)
    assert (1000, False, 0) == (stage.session.close_code, stage.session.farewell, stage.session.waiting)
    stage.session.end(StopReason.CARRIER_CLOSED, stage.now)
    stage.tell(_caller(stage, 40))
    assert (begun + 3, 320) == (stage.session.frames_in, stage.session.received_bytes)
    assert (None, None) == (stage.session.next_due(), stage.session.next_frame(stage.now))


def test_a_stream_is_settled_while_nothing_is_to_be_sent_now_or_later(kind: str) -> None:
    stage = Stage(kind)
    session, now = stage.session, stage.now
    assert not session.settled, "it has not begun"
    stage.start()
    assert (True, None) == (session.settled, session.next_due())
    session.perform(Audio(b"\x55" * 160), now)
    assert not session.settled, "audio is queued"
    stage.pump()
    assert (True, None) == (session.settled, session.next_due())
    stage.perform(Checkpoint("a"))
    assert not session.settled, "an echo may be overdue"
    stage.tell(stage.commands[-1])  # type: ignore[arg-type]
    assert (True, None) == (session.settled, session.next_due())
    session.perform(Clear(), now)
    assert not session.settled, "a frame waits for the carrier"
    stage.pump()
    assert (True, None) == (session.settled, session.next_due())
    session.perform(Stop(after=After.PLAYED), now)
    assert not session.settled, "it is to end"
    stage.pump()
    assert session.over
    assert not session.settled


def test_faults_are_told_and_counted_until_the_stream_is_over(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    stage.session.fault("stopping", "why", "r")
    stage.perform(Say("hello"))
    assert Fault("stopping", "why", "r") == stage.events[1]
    assert {"stopping": 1, "unsupported_command": 1} == stage.session.faults
    stage.session.end(StopReason.CARRIER_CLOSED, stage.now)
    stage.session.fault("stopping", "why")
    stage.perform(Say("hello"))
    assert 2 == stage.session.faults.total()
    assert isinstance(stage.events[-1], Stop)


def test_what_would_come_behind_the_last_words_is_refused_with_the_reason(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    for command in (Audio(b"\x55" * 800), Stop(after=After.PLAYED), *[Audio(b"\x55")] * 2, Checkpoint("a", ref=1)):
        stage.perform(command)
    why = "the stream ends once the queue has played: nothing can be added"
    assert [Fault("stopping", why), Fault("stopping", why, 1)] == stage.events[1:]


def test_a_stream_that_we_only_hear_takes_nothing_and_is_followed_by_the_carrier_itself(kind: str) -> None:
    stage = Stage(kind, listens=True)
    stage.start()
    stage.session.follow_playout(stage.now)
    stage.tell(_caller(stage, 0))
    for command in (*[Audio(b"\x55" * 160)] * 2, Say("hello", ref=1)):
        stage.perform(command)
    stage.wait(100)
    why = "this stream can't carry out '{}'; it accepts: nothing"
    assert [
        _caller(stage, 0),
        Fault("unsupported_command", why.format("audio")),
        Fault("unsupported_command", why.format("say"), 1),
    ] == stage.events[1:]


def test_who_has_released_a_session_is_held_by_it_no_more(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    stage.session.end(StopReason.CARRIER_CLOSED, stage.now)
    session, whoever = stage.session, weakref.ref(stage)
    session.release()
    del stage
    assert whoever() is None
    assert session.over


def test_what_is_not_accepted_is_refused_in_a_sentence(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    stage.perform(Say("hello"))
    accepts = "audio, checkpoint, clear, dtmf, stop" if Dtmf in stage.codec.accepts else "audio, checkpoint, clear, stop"
    assert Fault("unsupported_command", f"this stream can't carry out 'say'; it accepts: {accepts}") == stage.events[-1]


def test_a_full_queue_is_told_again_once_it_has_drained(kind: str) -> None:
    stage = Stage(kind, capacity_ms=1000)
    stage.start()
    for _ in range(2):
        stage.perform(Audio(b"\x55" * 8 * 400))
        for _ in range(3):
            stage.perform(Audio(b"\x55" * 8 * 1000))
        stage.wait(3000)
    message = "the playout queue holds 1000 ms and is full: the newest audio was refused"
    once = [Fault("playout_overflow", message), Flow(FlowState.PAUSE, 1000), Flow(FlowState.RESUME, 220)]
    assert once * 2 == [event for event in stage.events if isinstance(event, Fault | Flow)]


def test_a_service_is_to_pause_when_the_queue_is_half_full_to_the_byte(kind: str) -> None:
    stage = Stage(kind, capacity_ms=1000)
    stage.start()
    for size in (3999, 1):
        assert 1 == len(stage.events)
        stage.session.perform(Audio(b"\x55" * size), stage.now)
    assert [Flow(FlowState.PAUSE, 500)] == stage.events[1:]


def test_two_minutes_may_be_queued_where_nothing_else_is_said(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    stage.session.perform(Audio(b"\x55" * 8 * 120_000), stage.now)
    assert [Flow(FlowState.PAUSE, 120_000)] == stage.events[1:]
    stage.session.perform(Audio(b"\x55"), stage.now)
    message = "the playout queue holds 120000 ms and is full: the newest audio was refused"
    assert [Fault("playout_overflow", message)] == stage.events[2:]


def test_a_clear_lets_a_service_go_on_at_once(kind: str) -> None:
    stage = Stage(kind, capacity_ms=1000)
    stage.start()
    stage.perform(Audio(b"\x55" * 8 * 900))
    stage.perform(Clear())
    assert [FlowState.PAUSE, FlowState.RESUME] == [event.state for event in stage.events if isinstance(event, Flow)]


def test_5000_checkpoints_may_be_pending(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    for n in range(5001):
        stage.session.perform(Checkpoint("a", ref=n), stage.now)
    assert Fault("too_many_checkpoints", "5000 checkpoints are pending already", 5000) == stage.events[-1]
    assert 2 == len(stage.events)


def test_half_samples_are_put_together_and_half_samples_of_a_service_are_refused(kind: str) -> None:
    if kind != "plivo_audio_streaming":
        return
    stage = Stage(kind, media_format=L16_16K)
    stage.start()
    sent = bytes(range(100))
    for begin, end in ((0, 31), (31, 32), (32, 33), (33, 60), (60, 100)):
        stage.tell(Audio(sent[begin:end]))
    heard = [event.payload for event in stage.events if isinstance(event, Audio)]
    assert sent == b"".join(heard)
    assert [30, 2, 28, 40] == [len(payload) for payload in heard]
    assert 100 == stage.session.received_bytes
    for _ in range(2):
        stage.perform(Audio(b"abc"))
    assert [Fault("malformed_audio", "3 bytes are no whole number of samples")] == stage.events[-1:]
    assert 1 == sum(isinstance(event, Fault) for event in stage.events)


def test_a_stop_hands_over_what_the_service_said(kind: str) -> None:
    stage = Stage(kind)
    stage.start()
    stage.perform(Stop(handoff='{"to": "sales"}'))
    assert Stop(StopReason.SERVICE_STOP, '{"to": "sales"}', account=Account()) == stage.events[-1]
    assert not stage.session.farewell


def _stop(stage: Stage) -> Stop:
    stop = stage.events[-1]
    assert isinstance(stop, Stop)
    return stop
