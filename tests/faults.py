"""The fault table with results: `python -m tests.faults` writes tests/README.md.

A test belongs to a row by its name (`test_d5_…`, `test_s4_s8_…`); those of other names are listed in the row. Figures of long
forms come from tests/results, which the commands write themselves. `tests/test_faults.py` fails when a row has neither a test nor
a reason, when a test that it names is not there, and when the README is not what this writes.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.results import Result, load

TESTS = Path(__file__).parent
README = TESTS / "README.md"
BEGIN, END = "<!-- fault-table -->", "<!-- /fault-table -->"
_ID = re.compile(r"[fdtpos]\d{1,2}")
_TEST = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)


class Row(NamedTuple):
    """One fault. `tests` are node ids of tests whose names don't tell the row; `results` are files in tests/results."""

    id: str
    fault: str
    wanted: str
    tests: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    limits: str = ""
    """What of it can't be tested here, or is tested by something that only looks the same, and why."""
    open: str = ""
    """Why there is no test yet; of no account once there is one."""


SECTIONS: dict[str, tuple[Row, ...]] = {
    "Frames and protocol state": (
        Row(
            "F1",
            "Frames that are no JSON, of wrong types, of nobody's kind, too deep, too large a number, bad UTF-8",
            "skipped, counted by reason and told once; the call goes on, and ends with 1008 past 50 in 10 s",
            (
                "test_session.py::test_rubbish_is_counted_remarked_once_and_the_call_goes_on",
                "test_session.py::test_too_much_rubbish_in_too_little_time_ends_the_stream",
                "test_end_to_end.py::test_rubbish_from_the_carrier_is_skipped_and_logged_once",
                "test_conformance.py::test_mutated_frames_are_malformed_at_worst",
                "test_conformance.py::test_any_frame_is_malformed_at_worst",
            ),
            ("fuzz-decode", "fuzz-session", "fuzz-wire"),
        ),
        Row(
            "F2",
            "Messages too large, endless fragments, broken framing",
            "1002, 1007 or 1009 for that socket, nothing else",
            (),
            ("autobahn",),
        ),
        Row(
            "F3",
            "A binary frame where text is due",
            "as F1",
            ("test_end_to_end.py::test_rubbish_from_the_carrier_is_skipped_and_logged_once",),
        ),
        Row(
            "F4",
            "Payloads that are no base64, empty, half a sample, or very long",
            "skipped and counted; half samples are put together; what is heard stays exact",
            (
                "test_end_to_end.py::test_odd_bytes_of_a_wide_stream_come_through_the_echo",
                "providers/test_wire.py::test_codec_reads_and_writes_every_line",
            ),
        ),
        Row(
            "F5",
            "The same audio twice",
            "dropped and counted",
            (
                "test_timeline.py::test_duplicates_are_dropped",
                "test_timeline.py::test_the_same_timestamp_with_other_audio_is_no_duplicate",
                "test_session.py::test_a_hole_in_the_timestamps_is_told_and_a_duplicate_is_dropped",
            ),
        ),
        Row(
            "F6",
            "Audio that never came",
            "told as a gap, filled with silence; an hour keeps its length to a frame",
            (
                "test_timeline.py::test_an_hour_with_one_frame_in_a_hundred_lost_keeps_its_length_exactly",
                "test_end_to_end.py::test_a_hole_in_the_callers_audio_is_told_and_filled_with_silence",
            ),
        ),
        Row(
            "F7",
            "Frames in another order",
            "put in order where no more than three have overtaken one; later ones are dropped, counted and told as a gap",
            (
                "test_reorder.py::test_whatever_is_overtaken_by_no_more_than_the_window_comes_in_order",
                "test_reorder.py::test_nothing_is_lost_or_doubled_and_no_more_than_the_window_is_held",
                "test_timeline.py::test_a_clock_that_is_set_back_begins_anew",
            ),
            limits="one TCP connection keeps its order: this would be a carrier's own mistake",
        ),
        Row(
            "F8",
            "Audio before the start frame",
            "half a second is held and comes after the start",
            (
                "test_session.py::test_audio_before_the_start_is_held_and_comes_after_it",
                "test_session.py::test_audio_before_the_start_is_bounded",
            ),
        ),
        Row("F9", "A stream that never starts", "1008 after 5 s, its place is free again"),
        Row(
            "F10",
            "A second start: of the same stream, of another, on another socket",
            "ignored; 1008; the newer stream takes over",
        ),
        Row(
            "F11",
            "Ends in every order: stop, close, status callback",
            "one stop for the service, by the first sign",
            (
                "test_session.py::test_stop_comes_once_and_last",
                "test_playout_machine.py::test_no_interleaving_has_a_wrong_outcome",
            ),
        ),
        Row(
            "F12",
            "Floods of digits, and digits that are none",
            "what is no key is refused and counted",
            ("providers/test_wire.py::test_codec_reads_and_writes_every_line",),
            limits="there is no limit of 50 a second: a digit costs no more than a frame of audio",
        ),
        Row(
            "F13",
            "Audio stops, the socket lives",
            "told after 3 s; the stream ends when nothing of any kind has come for 60 s (`stall_timeout_secs`)",
            ("test_stall.py::test_three_seconds_are_told_once_within_a_quarter",),
            limits="told in the log and in a metric, not to the service: it has the gap when audio is back",
        ),
        Row(
            "F14",
            "Audio faster than real time after a carrier's stall",
            "nothing lost that fits the ring (`replay_ms`; the rest is D4), no gap invented",
            (
                "test_timeline.py::test_a_burst_after_a_stall_with_true_timestamps_is_no_gap",
                "test_timeline.py::test_a_burst_stamped_by_arrival_is_kept_whole_and_later_gaps_are_set_off_against_it",
                "test_end_to_end.py::test_early_audio_waits_for_a_slow_service",
            ),
        ),
    ),
    "Transport": (
        Row(
            "T1",
            "A connection that is dead and does not say so",
            "noticed by the heartbeat: within 4 s where audio is due, else 15 s; a peer that only never pongs is kept",
            limits="the chaos proxy lets all bytes vanish: without a network namespace, that is what a dead route looks like",
        ),
        Row("T2", "Peers that take their time: silent, dripping, a slow TLS hello", "cut within seconds; calls don't notice"),
        Row("T3", "A flood of upgrades that nobody signed", "refused for microseconds each, told once a second; calls bit-exact"),
        Row(
            "T4",
            "Thousands of idle sockets",
            "bounded by address and in all",
            (
                "test_admission.py::test_many_addresses_together_have_a_bound_too",
                "test_security.py::test_f9_one_address_has_so_many_connections_that_have_not_started",
            ),
        ),
        Row(
            "T5",
            "What two HTTP servers could read differently; endless headers",
            "refused and closed, whatever is behind it unread",
        ),
        Row(
            "T6",
            "Loss, delay, jitter, a thin line",
            "up to 5 %: nothing lost or reordered, a p99 of a retransmission; above that, what is lost is told",
            results=("packet-loss",),
            limits="where there are no namespaces, nft and TUN devices, by the chaos proxy alone",
        ),
        Row(
            "T7",
            "Segments of one byte, frames in one segment",
            "bit-exact",
            ("test_security.py::test_t5_a_good_upgrade_is_good_however_its_bytes_are_cut",),
        ),
        Row("T8", "Every close code, and a reset", "an end with its reason; what was pending is accounted for"),
        Row("T9", "Certificates that are renewed, or renewed badly", "new ones are taken, bad ones refused; no call ends"),
        Row("T10", "Forwarding headers that lie", "believed from configured proxies only; the public URL is never guessed"),
    ),
    "Services": (
        Row(
            "D1",
            "Down at the start: refused, silent, HTTP 401 to 503, TLS, DNS",
            "dialled again while the caller's words wait; the next of the list; a reason at the end",
            limits="a black hole is a listener that never answers: a real one needs a network namespace",
        ),
        Row(
            "D2",
            "Dies in mid-call, and comes back",
            "nothing lost, nothing twice, in either direction; playback goes on",
            (
                "services/test_kill.py::test_killed_under_twenty_calls",
                "services/test_kill.py::test_a_thousand_kills_over_a_hundred_calls",
            ),
        ),
        Row(
            "D3",
            "Flaps",
            "no storm of connections: full jitter, a breaker for each service, a limit over all",
            (
                "services/test_retry.py::test_the_breaker_opens_after_five_failures_and_lets_one_probe_through",
                "services/test_retry.py::test_never_more_than_the_rate_and_one_burst",
                "services/test_dialler.py::test_a_dead_service_is_probed_by_one_and_all_hear_when_it_is_back",
            ),
        ),
        Row(
            "D4",
            "Away for longer than the ring",
            "the oldest is left out and told as one gap, exact to the frame",
            ("services/test_ring.py::test_nothing_is_lost_untold_and_nothing_comes_twice",),
        ),
        Row(
            "D5",
            "Slow, or reads nothing",
            "told, dropped for, dialled again; others' calls unaffected, its memory bounded",
            (
                "services/test_slow.py::test_a_stalled_service_among_twenty",
                "services/test_slow.py::test_a_stalled_service_among_a_hundred",
            ),
        ),
        Row(
            "D6",
            "Talks rubbish, floods with audio",
            "each mistake is answered with a fault; the queue pauses it, then refuses; the caller's audio untouched",
            ("test_end_to_end.py::test_rubbish_from_the_service_is_answered_with_a_fault",),
            ("fuzz-decode", "fuzz-wire"),
        ),
        Row("D7", "Two connections for one call", "the newer one has the say"),
        Row("D8", "Comes back without memory", "chooses live or the oldest; the rest is told as a gap"),
        Row(
            "D9",
            "Addresses change, name servers are down",
            "every address is tried, the last good answer serves",
            limits="by a resolver of the test's",
        ),
        Row(
            "D10",
            "Another instance gets the reconnection",
            "it can take the call over",
            limits="behind a relay of ten lines, not HAProxy",
        ),
    ),
    "Playback": (
        Row("P1", "The carrier goes away in mid-playback", "each checkpoint comes back once, as lost, with what was heard"),
        Row(
            "P2",
            "A clear with checkpoints pending",
            "cleared, whatever the carrier echoes later",
            ("test_playout_machine.py::test_no_interleaving_of_100_000_has_a_wrong_outcome",),
        ),
        Row("P3", "A stop with checkpoints pending", "played or lost, each once"),
        Row(
            "P4",
            "Audio after a clear",
            "plays",
            ("test_playout_machine.py::test_no_interleaving_has_a_wrong_outcome",),
        ),
        Row("P5", "A mark that never comes back", "taken as played 5 s after it was due"),
        Row("P6", "One name for several checkpoints", "each comes back"),
        Row(
            "P7",
            "Late wake-ups, stalls, bursts",
            "no underrun up to 100 ms, and no burst",
            ("test_playout.py::test_ten_minutes_with_late_wake_ups_lose_no_time",),
        ),
    ),
    "Process, host, time": (
        Row(
            "O1",
            "More calls than there is room for",
            "calls inside lose no frame; those outside hear so at once",
            (),
            ("overload",),
        ),
        Row(
            "O2",
            "SIGTERM",
            "no new calls, those that there are may end; then they are ended and told why",
            results=("rolling",),
        ),
        Row("O3", "A worker is killed", "restarted, calls attach again", results=("killed-workers",)),
        Row("O4", "The supervisor is killed", "workers live on", open="workers are being written"),
        Row("O5", "Something blocks the event loop", "told with the stack of what blocks"),
        Row("O6", "File descriptors run out", "calls go on, the log stays short, new calls come in once there is room"),
        Row(
            "O7",
            "Memory over long calls",
            "nothing is kept of a frame",
            ("test_playout.py::test_a_long_run_keeps_no_memory",),
            ("soak-path",),
        ),
        Row("O8", "What is left of calls that are over", "no session, task, timer, descriptor", (), ("soak-calls",)),
        Row("O9", "The wall clock jumps", "no call notices: it is for tokens and certificates only"),
        Row(
            "O10",
            "Disks that are full, read-only, hang",
            "the recording ends and says so; the call goes on",
            (
                "services/test_recorder.py::test_a_full_disk_ends_the_recording_and_not_the_call",
                "services/test_recorder.py::test_a_file_system_of_24_kilobytes",
                "services/test_recorder.py::test_a_disk_that_hangs_holds_up_nothing",
                "test_ledger.py::test_a_full_disk_costs_the_sharing_not_the_call",
            ),
        ),
        Row(
            "O11",
            "Memory runs out",
            "no new calls before it does",
            (
                "test_host.py::test_memory_is_that_of_the_tightest_limit_without_what_the_kernel_can_take_back",
                "test_host.py::test_o1_new_calls_hear_overflow_while_something_is_short",
            ),
            limits="the kernel's killer itself is not provoked: it would take the test with it",
        ),
        Row(
            "O12",
            "Neighbours take the processor",
            "no new calls while the loop is late",
            (
                "test_watchdog.py::test_one_long_block_is_no_overload_and_several_are",
                "test_host.py::test_processors_and_bandwidth_are_means_of_five_seconds",
            ),
        ),
        Row(
            "O13",
            "A broken configuration, at the start or at a reload",
            "all findings with their places; a reload is taken whole or not at all",
            (
                "test_config.py::test_a_mistake_is_told_with_its_place",
                "test_config.py::test_any_text_raises_config_error_or_nothing",
            ),
        ),
    ),
    "Security": (
        Row(
            "S1",
            "Forged signatures",
            "refused, every flipped bit; we agree with the carriers' own libraries",
            (
                "providers/test_twilio_signature.py::test_every_flipped_bit_is_refused",
                "providers/test_twilio_signature.py::test_the_official_library_agrees_100_000_times",
                "providers/test_plivo_signature.py::test_every_flipped_bit_is_refused",
                "providers/test_plivo_signature.py::test_the_official_library_agrees_100_000_times",
            ),
        ),
        Row(
            "S2",
            "Replays of webhooks and upgrades",
            "open nothing",
            ("test_ledger.py::test_of_several_processes_exactly_one_is_first",),
        ),
        Row(
            "S3",
            "Guessing by the time a refusal takes",
            "the same work for whatever is wrong",
            (
                "test_tokens.py::test_every_wrong_mac_costs_the_same",
                "providers/test_twilio_signature.py::test_every_signature_costs_the_same",
                "providers/test_plivo_signature.py::test_every_signature_costs_the_same",
            ),
        ),
        Row(
            "S4",
            "Tokens in logs",
            "none, anywhere",
            ("test_logs.py::test_no_stream_token_gets_out_of_any_text", "test_oracles.py::test_a_configured_secret_is_seen"),
        ),
        Row("S5", "A service that sends us elsewhere", "no redirect is followed"),
        Row(
            "S6",
            "Markup out of a caller's words",
            "text stays text",
            (
                "providers/test_xml.py::test_a_million_strings_survive",
                "test_conformance.py::test_answers_are_well_formed_for_every_string",
            ),
        ),
        Row(
            "S7",
            "Lines and colours in a log",
            "escaped",
            ("test_logs.py::test_any_value_makes_one_harmless_line", "test_logs.py::test_what_a_terminal_obeys_is_escaped"),
        ),
        Row(
            "S8",
            "Numbers, digits and words of callers",
            "masked in the log",
            ("test_logs.py::test_canaries_never_appear", "services/test_recorder.py::test_the_log_has_nothing_private"),
        ),
        Row("S9", "Compressed bombs", "nothing is inflated"),
        Row(
            "S10",
            "XML from outside",
            "never read",
            limits="there is no code that could be tested: answers are written, not read, outside of the simulator",
        ),
        Row("S11", "The operators' listener", "its own address, a bearer token, no foreign origin"),
        Row("S12", "Calls and numbers as labels of metrics", "none; labels are few"),
        Row(
            "S13",
            "Dependencies",
            "few, with lower bounds that are tested",
            ("test_packaging.py::test_the_wheel_says_what_it_is",),
            limits="audits and signatures belong to a release, not to a test",
        ),
        Row(
            "S14",
            "Secrets in the configuration",
            "by reference; never shown; no core dumps",
            ("test_config.py::test_values_from_the_environment_are_never_shown", "test_config.py::test_secrets_from_files"),
        ),
        Row(
            "S15", "One tenant's token for another's call", "opens nothing", ("test_tokens.py::test_it_opens_no_other_provider",)
        ),
        Row("S16", "Webhooks as a weapon", "64 KiB, 5 s, and the signature first"),
    ),
}
ROWS = [row for rows in SECTIONS.values() for row in rows]


