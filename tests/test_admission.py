"""Admission: no more calls than allowed, no slot lost, nothing kept of whoever was refused."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.admission import Admission, Refusal, client_address, networks

A, B = "192.0.2.1", "192.0.2.2"


def door(max_calls: int = 2, rate: float = 1000, pending: int = 2) -> Admission:
    return Admission(max_calls, rate, pending)


def begin(admission: Admission, call_id: str, now: float = 0, address: str = A) -> Refusal | None:
    assert admission.connect(address, now) is None
    return admission.started(call_id, address, now)


# --- slots ---------------------------------------------------------------------------------------------------------------


def test_slots_are_taken_at_the_webhook_and_free_when_the_call_is_over() -> None:
    admission = door()

    assert [admission.reserve(call, 0) for call in "abc"] == [None, None, Refusal.MAX_CALLS]
    assert begin(admission, "a") is None
    assert admission.reserve("c", 1) is Refusal.MAX_CALLS
    admission.ended("a", 2)
    assert admission.reserve("c", 2) is None
    assert admission.refused == Counter({Refusal.MAX_CALLS: 2})


def test_a_reservation_without_a_stream_is_free_after_15_seconds() -> None:
    admission = door(max_calls=1)
    admission.reserve("a", 0)

    assert admission.reserve("b", 14.9) is Refusal.MAX_CALLS
    assert admission.reserve("b", 15) is None
    assert begin(admission, "a", 16) is Refusal.MAX_CALLS  # too late: the slot is b's
    assert begin(admission, "b", 29) is None
    assert admission.reserve("c", 100) is Refusal.MAX_CALLS  # a started call does not expire


def test_a_carrier_that_asks_again_renews_its_slot() -> None:
    admission = door(max_calls=1)

    assert [admission.reserve("a", now) for now in (0, 10, 20)] == [None, None, None]
    assert admission.calls == 1
    assert admission.reserve("b", 30) is Refusal.MAX_CALLS
    assert admission.reserve("b", 35) is None


def test_asking_again_does_not_count_against_the_rate() -> None:
    admission = door(max_calls=10, rate=1)

    assert [admission.reserve("a", 0) for _ in range(50)] == [None] * 50
    assert admission.reserve("b", 0) is Refusal.RATE


def test_a_call_with_two_streams_has_one_slot() -> None:
    admission = door(max_calls=1)

    assert (begin(admission, "a"), begin(admission, "a")) == (None, None)
    admission.ended("a", 1)
    assert (admission.calls, admission.active) == (1, 1)
    admission.ended("a", 2)
    assert (admission.calls, admission.active) == (0, 0)


def test_a_call_that_asks_for_its_next_stream_keeps_its_slot() -> None:
    """The carrier may ask before we have seen the end of the stream before."""
    admission = door(max_calls=1)
    begin(admission, "a")
    admission.reserve("a", 1)
    admission.ended("a", 2)

    assert admission.reserve("b", 3) is Refusal.MAX_CALLS
    assert begin(admission, "a", 4) is None
    admission.ended("a", 5)
    assert admission.calls == 0


def test_a_call_that_another_process_answered_gets_a_slot_if_there_is_one() -> None:
    admission = door(max_calls=1)

    assert begin(admission, "a") is None
    assert begin(admission, "b") is Refusal.MAX_CALLS
    assert admission.pending == 0


def test_what_was_never_started_can_end_without_harm() -> None:
    admission = door()
    admission.ended("a", 0)
    admission.connection_over(A)

    assert (admission.calls, admission.pending) == (0, 0)


# --- rate ----------------------------------------------------------------------------------------------------------------


def test_the_rate_holds_over_any_second_and_a_second_may_come_at_once() -> None:
    admission = door(max_calls=10_000, rate=50)

    assert [admission.reserve(f"a{n}", 7) for n in range(60)].count(None) == 50
    assert [admission.reserve(f"b{n}", 7.5) for n in range(60)].count(None) == 25
    assert [admission.reserve(f"c{n}", 100) for n in range(60)].count(None) == 50
    assert admission.refused[Refusal.RATE] == 10 + 35 + 10


def test_less_than_one_a_second() -> None:
    admission = door(max_calls=100, rate=0.5)

    assert [admission.reserve(str(now), now) for now in (1000, 1001, 1002, 1003, 1004)] == [None, "rate", None, "rate", None]


def test_a_refused_call_takes_nothing_from_the_rate() -> None:
    admission = door(max_calls=1, rate=2)
    assert [admission.reserve(call, 0) for call in "abcdef"].count(Refusal.MAX_CALLS) == 5
    begin(admission, "a")
    admission.ended("a", 0)

    assert admission.reserve("g", 0) is None


# --- pending connections -------------------------------------------------------------------------------------------------


def test_pending_connections_count_by_address_until_they_start_or_close() -> None:
    admission = door(max_calls=10)

    assert [admission.connect(A, 0) for _ in range(3)] == [None, None, Refusal.PENDING]
    assert admission.connect(B, 0) is None
    admission.started("a", A, 1)
    assert admission.connect(A, 1) is None
    admission.connection_over(A)
    admission.connection_over(A)
    assert admission.pending == 1
    assert admission.refused == Counter({Refusal.PENDING: 1})


def test_an_ipv6_host_has_many_addresses_and_one_count() -> None:
    admission = door(max_calls=10)

    assert [admission.connect(f"2001:db8::{n}", 0) for n in (1, 2, 3)] == [None, None, Refusal.PENDING]
    assert admission.connect("2001:db8:0:1::1", 0) is None
    admission.connection_over("2001:db8::4711")
    assert admission.connect("2001:db8::9", 0) is None


def test_many_addresses_together_have_a_bound_too() -> None:
    admission = Admission(10, 50, 5)

    assert [admission.connect(f"198.51.100.{n}", 0) for n in range(50)].count(None) == 20


# --- floods --------------------------------------------------------------------------------------------------------------


def tables(admission: Admission) -> int:
    return sum(len(value) for value in vars(admission).values() if isinstance(value, (dict, set)))


def test_a_flood_leaves_nothing_behind_and_costs_little() -> None:
    admission = Admission(500, 50, 50)
    for n in range(100_000):
        now = n / 5_000
        admission.reserve(f"call-{n}", now)
        admission.connect(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", now)
        assert admission.calls <= 500

    assert tables(admission) <= 500 + 1000 + len(Refusal)
    assert admission.refused.total() > 190_000

    assert admission.reserve("the last", 1_000) is None
    assert admission.calls == 1


calls, addresses = st.sampled_from("abcdef"), st.sampled_from([A, B, "2001:db8::1", "2001:db8::2"])


class Door(RuleBasedStateMachine):
    """Any order of questions, against books kept the simple way."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(3, 5.0, 2)
        self.now = 0.0
        self.reserved: dict[str, float] = {}
        self.streams: Counter[str] = Counter()
        self.waiting: list[str] = []

    def slots(self) -> set[str]:
        return {call for call, until in self.reserved.items() if until > self.now} | {*self.streams.elements()}

    @rule(secs=st.floats(0, 20))
    def wait(self, secs: float) -> None:
        self.now += secs

    @rule(call=calls)
    def reserve(self, call: str) -> None:
        had, full = call in self.slots(), len(self.slots()) >= 3
        said = self.admission.reserve(call, self.now)
        if had:
            assert said is None
        elif full:
            assert said is Refusal.MAX_CALLS
        else:
            assert said in (None, Refusal.RATE)
        if said is None:
            self.reserved[call] = float("inf") if self.streams[call] else self.now + 15

    @rule(address=addresses)
    def connect(self, address: str) -> None:
        near = sum(where[:9] == address[:9] for where in self.waiting)
        said = self.admission.connect(address, self.now)
        assert said is (Refusal.PENDING if near >= 2 or len(self.waiting) >= 6 else None)
        if said is None:
            self.waiting.append(address)

    @rule(call=calls, data=st.data())
    def start(self, call: str, data: Any) -> None:
        if self.waiting:
            address = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
            fits = call in self.slots() or len(self.slots()) < 3
            assert self.admission.started(call, address, self.now) is (None if fits else Refusal.MAX_CALLS)
            if fits:
                self.streams[call] += 1
                self.reserved.pop(call, None)

    @rule(data=st.data())
    def close(self, data: Any) -> None:
        if self.waiting:
            self.admission.connection_over(self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))))

    @rule(call=calls)
    def end(self, call: str) -> None:
        self.admission.ended(call, self.now)
        self.streams[call] -= bool(self.streams[call])
        if not self.streams[call] and self.reserved.get(call) == float("inf"):
            self.reserved[call] = self.now + 15

    @invariant()
    def books_balance(self) -> None:
        assert self.admission.active == len({*self.streams.elements()})
        assert len(self.slots()) <= self.admission.calls <= 3
        assert self.admission.pending == len(self.waiting) <= 6
        assert tables(self.admission) <= 3 + 3 + 6 + len(Refusal)


