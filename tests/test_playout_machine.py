"""Every order of audio, checkpoint, clear, stop and echo, against the caller's own ear: no wrong outcome, ever.

A few hundred conversations in every run. All of them, 100,000 by default, in a few minutes:

    pytest -m long tests/test_playout_machine.py -n auto
    python -m tests.test_playout_machine 100000          (prints the figures)
"""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.ear import Fate
from gateway.events import (
    After,
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Flow,
    Gap,
    Outcome,
    Play,
    Say,
    Spoken,
    Start,
    Stop,
    StopReason,
)
from gateway.media import MULAW_8K, MediaFormat, Track
from gateway.playout import LARGEST_LATENESS_SECS
from tests.playbook import L16_16K, Phone

LONG = 100_000
SHORT = 300
LARGEST_DELAY_MS = 80.0
LINES: tuple[tuple[str, MediaFormat], ...] = (
    ("twilio_media_streams", MULAW_8K),
    ("plivo_audio_streaming", MULAW_8K),
    ("plivo_audio_streaming", L16_16K),
)
SIZES_MS = (0.125, 1, 7, 20, 20, 20, 33, 60, 100, 140, 500, 2000)
WAITS_MS = (0, 0, 1, 5, 20, 20, 50, 100, 300, 1000, 6000)


@dataclass
class Asked:
    """A checkpoint as the service knows it."""

    name: str
    generation: int
    position: int  # bytes of its generation before it


@dataclass
class Claim:
    """Something the session said about what was heard of a generation, to be compared once the ear's truth is known."""

    generation: int
    what: str
    start: int  # bytes
    end: int
    played_ms: int
    outcome: Outcome | None


