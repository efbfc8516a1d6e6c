"""The command line teaches, fails with a sentence, and speaks JSON when piped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import providers
from gateway import cli

COMMANDS = sorted(cli.main.commands)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches(command: str) -> None:
    result = CliRunner().invoke(cli.main, [*command.split(), "--help"])
    assert 0 == result.exit_code
    assert len(result.output.splitlines()) > 5
    assert all(len(line) <= 112 for line in result.output.splitlines())


def test_check_says_what_is_good_and_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "providers: {twilio: {kind: twilio_media_streams, auth: none}}\nservices: {e: {kind: echo}}\nroutes: [{service: e}]\n"
    )
    good = CliRunner().invoke(cli.main, ["check", str(path)])
    assert (0, f"{path}: good: 1 provider, 1 service, 1 route\n") == (good.exit_code, good.output)
    assert good.output == CliRunner().invoke(cli.main, ["check", "--config", str(path)]).output
    for wrong in (["check"], ["check", str(path), "-c", str(path)]):
        assert 2 == CliRunner().invoke(cli.main, wrong).exit_code
    path.write_text(
        "providers: {twilio: {kind: twilio_media_streams, auth: none}}\nservices: {e: {knid: echo}}\nroutes: [{service: x}]\n"
    )
    bad = CliRunner().invoke(cli.main, ["check", str(path)])
    assert 78 == bad.exit_code
    assert [f"{path}:2:", f"{path}:3:"] == sorted({line[: len(str(path)) + 3] for line in bad.output.splitlines()})
    missing = CliRunner().invoke(cli.main, ["check", str(tmp_path / "nothing.yaml")])
    assert 78 == missing.exit_code
    assert "nothing.yaml" in missing.output
    assert "Traceback" not in missing.output


def test_check_tells_warnings_and_is_strict_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "providers: {twilio: {kind: twilio_media_streams, auth: none}}\nservices: {e: {kind: echo}}\n"
        "routes: [{service: e}, {service: e}]\n"
    )
    lax = CliRunner().invoke(cli.main, ["check", str(path)])
    warning = f"{path}:3:24: warning: routes[1]: no call comes this far, route-0 takes them all; move it up, or take it out\n"
    assert (0, warning) == (lax.exit_code, lax.stderr)
    assert f"{path}: good: 1 provider, 1 service, 2 routes, with 1 warning\n" == lax.stdout
    strict = CliRunner().invoke(cli.main, ["check", "--strict", str(path)])
    assert (78, warning, "") == (strict.exit_code, strict.stderr, strict.stdout)
    path.write_text(path.read_text().replace(", {service: e}]", "]"))
    assert 0 == CliRunner().invoke(cli.main, ["check", "--strict", str(path)]).exit_code


def test_every_provider_is_listed_and_every_word_of_the_vocabulary_too() -> None:
    rows = json.loads(CliRunner().invoke(cli.main, ["providers"]).output)
    assert providers.names() == sorted(rows)
    for kind, row in rows.items():
        accepted = providers.load(kind)
        assert {cls.__name__ for cls in accepted.emits} == {"".join(map(str.title, word.split("_"))) for word in row["tells"]}
    table = CliRunner().invoke(cli.main, ["providers", "--markdown"]).output
    assert all(f"`{kind}`" in table for kind in providers.names())


def test_simulate_names_the_kinds_and_refuses_what_is_no_recording(tmp_path: Path) -> None:
    unknown = CliRunner().invoke(cli.main, ["simulate", "twillio", "--url", "ws://127.0.0.1:9/x"])
    assert 2 == unknown.exit_code
    assert "twilio_media_streams" in unknown.output
    text = tmp_path / "words.wav"
    text.write_text("not a recording")
    broken = CliRunner().invoke(
        cli.main, ["simulate", "plivo_audio_streaming", "--url", "ws://127.0.0.1:9/x", "--audio", str(text)]
    )
    assert 1 == broken.exit_code
    assert "words.wav" in broken.output
    assert "Traceback" not in broken.output


def test_simulate_against_nothing_says_what_to_do() -> None:
    result = CliRunner().invoke(cli.main, ["simulate", "plivo_audio_streaming", "--url", "http://127.0.0.1:9/plivo/answer"])
    assert 1 == result.exit_code
    (report,) = (json.loads(line) for line in result.output.splitlines())
    assert not report["ok"]
    assert "nothing listens there" in report["errors"][0]