Door.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDoor = Door.TestCase


# --- whose address -------------------------------------------------------------------------------------------------------

PROXIES = networks(["10.0.0.0/8", "::1", "2001:db8:ffff::/48"])


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("203.0.113.9", "", "203.0.113.9"),
        ("203.0.113.9", "1.2.3.4", "203.0.113.9"),  # nobody we trust says so
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "6.6.6.6, 1.2.3.4", "1.2.3.4"),  # the client made up the first
        ("10.0.0.1", "6.6.6.6, 1.2.3.4 ,10.9.9.9", "1.2.3.4"),
        ("10.0.0.1", "10.0.0.3,10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "1.2.3.4, unknown", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4, _hidden, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "1.2.3.4,", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4:5678", "1.2.3.4"),
        ("10.0.0.1", "[2001:db8::7]:443", "2001:db8::7"),
        ("::1", "2001:0DB8::0007", "2001:db8::7"),
        ("::ffff:10.0.0.1", "::ffff:1.2.3.4", "1.2.3.4"),
        ("::1", "fe80::1%\x1b[2J", "::1"),
        ("2001:db8:ffff::2", "1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "010.1.2.3", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4, " + "10.0.0.2, " * 1_000 + "10.0.0.3", "10.0.0.2"),
        ("/run/gateway.sock", "1.2.3.4", "/run/gateway.sock"),
        ("", "1.2.3.4", "unknown"),
        (None, "1.2.3.4", "unknown"),
    ],
)
def test_the_right_most_hop_that_is_not_trusted_is_the_client(peer: str | None, forwarded_for: str, client: str) -> None:
    assert client == client_address(peer, forwarded_for, PROXIES)


def test_without_proxies_the_header_counts_for_nothing() -> None:
    assert client_address("10.0.0.1", "1.2.3.4", ()) == "10.0.0.1"


hops = st.text() | st.ip_addresses().map(str) | st.sampled_from(["10.0.0.2", "[::1", "::1]", "1.2.3.4:", "%", "²"])


@given(st.ip_addresses().map(str), st.lists(hops, max_size=6).map(",".join))
def test_any_header_gives_an_address(peer: str, forwarded_for: str) -> None:
    said = client_address(peer, forwarded_for, PROXIES)

    assert str(ip_address(said)) == said
    assert door().connect(said, 0) is None
