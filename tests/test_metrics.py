"""What a scrape of a real gateway tells, and that the dashboard and the alert rules ask only for what there is."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gateway import metrics
from gateway.buckets import LATENCY_SECS
from gateway.metrics import COUNTERS, GAUGES, HISTOGRAMS, MOST_SERIES, Metrics, Standing, Sums, Totals
from gateway.server import Server
from gateway.watchdog import Watchdog
from tests.conftest import Launch
from tests.doubles import FRAMED, Plivo, RecordingService, TwilioMedia
from tests.test_end_to_end import MULAW, stream_url

CONFIG = Path(__file__).parent.parent / "config"
ADMIN = "127.0.0.1:0"
LABELS = {
    "le",
    "job",
    "instance",
    *(label for each in (COUNTERS, HISTOGRAMS, GAUGES) for one in each.values() for label in one.labels),
}


class Scrape:
    """One answer of /metrics: `scrape[name, label, …]` is a value; labels are given by value, in any order."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}

    def of(self, name: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.name == name]

    def __getitem__(self, key: tuple[str, ...]) -> float:
        name, *labels = key
        return sum(sample.value for sample in self.of(name) if {*labels} <= {*sample.labels.values()})


async def scrape(server: Server) -> Scrape:
    assert server.admin is not None
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{server.admin.port}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        return Scrape(await response.text())


async def test_a_call_is_counted_while_it_lives_and_not_again_when_it_ends(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}}, admin=ADMIN)
        before = await scrape(server)
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await call.raw("{not json")
            await call.raw('{"event": "novelty"}')
            await call.speak(MULAW[:4800])
            await link.send_audio(b"\x10\x20" * 32000)
            await link.send(type="checkpoint", name="cut")
            await asyncio.sleep(0.2)
            during = await scrape(server)
            await link.send(type="clear")
            await link.wait_for("clear")
            await asyncio.sleep(0.1)
            await call.hangup()
            await link.wait_for("stop")
        await asyncio.sleep(0.1)
        after = await scrape(server)
    assert 0 == before["telephony_calls_active", "twilio"] == after["telephony_calls_active", "twilio"]
    assert 1 == during["telephony_calls_active", "twilio"] == during["telephony_call_slots",]
    assert 1 == during["telephony_service_calls", "agent", "serving"]
    assert 1.0 < during["telephony_playout_queued_seconds", "twilio"] < 2.0
    assert 0 == after["telephony_playout_queued_seconds", "twilio"]
    assert (0, 1) == (during["telephony_calls_total", "twilio"], after["telephony_calls_total", "twilio", "caller_hangup"])
    assert 1 == after["telephony_call_seconds_count", "twilio"] == after["telephony_call_setup_seconds_count", "twilio"]
    for now in (during, after):
        assert 1 == now["telephony_bad_frames_total", "twilio"]
        assert 1 == now["telephony_unknown_frames_total", "twilio"]
        assert now["telephony_added_latency_seconds_count", "twilio", "to_service"] >= 2
        assert 32 <= now["telephony_frames_total", "twilio", "in"] <= 40
    assert 1 == after["telephony_checkpoints_total", "twilio", "cleared"]
    assert 1 == after["telephony_time_to_silence_seconds_count", "twilio"]
    assert after["telephony_time_to_silence_seconds_sum", "twilio"] < 0.1
    for name in {
        name for name in during.names if name.endswith(("_total", "_count", "_bucket")) and name.startswith("telephony")
    }:
        for sample in during.of(name):
            assert sample.value <= after[name, *sample.labels.values()], f"{name} went backwards"


async def test_live_audio_of_a_service_is_timed(launch: Launch) -> None:
    async with RecordingService() as service:
        mulaw = {"encoding": "mulaw", "sample_rate": 8000}
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url, "media_format": mulaw}}, admin=ADMIN)
        async with Plivo(stream_url(server, "plivo")) as call:
            link = await service.connected()
            for at in range(0, 160 * 40, 160):
                await link.send_audio(MULAW[at : at + 160])
                await asyncio.sleep(0.02)
            now = await scrape(server)
            await call.hangup()
    assert now["telephony_added_latency_seconds_count", "plivo", "to_caller"] >= 2
    assert now["telephony_added_latency_seconds_bucket", "plivo", "to_caller", "0.1"] >= 2


