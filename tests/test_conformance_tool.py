"""`telephony-gateway conformance`: right services pass, and each flaw fails the check that is meant for it."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from click.testing import CliRunner

from gateway.conformance import CHECKS, PCM_16K, SCENES, Report, examine
from gateway.conformance.command import examine as command
from gateway.media import MULAW_8K
from tests.doubles import EchoService20
from tests.doubles.flawed import FlawedService

README = Path(__file__).parent.parent / "README.md"
QUICK: dict[str, Any] = {"at_once": 12, "calls": 6, "idle_secs": 0.6}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The services' library logs each handler that dies, which here is the point."""
    logger = logging.getLogger("websockets")
    before, logger.level = logger.level, logging.CRITICAL + 1
    yield
    logger.setLevel(before)
    gc.collect()


def failures(report: Report) -> dict[str, str]:
    return {result.check: result.detail for result in report.results if result.outcome == "failed"}


@pytest.mark.parametrize("framed", [False, True], ids=["raw", "framed"])
async def test_a_right_service_passes_every_check_that_applies(framed: bool) -> None:
    async with FlawedService(framed=framed, token="secret") as service:
        report = await examine(service.url, formats=(PCM_16K, MULAW_8K), authorization="secret", **QUICK)
    assert {} == failures(report)
    assert report.ok
    assert ("framed" if framed else "raw") == report.mode
    left = {result.check for result in report.results if result.outcome == "not applicable"}
    framed_only = {check.name for check in CHECKS if check.title.startswith("framed:")}
    assert {"pause", "resume-flow", "close-codes"} | (set() if framed else framed_only) == left


async def test_the_echo_of_twenty_lines_passes() -> None:
    async with EchoService20() as service:
        report = await examine(service.url, **QUICK)
    assert {} == failures(report)


async def test_the_ten_line_service_of_the_readme_passes() -> None:
    found = re.search(r"<!-- service -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(found[1].replace("asyncio.run(main())", ""), names)  # noqa: S102
    async with websockets.serve(names["answer"], "127.0.0.1", 0) as server:
        report = await examine(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", **QUICK)
    assert {} == failures(report)


CONTROLS = ("formats-asked", "unknown-type", "dtmf")
"""Scenes that a flaw of another kind must pass."""

ALONE = {
    "going-away", "cut", "mass-hangup", "rubbish-text", "rubbish-json", "rubbish-binary", "before-start", "stop-reasons", "ready",
}  # fmt: skip
"""Flaws after which the whole service is gone, or that hold up every call."""

FRAMED = {check.name for check in CHECKS if check.title.startswith("framed:")}

UNSEEN = {"stop-at-once", "stop-speaking", "sequence", "resume-flow"}
"""What fails them would fail others before."""

FLAWS = [check.name for check in CHECKS if check.name not in UNSEEN]

ALSO = {
    "no-redirect": {"connect"},
    "fault": {"accepts"},
    "close-codes": {"idle"},
    "resume": {"reconnect"},
}
"""Flaws that are, rightly, two."""


def test_every_check_has_a_flaw_and_every_scene_its_checks() -> None:
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names)) >= 50
    assert {check for checks in SCENES.values() for check in checks} <= set(names)
    assert UNSEEN <= set(names)
    assert all(check.advice.endswith((".", "}")) or check.advice.endswith('"') for check in CHECKS)


@pytest.mark.parametrize("flaw", FLAWS)
async def test_each_flaw_fails_the_check_that_is_meant_for_it_and_no_other(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [name for name, decided in SCENES.items() if flaw in decided]
    controls = () if flaw in ALONE else CONTROLS
    report = await examine_flawed(flaw, monkeypatch, scenes=[*scenes, *controls], at_once=10)
    assert {flaw} | ALSO.get(flaw, set()) == set(failures(report)), failures(report)
    assert not report.ok
    assert all(result.advice for result in report.results if result.outcome == "failed")


ALSO_ELSEWHERE = {"burst": {"gap"}, "resume": {"replaced"}}
"""Flaws that another scene meets too: a filled hole is a burst, and a newer connection says resume."""


@pytest.mark.long
@pytest.mark.parametrize("flaw", [flaw for flaw in FLAWS if flaw not in ALONE])
async def test_each_flaw_passes_all_the_other_checks(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = await examine_flawed(flaw, monkeypatch)
    assert {flaw} | ALSO.get(flaw, set()) | ALSO_ELSEWHERE.get(flaw, set()) == set(failures(report)), failures(report)


async def examine_flawed(flaw: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Report:
    monkeypatch.setattr("gateway.playout.MOST_PENDING", 50)
    options: dict[str, Any] = {"calls": 6, "idle_secs": 0.6, "authorization": "secret"} | more
    if flaw in ("concurrent", "isolation"):
        options["calls"] = 20
    if flaw in ("idle", "close-codes", "pause"):
        options["idle_secs"] = 3.0 if flaw != "pause" else 4.0
    if flaw in ALONE:
        options["only"] = {flaw} | ALSO.get(flaw, set())
    if flaw == "close-codes":
        options["scenes"] = ["idle"]
    if flaw == "format":
        options["formats"] = (PCM_16K, MULAW_8K)
    async with FlawedService(flaw, framed=flaw in FRAMED, token="secret", greeting=flaw != "isolation") as service:
        return await examine(service.url, **options)


async def test_a_service_that_obeys_a_pause_passes_it() -> None:
    async def reader(call: Any) -> None:
        start = json.loads(await call.recv())
        if start["media_format"] is None:
            return
        for _ in range(8):
            await call.send(bytes(8000 * 10))
        async for message in call:
            if isinstance(message, str) and json.loads(message)["type"] == "flow":
                break
        async for _ in call:
            pass

    async with websockets.serve(reader, "127.0.0.1", 0, compression=None) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        report = await examine(url, formats=(MULAW_8K,), only=["pause", "resume-flow"], idle_secs=2.0)
    assert ["passed", "passed"] == [result.outcome for result in report.results]


async def test_nothing_listens_there() -> None:
    report = await examine("ws://127.0.0.1:9/", **QUICK)
    assert report.mode is None
    assert {"connect"} == set(failures(report))
    assert "nothing listens there" in failures(report)["connect"]
    assert len(CHECKS) == len(report.results)


def test_the_command_prints_json_lines_when_piped_and_fails_with_1() -> None:
    result = CliRunner().invoke(command, ["--url", "ws://127.0.0.1:9"])
    assert 1 == result.exit_code
    *lines, summary = (json.loads(line) for line in result.output.splitlines())
    assert [check.name for check in CHECKS] == [line["check"] for line in lines]
    assert {"url": "ws://127.0.0.1:9", "mode": None, "ok": False, "passed": 0, "failed": 1} | {
        "not_applicable": len(CHECKS) - 1
    } == summary


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://127.0.0.1:9"], "ws://127.0.0.1:9000"),
        (["--url", "ws://127.0.0.1:9", "--format", "opus/48000"], "mulaw/8000"),
        (["--url", "ws://127.0.0.1:9", "--format", "mulaw/many"], "mulaw/8000"),
        (["--url", "ws://127.0.0.1:9", "--only", "everything"], "connect"),
        ([], "--url"),
    ],
)
def test_wrong_usage_is_told_with_an_example(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert 2 == result.exit_code
    assert words in result.output
    assert "Traceback" not in result.output
