"""A subscriber can never slow a call: its queue is bounded, sheds its own oldest audio, and says so."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from gateway.bus import MOST_EVENTS, Bus, Subscription
from gateway.events import Audio, Dtmf, Event, Gap, GapReason, Stop
from gateway.media import MULAW_8K, Track


def chunk(n: int, ms: int = 20, track: Track = Track.INBOUND) -> Audio:
    return Audio(bytes([n % 256]) * 8 * ms, track)


async def test_events_come_in_order_and_all_at_once() -> None:
    queue = Subscription(MULAW_8K, capacity_ms=1000)
    sent: list[Event] = [chunk(1), Dtmf("5"), chunk(2), Stop()]
    for event in sent:
        queue.offer(event)
    assert sent == await queue.take()
    assert 320 == queue.taken_bytes == queue.offered_bytes


async def test_taking_waits_for_something() -> None:
    queue = Subscription(MULAW_8K, capacity_ms=1000)
    async with asyncio.TaskGroup() as tasks:
        taking = tasks.create_task(queue.take())
        await asyncio.sleep(0)
        assert not taking.done()
        queue.offer(Dtmf("1"))
    assert [Dtmf("1")] == taking.result()


async def test_only_the_wanted_track_is_queued() -> None:
    queue = Subscription(MULAW_8K, capacity_ms=1000, track=Track.OUTBOUND)
    queue.offer(chunk(1))
    queue.offer(chunk(2, track=Track.OUTBOUND))
    assert [chunk(2, track=Track.OUTBOUND)] == await queue.take()
    assert 160 == queue.offered_bytes


async def test_a_full_queue_drops_its_oldest_audio_and_tells_one_gap_in_its_place() -> None:
    queue = Subscription(MULAW_8K, capacity_ms=60)
    queue.offer(Dtmf("1"))
    for n in range(5):
        queue.offer(chunk(n))
    expected = [Dtmf("1"), Gap(40, Track.INBOUND, GapReason.OVERFLOW), chunk(2), chunk(3), chunk(4)]
    assert expected == await queue.take()
    assert (480, 320, 800) == (queue.taken_bytes, queue.dropped_bytes, queue.offered_bytes)
    queue.offer(chunk(9))
    assert [chunk(9)] == await queue.take()


async def test_the_newest_chunk_is_never_too_much() -> None:
    queue = Subscription(MULAW_8K, capacity_ms=0)
    for n in range(3):
        queue.offer(chunk(n))
        assert chunk(n) in await queue.take()
    assert 0 == queue.dropped_bytes


async def test_audio_takes_no_room_of_other_events() -> None:
    queue = Subscription(MULAW_8K, capacity_ms=60_000)
    for n in range(MOST_EVENTS):
        queue.offer(chunk(n, ms=1))
    queue.offer(Dtmf("1"))
    assert Dtmf("1") == (await queue.take())[-1]


async def test_events_are_bounded_too_but_the_stop_always_fits() -> None:
    queue = Subscription(None, capacity_ms=60)
    for _ in range(MOST_EVENTS + 10):
        queue.offer(Dtmf("1"))
    queue.offer(Stop())
    events = await queue.take()
    assert MOST_EVENTS + 1 == len(events)
    assert Stop() == events[-1]
    assert 10 == queue.dropped_events


@given(st.lists(st.one_of(st.integers(0, 90), st.none()), max_size=60), st.integers(0, 200))
def test_no_byte_is_lost_without_being_counted(sizes: list[int | None], capacity_ms: int) -> None:
    """A number offers that many milliseconds, None takes what is there."""

    async def run() -> None:
        queue = Subscription(MULAW_8K, capacity_ms=capacity_ms)
        offered = taken = told = 0
        for size in [*sizes, None]:
            if size is not None:
                offered += 8 * size
                queue.offer(chunk(size, size))
                assert queue.audio_bytes <= 8 * max(capacity_ms, size)
            else:
                queue.offer(Dtmf("0"))
                for event in await queue.take():
                    taken += len(event.payload) if isinstance(event, Audio) else 0
                    told += 8 * event.lost_ms if isinstance(event, Gap) else 0
        assert offered == queue.offered_bytes == taken + told
        assert told == queue.dropped_bytes

    asyncio.run(run())


def test_watchers_see_every_stream_but_no_audio_until_they_leave() -> None:
    seen: list[tuple[str, Event]] = []
    bus = Bus()
    one, two = bus.channel("one"), bus.channel("two")
    leave = bus.watch(lambda session, event: seen.append((session, event)))
    one.publish(chunk(1))
    one.publish(Dtmf("1"))
    two.publish(Stop())
    leave()
    one.publish(Dtmf("2"))
    assert [("one", Dtmf("1")), ("two", Stop())] == seen
