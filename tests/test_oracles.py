"""The oracles themselves: what must not pass, does not."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import structlog

from tests.conftest import Launch
from tests.oracles import Watch, loud, private, watching
from tests.processes import gateway


def test_an_error_is_seen_however_logging_is_set_up_and_may_be_allowed() -> None:
    for setup in (structlog.reset_defaults, structlog.testing.capture_logs().__enter__):
        with watching() as watch:
            setup()
            structlog.get_logger("a").bind(session="s").error("service_lost", why="x")
            structlog.get_logger("a").warning("service_slow")
        structlog.reset_defaults()
        (wrong,) = watch.wrong(())
        assert "service_lost" in wrong
        assert [] == watch.wrong({"service_lost"})


def test_what_libraries_complain_of_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    async def forget() -> None:
        asyncio.get_running_loop().create_future().set_exception(ValueError("forgotten"))

    with watching() as watch:
        asyncio.run(forget())
        logging.getLogger("aiohttp.server").error("Error handling request")
    assert ["aiohttp.server", "asyncio"] == sorted(line.split(": ")[1] for line in watch.wrong(()))
    assert "never retrieved" in "".join(watch.wrong(()))
    caplog.clear()


@pytest.mark.parametrize("said", ["call of +14155550123 went wrong", "wss://a.example/twilio/stream/" + "aB3-" * 20])
def test_private_words_are_masked_by_our_log_and_seen_if_not(said: str) -> None:
    assert private(said)
    with watching() as watch:
        structlog.get_logger("a").warning("odd", why=said)
    assert [] == watch.wrong(()), "the log masks it"


def test_a_configured_secret_is_seen() -> None:
    watch = Watch()
    watch.keep_secret({"providers": {"a": {"auth_token": ["0123456789abcdef"], "kind": "x"}}, "secret": "fedcba9876543210"})
    assert {"0123456789abcdef", "fedcba9876543210"} == watch.secrets
    watch.entries.append(("warning", {"event": "odd", "why": "the key 0123456789abcdef is wrong"}))
    (wrong,) = watch.wrong(())
    assert "private" in wrong


@pytest.mark.allow_errors("service_lost")
async def test_every_test_with_a_gateway_is_judged(launch: Launch, oracle: Watch) -> None:
    await launch()
    assert "listening" in {entry["event"] for _, entry in oracle.entries}


def test_a_process_s_log_is_read_line_by_line() -> None:
    good = '{"level":"info","event":"listening"}\n{"level":"error","event":"service_lost"}\n'
    assert [] == loud(good, {"service_lost"})
    assert 1 == len(loud(good))
    assert 2 == len(loud(good + "Task exception was never retrieved\n"))


async def test_a_process_that_logs_an_error_does_not_pass(tmp_path: Path) -> None:
    document = {
        "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
        "services": {"echo": {"kind": "echo"}},
        "routes": [{"service": "echo"}],
    }
    program = "import sys; print('not a line', file=sys.stderr)"

    async def run() -> None:
        async with gateway(tmp_path, document, program=program) as running:
            assert running.port
            assert running.rss_kib > 10_000
            assert running.descriptors > 5

    with pytest.raises(AssertionError, match="not a line"):
        await run()