class Conversation(Phone):
    """One call on an audio stream whose every event is judged at the moment it is told. Raises AssertionError."""

    def __init__(
        self,
        kind: str,
        media_format: MediaFormat,
        random: Random,
        *,
        largest_delay_ms: float,
        jitter_ms: float,
        unfaithful: bool,
        delay: Callable[[], float] | None = None,
    ) -> None:
        self.random = random
        self.asked: deque[Asked] = deque()  # and not yet come back
        self.unsent: deque[Asked] = deque()
        self.on_the_way: dict[str, Asked] = {}
        self.claims: list[Claim] = []
        self.truths: dict[int, int] = {}  # bytes heard of each generation
        self.told_clears: list[int] = []
        self.generation = 0
        self.accepted = 0  # bytes of this generation
        self.accepted_total = 0
        self.left_here = 0  # bytes of this generation
        self.boundary = (0, 0)  # generation and position of the last checkpoint that came back
        self.played_until = 0  # position of the last checkpoint of this generation that came back as played
        self.performing: Command | None = None
        self.clears = 0
        self.stopped = False
        self.stopping = False
        self.outcomes: Counter[str] = Counter()
        self.heard_up = 0
        self.sent_up = 0
        self.errors: list[tuple[Claim, float]] = []
        """Every figure that is no echo's, and by how many milliseconds it was wrong."""
        self.tolerance_ms = largest_delay_ms + jitter_ms + 2
        # Echoes that the carrier holds back mislead about how far away the ear is when it hangs up.
        self.misled_ms = LARGEST_LATENESS_SECS * 1000 if unfaithful else 0.0
        super().__init__(
            kind,
            media_format=media_format,
            delay=delay or (lambda: random.uniform(0, largest_delay_ms) if largest_delay_ms else 0.0),
            jitter_ms=jitter_ms,
            fate=self.fate if unfaithful else None,
            capacity_ms=random.choice((2000, 120_000)),
        )
        self.start()
        self.lead_ms = self.codec.limits.lead_ms

    def fate(self, _: str) -> Fate:
        return Fate(self.random.choice((0, 1, 1, 1, 1, 2)), self.random.choice((0, 0, 0, 30, 300, 6000)))

    # --- what the service and the carrier do ---

    def audio(self, ms: float) -> None:
        tag = self.generation % 100 + 1
        size = max(1, round(ms * self.media_format.sample_rate / 1000)) * self.media_format.sample_bytes
        self.performing = Audio(bytes([tag]) * size)
        before = self.queued_total()
        self.session.perform(self.performing, self.now)
        if not self.stopped:
            accepted = self.queued_total() - before
            playout = self.session.playout
            assert playout is not None
            room = self.stopping or size == accepted or playout.refused > 0
            assert room, "audio went missing without a word"
            self.accepted += accepted
            self.accepted_total += accepted
        self.settle()

    def checkpoint(self, name: str) -> None:
        asked = Asked(name, self.generation, self.accepted)
        self.performing = Checkpoint(name)
        if not self.stopping and not self.stopped:
            self.asked.append(asked)
            self.unsent.append(asked)
        self.session.perform(self.performing, self.now)
        self.settle()

    def clear(self) -> None:
        self.performing = Clear()
        over, clears = self.stopped, self.clears
        seen = len(self.commands)
        before = self.heard_samples if not over else 0
        self.heard_at_clear = before * self.media_format.sample_bytes if len(self.told_clears) == self.generation_cuts() else 0
        self.session.perform(self.performing, self.now)
        if over:
            self.settle()
            return
        assert self.clears == clears + 1, "a clear comes back exactly once, at once"
        assert all(asked.generation > self.generation for asked in self.asked), "a clear settles all that was asked before it"
        old = self.generation
        self.generation += 1
        self.accepted = self.played_until = self.left_here = 0
        self.unsent.clear()
        self.boundary = (self.generation, 0)
        self.performing = None
        self.pump()
        left = self.commands[seen:]
        if any(isinstance(command, Clear) for command in left):
            assert isinstance(left[0], Clear), f"{left[0]!r} left before the clear"
            self.told_clears.append(old)
        else:
            self.truths[old] = 0
        self.settle()

    def stop(self, after: After) -> None:
        self.performing = Stop(after=after)
        self.stopping = True
        self.session.perform(self.performing, self.now)
        self.settle()

    def hang(self, *, politely: bool) -> None:
        if not self.closed:
            self.hang_up(Stop(StopReason.CALLER_HANGUP) if politely else None)
            self.wait(0)

    def caller(self) -> None:
        """20 ms of the caller's audio; now and then a hole or a duplicate."""
        if self.closed or self.stopped:
            return
        size = self.media_format.bytes_for(20)
        self.sent_up += size
        self.tell(Audio(self.random.randbytes(4) * (size // 4), Track.INBOUND, round(self.now * 1000)))

    def stray(self) -> None:
        if not self.closed and not self.stopped:
            self.tell(Checkpoint(self.random.choice(("a", "g0.100000", "")), Outcome.PLAYED))

    def settle(self) -> None:
        self.performing = None
        self.pump()
        self.wait(0)

    def queued_total(self) -> int:
        assert self.session.playout is not None
        return self.session.playout.totals(self.now)[0]

    def generation_cuts(self) -> int:
        return len(self.heard_before_cuts)

    def hang_on(self) -> None:
        """Until nothing is left to happen."""
        self.hang(politely=self.random.random() < 0.5)
        self.wait(20_000)
        assert self.stopped
        for command in (Audio(b"\0\0"), Checkpoint("late"), Clear(), Stop()):
            self.session.perform(command, self.now)
        self.session.end(StopReason.DRAIN, self.now)
        self.pump()
        assert not self.asked, f"never came back: {self.asked}"
        self.judge()

    # --- judging ---

    def left(self, command: Command) -> None:
        assert not self.stopped or isinstance(command, (Clear, Stop)), f"{command!r} left after the end"
        if isinstance(command, Audio):
            tag = self.generation % 100 + 1
            assert not command.payload.strip(bytes([tag])), "audio of another generation left"
            self.left_here += len(command.payload)
            assert self.session.playout is not None
            assert self.session.playout.ahead_ms(self.now) <= self.lead_ms + 100
        elif isinstance(command, Checkpoint):
            assert command.name not in self.on_the_way, "a wire name was used twice"
            if not self.unsent:
                assert self.stopping, f"{command.name} was never asked"
                assert self.left_here == self.accepted, "our own mark stands behind the last words"
                return
            asked = self.unsent.popleft()
            self.on_the_way[command.name] = asked
            assert self.left_here == asked.position, "a checkpoint leaves right behind its audio"

    def emitted(self, event: Event) -> None:
        super().emitted(event)
        assert not self.stopped, f"{event!r} after the end"
        match event:
            case Checkpoint():
                self.came_back(event)
            case Clear():
                self.cut(event)
            case Stop():
                self.ended(event)
            case Audio():
                self.heard_up += len(event.payload)
            case _:
                assert isinstance(event, (Start, Gap, Flow)) or type(event).__name__ == "Fault", event

    def came_back(self, event: Checkpoint) -> None:
        assert self.asked, f"{event} was never asked, or came back before"
        asked = self.asked.popleft()
        assert asked.name == event.name, f"{event.name} overtook {asked.name}"
        assert event.outcome is not None
        self.outcomes[event.outcome] += 1
        start = self.boundary[1] if self.boundary[0] == asked.generation else 0
        self.boundary = (asked.generation, asked.position)
        clearing = isinstance(self.performing, Clear)
        if event.outcome is Outcome.PLAYED:
            self.played_until = asked.position
            assert abs(event.played_ms - self.ms(asked.position - start)) <= 1, event
            if not clearing:
                assert len(self.told_clears) == self.generation_cuts(), "a late echo was taken for one of this generation"
                heard = self.ear.played - self._cut_at_sample
                assert heard * self.media_format.sample_bytes >= asked.position, f"{event} has not been heard whole"
        elif event.outcome is Outcome.CLEARED:
            assert clearing, f"{event} without a clear"
            assert self.heard_at_clear < asked.position, f"{event} had been heard whole"
        else:
            assert self.performing is None or isinstance(self.performing, Stop)
        if event.outcome is not Outcome.PLAYED or clearing:
            self.claims.append(Claim(asked.generation, event.name, start, asked.position, event.played_ms, event.outcome))

    def cut(self, event: Clear) -> None:
        assert isinstance(self.performing, Clear)
        assert not [asked for asked in self.asked if asked.generation == self.generation], "the clear came before its checkpoints"
        self.clears += 1
        played_until = self.played_until
        assert abs(event.played_ms + event.cleared_ms - self.ms(self.accepted - played_until)) <= 1, event
        self.claims.append(Claim(self.generation, "clear", played_until, self.accepted, event.played_ms, None))

    def ended(self, event: Stop) -> None:
        self.stopped = self.stopping = True
        assert not self.asked, f"lost without a word: {self.asked}"
        account = event.account
        assert account is not None
        assert account.queued == account.played + account.cleared + account.lost
        assert min(account.queued, account.played, account.cleared, account.lost) >= 0
        assert self.session.playout is not None
        queued, played, cleared, lost = self.session.playout.totals(self.now)
        assert self.accepted_total == queued == played + cleared + lost
        assert not played % self.media_format.sample_bytes
        assert not cleared % self.media_format.sample_bytes
        assert self.sent_up == self.session.received_bytes == self.heard_up + self.session.duplicate_bytes
        self.final_played = played

    def judge(self) -> None:
        """The claims against the ear, once all is over."""
        width = self.media_format.sample_bytes
        for generation, samples in zip(self.told_clears, self.heard_before_cuts, strict=False):
            self.truths[generation] = samples * width
        unreached = self.told_clears[len(self.heard_before_cuts) :]
        current = unreached[0] if unreached else self.generation
        self.truths[current] = (self.ear.played - self._cut_at_sample) * width
        for claim in self.claims:
            truth = self.ms(max(0, min(self.truths.get(claim.generation, 0), claim.end) - claim.start))
            error = claim.played_ms - truth
            allowed = self.tolerance_ms
            if claim.generation >= current:
                allowed += self.tolerance_ms + self.misled_ms  # the end of the line is known a network's delay later
            assert abs(error) <= allowed, f"{claim} and the ear heard {truth} ms"
            self.errors.append((claim, error))
        assert self.ear.max_buffered_ms <= self.lead_ms + 100 + self.tolerance_ms
        off = self.ms(abs(self.final_played - self.ear.played * width))
        bound = self.tolerance_ms * (self.generation + 2) + self.misled_ms
        assert off <= bound, f"the account says {off} ms more or less than was heard"

    def ms(self, size: int) -> float:
        return self.media_format.duration_ms(size)


class Reading(Phone):
    """One call on a text stream. Every word is said once, so what was heard decides every checkpoint."""

    def __init__(self, random: Random, *, largest_delay_ms: float) -> None:
        self.random = random
        self.words = 0
        self.asked: deque[tuple[str, list[str], float]] = deque()  # name, the message before it, when it was asked
        self.recent: list[str] = []  # the last message
        self.stopping = False
        self.stopped = False
        self.outcomes: Counter[str] = Counter()
        self.largest_delay = largest_delay_ms / 1000
        self.last_text = ""
        super().__init__(
            "twilio_conversation_relay",
            delay=lambda: random.uniform(0, largest_delay_ms) if largest_delay_ms else 0.0,
        )
        self.start()

    def say(self, count: int, *, preemptible: bool = False, interruptible: bool = True, final: bool = True) -> None:
        words = [f"word{self.words + n}{self.random.choice(('', '', '.', ','))}" for n in range(count)]
        self.words += count
        if not self.stopping:
            self.recent = [word.rstrip(".,") for word in words]
        text = self.random.choice((" ", "  ", "\n")).join(words) + self.random.choice(("", " "))
        self.perform(Say(text, final, interruptible=interruptible, preemptible=preemptible))

    def digits(self) -> None:
        digits = f"{self.random.randrange(10**9):09}"
        if not self.stopping:
            self.recent = [digits]
        self.perform(Dtmf(digits))

    def play(self) -> None:
        if not self.stopping:
            self.recent = []  # the carrier never tells when it is over, so nothing can be demanded of a checkpoint behind it
        self.perform(Play("https://media.example.com/ding.wav"))

    def checkpoint(self, name: str) -> None:
        if not self.stopping:
            self.asked.append((name, self.recent, self.now))
        self.perform(Checkpoint(name))

    def stop(self, after: After) -> None:
        self.stopping = True
        self.perform(Stop(after=after))

    def hang(self) -> None:
        if not self.closed:
            self.hang_up()

    def hang_on(self) -> None:
        self.hang()
        self.wait(20_000)
        assert self.stopped
        assert not self.asked

    def emitted(self, event: Event) -> None:
        super().emitted(event)
        assert not self.stopped, f"{event!r} after the end"
        if isinstance(event, Stop):
            assert not self.asked
            self.stopping = self.stopped = True
        elif isinstance(event, BargeIn):
            self.recent = []
        elif isinstance(event, Checkpoint):
            name, words, at = self.asked.popleft()
            assert name == event.name
            assert event.outcome is not None
            self.outcomes[event.outcome] += 1
            unheard = [word for word in words if not self.was_heard(word)]
            if event.outcome is Outcome.PLAYED:
                assert not unheard, f"{event}, but the caller did not hear {unheard}"
            elif event.outcome is Outcome.CLEARED:
                assert any(isinstance(each, (BargeIn, Spoken)) for each in self.events[-2 - len(self.asked) - 9 :])
                in_flight = self.now - at <= 2 * self.largest_delay
                assert unheard or not words or in_flight, f"{event}, but the caller heard all of {words}"

    def was_heard(self, word: str) -> bool:
        heard = self.voice.digits if word.isdigit() else self.voice.spoken
        at = heard.find(word)
        return at >= 0 and (word.isdigit() or not heard[at + len(word) : at + len(word) + 1].isdigit())


def converse(seed: int) -> tuple[Counter[str], list[float]]:
    """One random conversation on a random line. Returns the outcomes and the errors of its figures in milliseconds."""
    random = Random(seed)
    delay = random.choice((0.0, 5.0, 40.0, LARGEST_DELAY_MS))
    steps = random.randrange(3, 30)
    if seed % 4 == 3:
        return _read(random, delay, steps), []
    kind, media_format = LINES[seed % 4]
    call = Conversation(
        kind,
        media_format,
        random,
        largest_delay_ms=delay,
        jitter_ms=random.choice((0.0, 20.0)),
        unfaithful=random.random() < 0.5,
    )
    longest = random.choice((3, 9, len(SIZES_MS)))
    for _ in range(steps):
        match random.randrange(24):
            case 0 | 1 | 2 | 3 | 4 | 5 | 6:
                for _ in range(random.choice((1, 1, 1, 5))):
                    call.audio(SIZES_MS[random.randrange(longest)])
            case 7 | 8 | 9 | 10 | 11:
                call.checkpoint(random.choice("ab"))
            case 12 | 13 | 14:
                call.clear()
            case 15:
                call.caller()
            case 16:
                call.stray()
            case 17 if random.random() < 0.3:
                call.stop(random.choice((After.NOW, After.PLAYED)))
            case 18 if random.random() < 0.2:
                call.hang(politely=random.random() < 0.5)
            case _:
                call.wait(random.choice(WAITS_MS))
    call.hang_on()
    return call.outcomes, [error for _, error in call.errors]


def _read(random: Random, delay: float, steps: int) -> Counter[str]:
    call = Reading(random, largest_delay_ms=delay)
    for _ in range(steps):
        match random.randrange(16):
            case 0 | 1 | 2 | 3 | 4:
                rare = random.random() < 0.2
                call.say(
                    random.randrange(1, 9), preemptible=rare, interruptible=random.random() < 0.9, final=random.random() < 0.7
                )
            case 5:
                call.digits()
            case 6:
                call.play()
            case 7 | 8 | 9:
                call.checkpoint(random.choice("ab"))
            case 10:
                call.interrupt()
            case 11 if random.random() < 0.2:
                call.stop(random.choice((After.NOW, After.PLAYED)))
            case _:
                call.wait(random.choice((*WAITS_MS, 2000, 4000)))
    call.hang_on()
    return call.outcomes


def _converse_all(seeds: range) -> tuple[Counter[str], list[str], float]:
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    worst = 0.0
    for seed in seeds:
        try:
            more, errors = converse(seed)
        except Exception as error:  # every wrong outcome is wanted, with its seed
            wrong.append(f"seed {seed}: {type(error).__name__}: {error}"[:300])
        else:
            outcomes += more
            worst = max([worst, *map(abs, errors)])
    return outcomes, wrong, worst


@pytest.mark.parametrize("line", range(4), ids=["twilio", "plivo", "plivo_l16", "relay"])
def test_no_interleaving_has_a_wrong_outcome(line: int) -> None:
    _, wrong, _ = _converse_all(range(line, SHORT * 4, 4))
    assert [] == wrong


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(20))
def test_no_interleaving_of_100_000_has_a_wrong_outcome(part: int) -> None:
    each = LONG // 20
    outcomes, wrong, _ = _converse_all(range(part * each, (part + 1) * each))
    assert [] == wrong
    assert all(outcomes[outcome] for outcome in Outcome)


class Machine(RuleBasedStateMachine):
    """The same rules for Hypothesis, which shrinks what it finds to the shortest conversation."""

    call: Conversation

    @initialize(
        line=st.sampled_from(LINES),
        seed=st.integers(0, 2**32 - 1),
        delay=st.sampled_from((0.0, 40.0, LARGEST_DELAY_MS)),
        jitter=st.sampled_from((0.0, 20.0)),
        unfaithful=st.booleans(),
    )
    def dial(self, line: tuple[str, MediaFormat], seed: int, delay: float, jitter: float, unfaithful: bool) -> None:
        self.call = Conversation(*line, Random(seed), largest_delay_ms=delay, jitter_ms=jitter, unfaithful=unfaithful)

    @rule(ms=st.sampled_from(SIZES_MS))
    def audio(self, ms: float) -> None:
        self.call.audio(ms)

    @rule(name=st.sampled_from("ab"))
    def checkpoint(self, name: str) -> None:
        self.call.checkpoint(name)

    @rule()
    def clear(self) -> None:
        self.call.clear()

    @rule(ms=st.sampled_from(WAITS_MS))
    def wait(self, ms: float) -> None:
        self.call.wait(ms)

    @rule()
    def caller(self) -> None:
        self.call.caller()

    @rule()
    def stray(self) -> None:
        self.call.stray()

    @rule(after=st.sampled_from(After))
    @precondition(lambda self: not self.call.stopping)
    def stop(self, after: After) -> None:
        self.call.stop(after)

    @rule(politely=st.booleans())
    @precondition(lambda self: not self.call.closed)
    def hang(self, politely: bool) -> None:
        self.call.hang(politely=politely)

    @invariant()
    def nothing_is_owed(self) -> None:
        if hasattr(self, "call"):
            assert not self.call.stopped or not self.call.asked

    def teardown(self) -> None:
        if hasattr(self, "call"):
            self.call.hang_on()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


def main(count: int) -> int:
    """Run `count` interleavings on all processors and print what came of them."""
    parts = [range(at, min(at + 1000, count)) for at in range(0, count, 1000)]
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    worst = 0.0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for more, failures, error in pool.map(_converse_all, parts):
            outcomes += more
            wrong += failures
            worst = max(worst, error)
    for line in wrong[:20]:
        print(line)
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"{count} interleavings: {len(wrong)} wrong; checkpoints: {told}; largest error of a figure: {worst:.0f} ms")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else LONG))