async def test_refusals_and_failed_authentication_are_told_apart(launch: Launch) -> None:
    account = {"kind": "twilio_media_streams", "auth_token": "0123456789abcdef0123456789abcdef"}
    open_ = {"kind": "twilio_media_streams", "auth": "none"}
    server = await launch(
        providers={"signed": account, "open": open_},
        secret="s" * 32,
        public_url="https://voice.example.com",
        max_calls=1,
        admin=ADMIN,
    )
    base = f"http://127.0.0.1:{server.port}"
    async with aiohttp.ClientSession() as http:
        for _ in range(3):
            assert 403 == (await http.post(f"{base}/signed/answer", data={"CallSid": "CA1"})).status
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
        assert 403 == (await http.get(f"{base}/signed/stream/abc", headers=upgrade)).status
        for number in (1, 2):
            assert 200 == (await http.post(f"{base}/open/answer", data={"CallSid": f"CA{number}"})).status
        now = await scrape(server)
    assert 3 == now["telephony_auth_failures_total", "signed", "signature"]
    assert 1 == now["telephony_auth_failures_total", "signed", "token"]
    assert 1 == now["telephony_refusals_total", "open", "max_calls"]
    assert 0 == now["telephony_refusals_total", "signed"]


async def test_o1_no_new_call_while_the_loop_is_late(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await launch(admin=ADMIN)
    monkeypatch.setattr(server.watchdog, "overloaded", lambda: True)
    async with aiohttp.ClientSession() as http:
        answer = await http.post(f"http://127.0.0.1:{server.port}/twilio/answer", data={"CallSid": "CA1"})
        assert "<Stream" not in await answer.text()
    assert 1 == (await scrape(server))["telephony_refusals_total", "twilio", "loop_lag"]


async def test_a_service_that_goes_and_comes_back(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}}, admin=ADMIN)
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await service.connected()
            await call.speak(MULAW[:1600])
            await service.down()
            await asyncio.sleep(0.2)
            away = await scrape(server)
            await service.up()
            await asyncio.sleep(0.5)
            await call.speak(MULAW[:1600])
            back = await scrape(server)
            await call.hangup()
    assert 1 == away["telephony_service_calls", "agent", "away"] == away["telephony_service_losses_total", "agent"]
    assert 0 == away["telephony_service_recovery_seconds_count", "agent"]
    assert 1 == back["telephony_service_calls", "agent", "serving"] == back["telephony_service_recovery_seconds_count", "agent"]
    assert 0.1 < back["telephony_service_recovery_seconds_sum", "agent"] < 2
    assert 0 == back["telephony_dropped_seconds_total", "twilio"]


async def test_a_connection_that_never_starts(launch: Launch) -> None:
    server = await launch(admin=ADMIN)
    async with aiohttp.ClientSession() as http, http.ws_connect(stream_url(server, "twilio")) as socket:
        await asyncio.sleep(0.05)
        assert 1 == (await scrape(server))["telephony_connections_pending",]
        await socket.close()
    await asyncio.sleep(0.1)
    now = await scrape(server)
    assert (1, 0) == (now["telephony_unstarted_total", "twilio"], now["telephony_calls_total",])


async def test_what_is_scraped_is_what_is_declared(launch: Launch) -> None:
    server = await launch(admin=ADMIN)
    told = {name for name in (await scrape(server)).names if not name.startswith("process_")}
    assert told <= metrics.names()
    assert {"telephony_build_info", "telephony_event_loop_lag_seconds_bucket", "telephony_call_slots_limit"} <= told
    assert metrics.names() - told <= {
        name
        for name in metrics.names()
        if not name.startswith(("telephony_call_slots", "telephony_event_loop", "telephony_build"))
    }