def collected() -> dict[str, list[str]]:
    """Tests by the ids in their names, as node ids below tests/."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path, name in _tests():
        for word in name.split("_")[1:]:
            if not _ID.fullmatch(word):
                break
            found[word.upper()].append(f"{path}::{name}")
    return dict(found)


def every() -> set[str]:
    """All tests that there are."""
    return {f"{path}::{name}" for path, name in _tests()}


@cache
def _tests() -> tuple[tuple[str, str], ...]:
    return tuple(
        (path.relative_to(TESTS).as_posix(), name)
        for path in sorted(TESTS.rglob("test_*.py"))
        for name in _TEST.findall(path.read_text())
    )


# --- figures -------------------------------------------------------------------------------------------------------------


def _fuzz(figures: dict[str, Any]) -> str:
    codecs = figures["codecs"].values()
    slowest = max(each["p99_9_us"] for each in codecs)
    return (
        f"{figures['frames']:,} frames over {len(codecs)} protocols: {figures['exceptions']} exceptions, "
        f"p99.9 at most {slowest:.0f} µs"
    )


def _wire(figures: dict[str, Any]) -> str:
    return (
        f"{figures['frames_taken']:,} frames from carriers and {figures['service_messages']:,} messages from services: "
        f"{figures['exceptions']} errors in the log, {len(figures['neighbours_losses'])} losses in "
        f"{figures['neighbours_frames']:,} frames of neighbours, their p99.9 {figures['neighbours_p99_9_ms']} ms, "
        f"memory {figures['rss_growth_kib']:+,} KiB"
    )


def _autobahn(figures: dict[str, Any]) -> str:
    return "; ".join(f"{end}: {each['cases']} cases, {len(each['not_ok'])} not OK as listed" for end, each in figures.items())


def _path(figures: dict[str, Any]) -> str:
    return (
        f"{figures['frames']:,} frames of {figures['calls']} calls: {figures['grown_kib']:+,} KiB in all, "
        f"{figures['blocks_per_million_frames']:+} objects a million"
    )


def _calls(figures: dict[str, Any]) -> str:
    left = figures["residue_2"] or "nothing"
    return f"{figures['calls']:,} calls in two bursts: left {left}; memory after the second {figures['second_over_first']:+.1%}"


def _overload(figures: dict[str, Any]) -> str:
    return (
        f"{figures['offered_at_once']} calls for {figures['admitted']} places: {len(figures['losses'])} losses in "
        f"{figures['frames_each_way']:,} frames each way, p99 {figures['added_p99_ms']:+.1f} ms, "
        f"refusals p99 {figures['refusal_p99_ms']:.1f} ms"
    )


def _packets(figures: dict[str, Any]) -> str:
    parts = []
    for lines, found in figures.items():
        closed = f", {found['calls_closed']} of {found['calls']} calls given up and told" if found["calls_closed"] else ""
        parts.append(f"{lines}: {len(found['losses'])} losses{closed}, p99 {found['added_p99_ms']:+.0f} ms")
    frames = sum(found["frames_each_way"] for found in figures.values())
    dropped = sum(found["packets_dropped"] for found in figures.values())
    return f"{frames:,} frames each way, {dropped:,} packets dropped. {'; '.join(parts)}"


def _rolling(found: dict[str, Any]) -> str:
    return (
        f"{found['restarts']} rolling restarts, {found['handshakes']:,} handshakes: {found['refused']} refused; "
        f"{found['dropped']} of {found['held']} calls that were held through all of it dropped"
    )


def _killed(found: dict[str, Any]) -> str:
    gap, lost = found["gap_ms"], found["frames_lost_beyond_the_gap_at_each_loss"]
    return (
        f"{found['kills']} workers killed, {found['reattached']:,} streams lost, {found['not_reattached']} of them not taken up; "
        f"without a stream for {gap['p50']} ms (p50), {gap['p99']} ms (p99); missing at each loss, beyond what found no stream: "
        f"{lost['mean']} frames (mean), {lost['max']:.0f} (max)"
    )


def _mutation(found: dict[str, Any]) -> str:
    sums = {each: sum(module[each] for module in found.values()) for each in ("mutants", "killed", "harmless")}
    return (
        f"{len(found)} modules, {sums['mutants']:,} mutants: {sums['killed'] / sums['mutants']:.1%} killed, "
        f"{sums['harmless']} harmless, {sum(len(module['survived']) for module in found.values())} not known to be"
    )


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "fuzz-decode": _fuzz,
    "fuzz-session": _fuzz,
    "fuzz-wire": _wire,
    "autobahn": _autobahn,
    "soak-path": _path,
    "soak-calls": _calls,
    "overload": _overload,
    "packet-loss": _packets,
    "rolling": _rolling,
    "killed-workers": _killed,
    "mutation": _mutation,
}


# --- the table -----------------------------------------------------------------------------------------------------------


def written() -> str:
    """The table as Markdown, without what stands around it."""
    tests, results = collected(), load()
    parts = []
    for title, rows in SECTIONS.items():
        parts += [f"### {title}", "", "| | fault | wanted | tests | figures, limits |", "|---|---|---|---|---|"]
        parts += [_line(row, tests, results) for row in rows]
        parts.append("")
    parts += _mutants(results)
    parts += ["### Long forms", "", "| figures | command | date | machine | passed |", "|---|---|---|---|---|"]
    for name, result in results.items():
        parts.append(
            f"| {name} | `{result.command}` | {result.date} | {result.machine} | {'yes' if result.passed else '**no**'} |"
        )
    return "\n".join(parts) + "\n"


def _mutants(results: dict[str, Result]) -> list[str]:
    if (stored := results.get("mutation")) is None:
        return []
    parts = [
        "### Mutants",
        "",
        "Small changes of a module that its tests must notice: [mutation.py](mutation.py). Those that survive are",
    ]
    parts += [
        f"in [mutation.toml](mutation.toml), each with the reason why it is harmless. {FIGURES['mutation'](stored.figures)}.",
        "",
    ]
    parts += ["| module | mutants | killed | harmless | not known to be |", "|---|---|---|---|---|"]
    for name, each in stored.figures.items():
        killed = f"{each['killed']} ({each['killed'] / each['mutants']:.1%})"
        parts.append(f"| {name} | {each['mutants']} | {killed} | {each['harmless']} | {len(each['survived'])} |")
    return [*parts, ""]


def tests_of(row: Row, tests: dict[str, list[str]]) -> list[str]:
    return list(dict.fromkeys([*tests.get(row.id, ()), *row.tests]))


def _line(row: Row, tests: dict[str, list[str]], results: dict[str, Result]) -> str:
    mine = tests_of(row, tests)
    files: defaultdict[str, list[str]] = defaultdict(list)
    for node in mine:
        path, _, name = node.partition("::")
        files[path].append(f"`{name.removeprefix('test_')}`")
    told = [f"[{path}]({path}): {', '.join(names)}" for path, names in files.items()] or ["—"]
    figures = [
        f"{name}: {FIGURES[name](results[name].figures)}{'' if results[name].passed else ' (**missed**)'}"
        for name in row.results
        if name in results
    ]
    if not mine and row.open:
        figures.append(f"**not tested yet**: {row.open}")
    if row.limits:
        figures.append(row.limits)
    return f"| {row.id} | {row.fault} | {row.wanted} | {'<br>'.join(told)} | {'<br>'.join(figures)} |"


def rewritten(text: str) -> str:
    """The README with today's table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{written()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
    print(README, file=sys.stderr)
