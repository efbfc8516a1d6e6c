"""Logs: one safe line per event, and nothing private in any of them."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from gateway import logs
from gateway.events import Dtmf, Start
from gateway.media import MULAW_8K

NUMBER, TOKEN = "+14155550123", "tok-CANARY-7f3a"


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""  # stdout belongs to commands
    return captured.err.splitlines()


def test_json_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()

    structlog.get_logger().info("stream_ended", frames_in=3, result="ok")

    (line,) = lines(capsys)
    event = json.loads(line)
    assert list(event) == ["timestamp", "level", "event", "frames_in", "result"]
    assert event["timestamp"].endswith("Z")
    assert (event["level"], event["event"], event["frames_in"]) == ("info", "stream_ended", 3)


def test_readable_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    logs.configure()
    structlog.get_logger().info("stream_ended", frames_in=3)
    assert "\x1b[" in terminal.getvalue()

    terminal.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    logs.configure()
    structlog.get_logger().info("stream_ended", frames_in=3, reason="a b")
    assert terminal.getvalue().endswith('info    stream_ended frames_in=3 reason="a b"\n')


def test_level_filters(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="warning")

    structlog.get_logger().info("unseen")
    structlog.get_logger().warning("seen")
    logging.getLogger("aiohttp.server").info("unseen")

    assert [json.loads(line)["event"] for line in lines(capsys)] == ["seen"]


def test_libraries_take_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)

    logging.getLogger("aiohttp.server").error("Error for %s with Authorization: Bearer %s", NUMBER, TOKEN)
    logging.getLogger("aiohttp.access").info("GET /twilio/stream/%s", TOKEN)

    (line,) = lines(capsys)
    first = json.loads(line)
    assert (first["event"], first["logger"], first["level"]) == ("library_message", "aiohttp.server", "error")
    assert "+1415•••0123" in first["message"]
    assert TOKEN not in first["message"]


def test_a_library_that_logs_wrongly_is_still_heard(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    (handler,) = (handler for handler in logging.getLogger().handlers if type(handler).__module__ == "gateway.logs")

    handler.emit(logging.makeLogRecord({"name": "asyncio", "msg": "broken %s %s", "args": ("arguments",)}))

    (line,) = lines(capsys)
    assert json.loads(line)["message"] == "broken %s %s"


def test_configuring_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    logs.configure(json=True)

    logging.getLogger("asyncio").warning("once")

    assert len(lines(capsys)) == 1


def test_exceptions_are_one_line_of_json_and_scrubbed(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=True)
    try:
        raise ValueError(f"bad number {NUMBER}\nsecret={TOKEN}")
    except ValueError:
        structlog.get_logger().exception("call_failed")

    (line,) = lines(capsys)
    assert "ValueError" in json.loads(line)["exception"]
    assert NUMBER not in line
    assert TOKEN not in line


def test_a_traceback_on_a_terminal_can_do_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=False, colors=False)
    try:
        raise ValueError("a\x1b[2Jb\u202ec\x85d")
    except ValueError:
        structlog.get_logger().exception("call_failed")

    written = capsys.readouterr().err
    first, *rest = written.removesuffix("\n").split("\n")
    assert first.endswith("call_failed")
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


@pytest.mark.parametrize(
    ("number", "masked"),
    [
        ("+14155550100", "+1415•••0100"),
        ("14155550100", "1415•••0100"),
        ("+919876543210", "+9198•••3210"),
        ("+1 (415) 555-0100", "+1415•••0100"),
        ("0301234567", "03•••67"),
        ("12345678", "12•••78"),
        ("112", "•••"),
        ("sip:alice@example.com", "sip:•••@example.com"),
        ("sip:+14155550100@example.com:5060;user=phone", "sip:•••@example.com"),
        ("sip:bot@14155550100", "sip:•••@•••"),
        ("alice", "•••"),
        ("anonymous", "anonymous"),
        ("", ""),
    ],
)
def test_mask_number(number: str, masked: str) -> None:
    assert masked == logs.mask_number(number)


def cleaned(**values: Any) -> dict[str, Any]:
    return dict(logs.redact(None, "info", values))


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "auth_token",
        "authToken",
        "X-Twilio-Signature",
        "X-Plivo-Signature-V2",
        "x-plivo-signature-v3",
        "X-Plivo-Signature-Ma-V3",
        "X-Plivo-Signature-V3-Nonce",
        "signing_key",
        "secret",
        "Authorization",
        "payload",
        "tokens",
        "password",
        "api_key",
    ],
)
def test_secrets_are_masked_by_key(key: str) -> None:
    assert {key: "***"} == cleaned(**{key: TOKEN})
    assert {"request": {key: "***"}} == cleaned(request={key: TOKEN})
    assert {"requests": [{key: "***"}]} == cleaned(requests=[{key: [TOKEN]}])
    assert {key: None} == cleaned(**{key: None})


@pytest.mark.parametrize("key", ["caller", "called", "from", "to", "From", "To", "caller_number"])
def test_numbers_are_masked_by_key(key: str) -> None:
    assert {key: "+1415•••0123"} == cleaned(**{key: NUMBER})


@pytest.mark.parametrize("key", ["digits", "text", "transcript", "heard", "parameters", "custom_parameters", "customParameters"])
def test_words_and_digits_show_their_length_only(key: str) -> None:
    assert {key: "<4>"} == cleaned(**{key: "4711"})


def test_values_of_any_kind_become_plain() -> None:
    start = Start(stream_id="MZ1", call_id="CA1", caller=NUMBER, media_format=MULAW_8K, parameters={"pin": "4711"})

    event = cleaned(a=start, b=Dtmf("4711"), c=b"abc", d=float("nan"), e={1}, f=1 << 5000, g=object, h=ValueError(NUMBER))

    assert (event["a"]["caller"], event["a"]["parameters"]) == ("+1415•••0123", "<1>")
    assert event["b"] == {"type": "Dtmf", "digits": "<4>", "ref": None}
    assert (event["c"], event["d"], event["e"], event["f"]) == ("<3 bytes>", "nan", [1], "•••")
    assert event["h"] == "ValueError: +1415•••0123"
    json.dumps(event, allow_nan=False)


def test_a_value_that_can_not_be_shown_breaks_nothing() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

        __repr__ = __str__

    loop: list[Any] = []
    loop.append(loop)
    assert cleaned(a=Broken())["a"] == "<Broken>"
    assert "…" in json.dumps(cleaned(a=loop), ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        f"call from {NUMBER}",
        f"wss://host/call?from={NUMBER}&x=1",
        f"wss://host/call?from={NUMBER.replace('+', '%2B')}",
        f"tel:{NUMBER[1:]}",
        f"Authorization: Bearer {TOKEN}",
        f"https://host/twilio/stream/{TOKEN}",
        f"wss://host/call?token={TOKEN}&x=1",
        f'{{"auth_token": "{TOKEN}"}}',
        f"authToken='{TOKEN}'",
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_canaries_never_appear(text: str, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(json=as_json, colors=False)
    log = structlog.get_logger()

    log.info("said", reason=text)
    log.info(text)
    log.info("nested", value={"reason": [text], text: 1})
    logging.getLogger("any").warning("%s", text)

    written = "\n".join(lines(capsys))
    assert written.count("\n") == 3
    assert NUMBER.removeprefix("+") not in written
    assert TOKEN not in written


SIGNATURE = "kSZb9q0L7p3+w/CANARYsigned0Zx="
PRIVATE = [
    (TOKEN, ["GET /twilio/stream/{} failed", "wss://a.example/x/stream/{}?a=1", "https%3A%2F%2Fa%2Fstream%2F{}%3Fa"]),
    (SIGNATURE, ["X-Twilio-Signature: {}", "'X-Plivo-Signature-V3': '{}'", "x-plivo-signature-ma-v3={}"]),
    (SIGNATURE, ["X-Plivo-Signature-V3: abc,{},def", "X-Plivo-Signature-V3: abcdefghijklmnop, {}", "signature={}&a=1"]),
]
PRIVATE_IN_ERRORS = [
    ("4155550123", ["no such number: {}", "number 0{} is busy", "(tel {})", "to=+1{}", "x_{}_y", "a-{}-b", "sip:{}@host", "{}."]),
    ("55501234", ["no such number: {}", "+{}", "{}\nagain"]),
    ("00112233445566778899", ["too long: {}"]),
    ("4711", ["Dtmf(digits='{}', ref=None)", '{{"digit": "{}"}}', "digits={} are not sent", "parameters={{'pin': '{}'}}"]),
    (
        "4711",
        ['customParameters: {{"a": {{}}, "pin": "{}"}}', "Start(call_id='CA1', parameters={{'a': {{}}, 'b': '{}'}})"],
    ),
    ("my mother's name", ['{{"voicePrompt": "{}"}}', 'Transcript(text="{}", final=True)', '"handoffData": "a \\" {}"']),
]


def in_every_place(key: str, text: str) -> str:
    """What is written of `text`, alone, inside of other things, and as an exception."""
    places = [text, [text], {"inner": [{key: text}]}, (text,), {text: 1}]
    return "\n".join(json.dumps(cleaned(**{key: place}), ensure_ascii=False) for place in places)


@pytest.mark.parametrize(("canary", "text"), [(canary, text) for canary, texts in PRIVATE for text in texts])
@pytest.mark.parametrize("key", ["reason", "error", "url", "path", "event"])
def test_stream_tokens_and_signatures_are_masked_in_any_text(canary: str, text: str, key: str) -> None:
    assert canary not in in_every_place(key, text.format(canary))
    assert canary not in json.dumps(cleaned(failure=ValueError(text.format(canary))))


@pytest.mark.parametrize(("canary", "text"), [(canary, text) for canary, texts in PRIVATE_IN_ERRORS for text in texts])
@pytest.mark.parametrize("key", ["message", "detail", "error", "reason", "last_error", "exception"])
def test_error_texts_tell_no_numbers_digits_or_words(canary: str, text: str, key: str) -> None:
    filled = text.format(canary)

    assert canary not in json.dumps(cleaned(**{key: filled}))
    assert canary not in json.dumps(cleaned(**{key: [filled, {"error": filled}]}))
    assert canary not in json.dumps(cleaned(failure=ValueError(filled)))
    assert canary not in json.dumps(cleaned(failures=[RuntimeError(filled)]))


@pytest.mark.parametrize(
    "text",
    [
        "stream MZ0123456789abcdef0123456789abcdef is unknown",
        "call 20170ada-f610-433b-8758-001122334455 has ended",
        "call 12345678-f610-433b-8758-12345678abcd has ended",
        "error 31951 after 120000 ms on port 8080",
        "digits: too many",
        "2026-11-20T08:48:51.123456Z",
        "parameters: too long",
        "the signature is wrong; tried https://voice.example.com/twilio/answer",
        "GET /twilio/stream is refused",
    ],
)
def test_error_texts_stay_readable(text: str) -> None:
    assert cleaned(error=text) == {"error": text}


around = st.text(alphabet=st.sampled_from(" ,;:\n\t()[]{}<>'\"/=é…"), max_size=6)


@given(
    st.sampled_from(["error", "detail", "message", "reason", "connect_error"]),
    around,
    around,
    st.integers(10_000_000, 10**16),
    st.sampled_from(["", "+", "00", "tel:", "sip:"]),
    st.booleans(),
)
def test_no_number_gets_out_of_an_error_text(key: str, before: str, after: str, number: int, plus: str, nested: bool) -> None:
    text = f"{before}{plus}{number}{after}"

    said = json.dumps(cleaned(**{key: [{"error": text}] if nested else text}), ensure_ascii=False)

    assert str(number) not in said


@given(around, around, st.text("abcXYZ019_-", min_size=12, max_size=60), st.sampled_from(["/", "%2F", "%2f"]), st.booleans())
def test_no_stream_token_gets_out_of_any_text(before: str, after: str, token: str, slash: str, library: bool) -> None:
    text = f"{before}wss:{slash}twilio{slash}stream{slash}{token}{after}"

    event = {"message": text} if library else {"anything": {"a": [text], text: 1}, "event": text}

    assert token not in json.dumps(cleaned(**event), ensure_ascii=False)


@pytest.mark.parametrize(
    "text", ["1" * 40_000, "+1" * 20_000, "signature=a," * 3_000, "parameters={" * 3_000, "digits='" * 5_000]
)
def test_no_text_takes_long(text: str) -> None:
    began = time.perf_counter()
    cleaned(exception=text)

    assert time.perf_counter() - began < 1


def test_ids_stay_readable() -> None:
    ids = {"stream_id": "MZ0123456789abcdef0123456789abcdef", "call_id": "20170ada-f610-433b-8758-001122334455", "port": 8080}

    assert ids == cleaned(**ids)


def test_long_values_are_cut() -> None:
    assert len(cleaned(reason="x" * 100_000)["reason"]) < 2_100


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(event=st.text(), key=st.text(), value=anything)
def test_any_value_makes_one_harmless_line(event: str, key: str, value: Any) -> None:
    filled = {"timestamp": "2026-11-20T08:48:51.123456Z", "level": "info", "event": event, key: value}

    line = logs.render_json(None, "info", logs.redact(None, "info", dict(filled)))
    assert isinstance(line, str)
    assert line.isprintable()
    assert isinstance(json.loads(line), dict)

    shown = logs.console(colors=False)(None, "info", logs.redact(None, "info", {"exception": "", **filled}))
    assert isinstance(shown, str)
    assert all(part.isprintable() for part in shown.split("\n    ")) if key == "exception" else shown.isprintable()


@given(st.text(alphabet=st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"]), min_size=1))
def test_what_a_terminal_obeys_is_escaped(text: str) -> None:
    assert logs.printable(text).isprintable()


def test_stderr_that_is_gone_costs_a_line_not_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    logs.configure(json=True)
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)

    structlog.get_logger().info("unheard")