def test_s12_labels_are_capped() -> None:
    sums = Sums()
    for number in range(MOST_SERIES * 3):
        sums.count("telephony_faults", "twilio", f"code-{number}")
    faults = sums.counts["telephony_faults"]
    assert MOST_SERIES + 1 == len(faults)
    assert 2 * MOST_SERIES == faults["twilio", "other"]


async def test_a_scrape_in_the_format_of_openmetrics() -> None:
    standing = Standing(1, 500, 0, draining=True, tls_not_after=1.5e9, reloads={"applied": 2})
    made = Metrics(Totals(), ["twilio"], list, lambda: standing, Watchdog(None))  # type: ignore[arg-type]
    text, content_type = made.text("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    plain = Scrape(made.text()[0].decode())
    assert 1.5e9 == plain["telephony_tls_expiry_timestamp_seconds",]
    assert 2 == plain["telephony_reloads_total", "applied"]
    assert 1 == plain["telephony_draining",]


def test_added_latency_is_seen_from_a_fifth_of_a_millisecond_to_a_second() -> None:
    assert (0.0002, 1.0) == (LATENCY_SECS[0], LATENCY_SECS[-1])
    assert [*LATENCY_SECS] == sorted({*LATENCY_SECS})


# --- what asks for them ---


def asked(expression: str) -> tuple[set[str], set[str]]:
    """(metrics, labels) in a PromQL expression."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    labels = {label for inside in re.findall(r"\{(.*?)\}", text) for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)}
    text = re.sub(r"\{.*?\}|\[.*?\]", "", text)
    grouped = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"
    labels |= {label.strip() for inside in re.findall(grouped, text) for label in inside.split(",") if label.strip()}
    text = re.sub(grouped, "", text)
    words = re.findall(r"(?<![\w.$])[a-zA-Z_:][\w:]*(?!\s*\()\b(?!\s*\()", text)
    return {*words} - {"and", "or", "unless", "bool", "offset"}, labels


def expressions() -> Iterator[Any]:
    for group in yaml.safe_load((CONFIG / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield pytest.param(rule["expr"], id=rule["alert"])
    for panel in json.loads((CONFIG / "grafana-dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            yield pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")


@pytest.mark.parametrize("expression", [*expressions()])
def test_dashboard_and_alerts_ask_for_what_there_is(expression: str) -> None:
    standing = Standing(0, 500, 0, draining=False, tls_not_after=None)
    made = Metrics(Totals(), [], list, lambda: standing, Watchdog(None))  # type: ignore[arg-type]
    known = metrics.names() | Scrape(made.text()[0].decode()).names | {"up"}
    names, labels = asked(expression)
    assert names
    assert set() == names - known
    assert set() == labels - LABELS
    assert expression.count("(") == expression.count(")")


def test_names_are_found_in_expressions() -> None:
    expression = 'histogram_quantile(0.99, sum by (le, x) (rate(a_bucket{b="c{d}", e=~"f"}[5m]))) / on (g) h:i - time() > 5 * 60'
    assert ({"a_bucket", "h:i"}, {"le", "x", "b", "e", "g"}) == asked(expression)


def test_everything_that_is_measured_is_on_the_dashboard() -> None:
    text = (CONFIG / "grafana-dashboard.json").read_text()
    missing = [name for name in (*COUNTERS, *HISTOGRAMS, *GAUGES) if not re.search(rf"\b{name}(_total|_bucket)?\b", text)]
    assert [] == missing


def test_every_alert_has_a_severity_and_says_what_is_wrong() -> None:
    (group,) = yaml.safe_load((CONFIG / "alerts.yaml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(names) == len({*names})
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "warn")
        labels = {*re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])}
        kept = asked(rule["expr"])[1]
        assert labels <= kept | {"instance"}, "a label that the expression has aggregated away"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_alert_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", CONFIG / "alerts.yaml"], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_prometheus_takes_the_metrics(launch: Launch) -> None:
    server = await launch(admin=ADMIN)
    assert server.admin is not None
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.speak(MULAW[:1600])
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{server.admin.port}/metrics") as response:
            text = await response.read()
        await call.hangup()
    process = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    complaints, _ = await process.communicate(text)
    assert (0, "") == (process.returncode, complaints.decode())
