"""Requests signed as carriers sign them: the simulator on a gateway that checks, and the two commands for a proxy's faults."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gateway import cli
from gateway.provider import HttpRequest
from gateway.signing import UPGRADE, Signing, as_received
from gateway.simulator import simulate
from tests.conftest import Launch
from tests.test_doctor import SECRET, SIGNED, TOKEN, document, free_port

PUBLIC = "https://voice.example.com/gw"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps(document(8080, public_url=PUBLIC)))
    return file


def command(*arguments: str) -> tuple[int, Any]:
    result = CliRunner().invoke(cli.main, [*arguments])
    assert SECRET not in result.output
    assert TOKEN not in result.output
    return result.exit_code, json.loads(result.output) if result.output.startswith("{") else result.output


@pytest.mark.parametrize("name", [*SIGNED])
async def test_a_simulated_carrier_signs_over_the_public_url_and_dials_another_address(launch: Launch, name: str) -> None:
    server = await launch(**document(0, public_url=PUBLIC))
    provider, reached = server.providers[name], f"http://127.0.0.1:{server.port}"
    report = await simulate(
        type(provider), url=f"{reached}/{name}/answer", hold_secs=0.2, say=["hello"], sign=Signing(provider, PUBLIC, reached)
    )
    assert report.ok, report.errors
    unsigned = await simulate(type(provider), url=f"{reached}/{name}/answer")
    assert "not signed" in unsigned.errors[0]
    assert "--config FILE --provider NAME" in unsigned.errors[0]


async def test_simulate_takes_the_account_from_a_configuration(launch: Launch, tmp_path: Path) -> None:
    port = free_port()
    await launch(**document(port, public_url=PUBLIC))
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps(document(port, public_url=PUBLIC)))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "simulate", "--config", str(file), "--provider", "plivo", "--hold", "0.1",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    report = json.loads(out)
    assert (0, [], True) == (process.returncode, report["errors"], report["ok"])
    assert "echo" in report


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give KIND and --url"),
        (["--provider", "twilio"], "give that with --config"),
        (["--config", "{}"], "--provider must be one of twilio, relay, plivo"),
        (["--config", "{}", "--provider", "nobody"], "--provider must be one of twilio, relay, plivo"),
        (
            ["plivo_audio_streaming", "--config", "{}", "--provider", "twilio"],
            "is twilio_media_streams, not plivo_audio_streaming",
        ),
        (["--config", "{}", "--provider", "twilio", "--url", "ws://127.0.0.1:1/twilio/stream"], "must end in /twilio/answer"),
    ],
)
def test_simulate_says_what_is_missing(path: Path, arguments: list[str], sentence: str) -> None:
    code, output = command("simulate", *(argument.format(path) for argument in arguments))
    assert 2 == code
    assert sentence in " ".join(output.split())


@pytest.mark.parametrize("name", [*SIGNED])
def test_what_sign_prints_verify_finds_good(path: Path, name: str) -> None:
    account = ["--config", str(path), "--provider", name]
    for request in (
        [f"/{name}/answer", "-F", "CallSid=CA1", "-F", "From=+15550100001"],
        [f"{PUBLIC}/{name}/answer?x=1"],
        [f"wss://voice.example.com/gw/{name}/stream/abc"],
        [f"/{name}/stream/abc", "--upgrade"],
    ):
        code, headers = command("sign", *account, *request)
        assert 0 == code
        given = [part for key, value in headers.items() for part in ("-H", f"{key}: {value}")]
        code, verdict = command("verify", *account, *request, *given)
        assert (0, True) == (code, verdict["good"])
        assert "voice.example.com/gw" in verdict["signed"]
        assert "" == verdict["hint"]
        code, verdict = command("verify", *account, request[0] + "x", *request[1:], *given)
        assert (1, False) == (code, verdict["good"])
        assert any("voice.example.com/gw" in url for url in verdict["tried"])
        assert "gives this signature" in verdict["why"]


def test_verify_tells_which_form_fits_and_keeps_tokens_to_itself(path: Path) -> None:
    token = "t" * 60
    account = ["--config", str(path), "--provider", "plivo"]
    url = f"wss://voice.example.com/gw/plivo/stream/{token}"
    _, headers = command("sign", *account, url)
    given = [part for key, value in headers.items() for part in ("-H", f"{key}: {value}")]
    code, verdict = command("verify", *account, url, *given)
    assert (0, "http://voice.example.com/gw/plivo/stream/…") == (code, verdict["signed"])
    code, verdict = command("verify", *account, url.replace("/gw", ""), *given)
    assert 1 == code
    assert token not in str(verdict)
    assert f"below {PUBLIC} only" in verdict["hint"]


def test_a_request_elsewhere_is_signed_as_that() -> None:
    class Account:
        def sign(self, request: Any) -> dict[str, str]:
            return {"signed": request.url}

    sign = Signing(Account(), PUBLIC, "http://127.0.0.1:8080")  # type: ignore[arg-type]
    for given, signed, sent in (
        (f"{PUBLIC}/t/answer", f"{PUBLIC}/t/answer", "http://127.0.0.1:8080/t/answer"),
        ("http://127.0.0.1:8080/t/answer", f"{PUBLIC}/t/answer", "http://127.0.0.1:8080/t/answer"),
        ("wss://voice.example.com/gw/t/stream/x", "wss://voice.example.com/gw/t/stream/x", "ws://127.0.0.1:8080/t/stream/x"),
        ("https://other.example.com/t", "https://other.example.com/t", "https://other.example.com/t"),
    ):
        request = sign(HttpRequest("GET", given, UPGRADE))
        assert (signed, sent) == (request.headers["signed"], request.url)


def test_a_form_of_a_get_is_in_the_query() -> None:
    request = as_received(HttpRequest("GET", "https://a/x", {}, {"a": "1 2"}), "https://a/x?b=3")
    assert ("https://a/x?b=3&a=1+2", {"b": "3", "a": "1 2"}) == (request.url, dict(request.form))
