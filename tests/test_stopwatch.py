"""When timed audio counts as gone: by its place in the flow, whatever is lost, cleared or overtaken."""

from __future__ import annotations

from gateway.stopwatch import EVERY, Stopwatch


def test_the_first_sample_is_the_one_that_is_timed() -> None:
    watch = Stopwatch()
    watch.hear(1.0, 320)
    watch.hear(5.0, 480)
    assert not watch.heard(1.01, 480, held=320)
    assert watch.heard(1.02, 480, held=160), "what is held came after it"
    assert (1, 0.02) == (watch.to_service.count, round(watch.to_service.sum, 6))


def test_nothing_timed_is_nothing_left() -> None:
    watch = Stopwatch()
    assert watch.heard(1.0, 0, held=0)
    watch.left(1.0, 0, 0, told=True)
    assert 0 == watch.to_service.count + watch.to_caller.count + watch.to_silence.count


def test_a_services_audio_has_left_when_only_later_audio_is_queued() -> None:
    watch = Stopwatch()
    watch.say(1.0, 160)
    watch.left(1.005, 320, 320, told=True)
    assert watch.running
    watch.left(1.01, 320, 160, told=True)
    assert not watch.running
    assert (1, 0.01) == (watch.to_caller.count, round(watch.to_caller.sum, 6))


def test_a_clear_ends_what_was_said_and_is_over_once_it_was_told() -> None:
    watch = Stopwatch()
    watch.say(1.0, 160)
    watch.cut(2.0)
    watch.left(2.5, 160, 0, told=False)  # a frame that was being sent when the clear came
    assert watch.running
    watch.left(2.75, 160, 0, told=True)
    assert not watch.running
    assert (0, 1) == (watch.to_caller.count, watch.to_silence.count)
    assert 0.75 == watch.to_silence.sum


def test_every_place_in_a_services_frame_is_timed_in_turn() -> None:
    for frames in (2, 3, 5):  # of 20 ms in one of 40, 60 and 100 ms
        assert {*range(frames)} == {at * EVERY % frames for at in range(frames)}
