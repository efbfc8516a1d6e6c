"""At the door, from outside: named after the faults of the list. Foreign carriers, raw sockets, liars, and a flood."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hmac
import json
import logging
import os
import re
import resource
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from xml.etree import ElementTree

import aiohttp
import pytest
import structlog

from gateway import door as door_module
from gateway import logs, porter
from gateway import server as server_module
from gateway.provider import SignedRequest
from gateway.server import Server
from gateway.signing import UPGRADE
from gateway.tokens import LEEWAY_SECS, LIFETIME_SECS, NONCE_BYTES, Tokens
from tests.benchmarks import holders
from tests.conftest import Launch
from tests.doubles import ConversationRelay, Plivo, RecordingService, Refused, TwilioMedia
from tests.doubles.twilio_media import signature as twilio_signature
from tests.test_doctor import SECRET, SIGNED, TOKEN
from tests.test_end_to_end import MULAW, played

PUBLIC = "https://voice.example.com"
NAMES = [*SIGNED]
FORM = {"twilio": ("CallSid", "AccountSid"), "relay": ("CallSid", "AccountSid"), "plivo": ("CallUUID", "ParentAuthID")}
KINDS: dict[str, Any] = {"twilio": TwilioMedia, "relay": ConversationRelay, "plivo": Plivo}
Reply = tuple[int, bytes]


@pytest.fixture
def guarded(launch: Launch) -> Callable[..., Any]:
    """`await guarded(**options)` runs a gateway that checks signatures, as if behind PUBLIC."""

    def start(**options: Any) -> Any:
        defaults: dict[str, Any] = {"public_url": PUBLIC, "secret": SECRET, "providers": SIGNED}
        return launch(**defaults | options)

    return start


def form_of(name: str, call_id: str, **more: str) -> dict[str, str]:
    call, account = FORM[name]
    return {call: call_id, account: "AC1", "From": "+15550001", "To": "+15550002", "Direction": "inbound"} | more


def headers_for(server: Server, name: str, url: str, form: dict[str, str] | None = None, **headers: str) -> dict[str, str]:
    """What the account's carrier would send along; `url` is the public one."""
    body = urlencode(form).encode() if form is not None else b""
    return dict(server.providers[name].sign(SignedRequest.read("POST" if form is not None else "GET", url, headers, body)))


async def request(
    server: Server, path: str, form: dict[str, str] | None, headers: dict[str, str] | None = None, **options: Any
) -> Reply:
    """A webhook (a POST where there is a form) at the gateway's own address."""
    body = urlencode(form).encode() if form is not None else None
    kind = {"Content-Type": "application/x-www-form-urlencoded"} if form is not None else {}
    async with (
        aiohttp.ClientSession() as http,
        http.request(
            "POST" if form is not None else "GET", f"http://127.0.0.1:{server.port}{path}",
            data=body, headers=kind | (headers or {}), **options,
        ) as response,
    ):  # fmt: skip
        return response.status, await response.read()


async def webhook(server: Server, name: str, call_id: str, what: str = "answer", **more: str) -> Reply:
    """One that is signed as it should be."""
    form, path = form_of(name, call_id, **more), f"/{name}/{what}"
    return await request(server, path, form, headers_for(server, name, PUBLIC + path, form))


async def stream_url(server: Server, name: str, call_id: str, **more: str) -> str:
    """Where the answer to a call sends its stream: the public URL."""
    status, body = await webhook(server, name, call_id, **more)
    assert 200 == status, body
    return type(server.providers[name]).dial(body.decode()).url


def here(server: Server, url: str) -> str:
    """The same place at the gateway's own address."""
    return url.replace(PUBLIC.replace("https", "wss"), f"ws://127.0.0.1:{server.port}")


def carrier(server: Server, name: str, url: str, call_id: str, **options: Any) -> Any:
    """A foreign carrier on `url`, which it signs as the public one."""
    made = KINDS[name](here(server, url), auth_token=TOKEN, public_url=url, **options)
    if name == "plivo":
        made.call_id = call_id
    else:
        made.call_sid = call_id
    return made


async def answer_twilio(base: str, call_id: str, *, ssl_context: ssl.SSLContext) -> str:
    """The stream URL in the answer to a call that Twilio announces at a real public URL."""
    url, form = f"{base}/twilio/answer", form_of("twilio", call_id)
    headers = {"x-twilio-signature": signature_over(url, form)}
    async with aiohttp.ClientSession() as http, http.post(url, data=form, headers=headers, ssl=ssl_context) as response:
        body = await response.text()
        assert 200 == response.status, body
    found = ElementTree.fromstring(body).find("Connect/Stream")  # noqa: S314 — our own
    assert found is not None
    return found.attrib["url"]


def signature_over(url: str, form: dict[str, str] | None = None) -> str:
    """Over https Twilio signs without the port."""
    return twilio_signature(TOKEN, re.sub(r"^(https://[^/:]+):\d+", r"\1", url), form)


async def refused(made: Any) -> Reply:
    """What a carrier's upgrade gets that must not get in."""
    with pytest.raises(Refused) as caught:
        async with made:
            pass
    assert caught.value.status is not None
    return caught.value.status, caught.value.body


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def raw(server: Server, *pieces: bytes, seconds: float = 3.0) -> bytes:
    """Everything that the gateway answers to these bytes until it closes; AssertionError if it does not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        async with asyncio.timeout(seconds):
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                return await reader.read()
            except ConnectionError:
                return b""
    except TimeoutError:
        raise AssertionError(f"still open after {seconds} s") from None
    finally:
        writer.transport.abort()


# --- S1: forged signatures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["answer", "action", "status"])
async def test_s1_a_webhook_without_a_right_signature_gets_403_and_no_word(guarded: Any, name: str, what: str) -> None:
    server = await guarded()
    path, form = f"/{name}/{what}", form_of(name, "CA1")
    good = headers_for(server, name, PUBLIC + path, form)
    other = form_of(name, "CA2")
    forged = [
        ("unsigned", path, form, {}),
        ("empty", path, form, dict.fromkeys(good, "")),
        ("of another path", path, form, headers_for(server, name, f"{PUBLIC}/{name}/other", form)),
        ("of another host", path, form, headers_for(server, name, f"https://evil.example.com{path}", form)),
        ("of another call", path, other, good),
        ("with one field more", path, form | {"To": "+19995550100"}, good),
        ("with a query", f"{path}?x=1", form, good),
        ("of a GET", path, form, headers_for(server, name, PUBLIC + path)),
        ("for a GET", path, None, good),
        ("cut", path, form, {key: value[:-2] for key, value in good.items()}),
        ("in lower case", path, form, {key: value.lower() for key, value in good.items()}),
        ("not ASCII", path, form, dict.fromkeys(good, "é" * 28)),
    ]
    answers = {label: await request(server, where, fields, headers) for label, where, fields, headers in forged}
    assert dict.fromkeys(answers, (403, b"")) == answers
    assert 0 == server.house.door.admission.calls
    status, _ = await request(server, path, form, good)
    assert status in (200, 204)


@pytest.mark.parametrize("name", NAMES)
async def test_s1_an_upgrade_needs_the_token_and_the_signature(guarded: Any, name: str, log: list[Any]) -> None:
    server = await guarded()
    url = await stream_url(server, name, "CA1")
    bare = f"wss://voice.example.com/{name}/stream"
    broken = url[:-1] + ("A" if url[-1] != "A" else "B")
    wrong = [
        KINDS[name](here(server, url), auth_token="another", public_url=url),
        KINDS[name](here(server, url), auth_token=TOKEN, public_url=f"{url}x"),
        KINDS[name](here(server, url), auth_token=TOKEN, public_url=here(server, url)),  # the URL that Host would give
        *(carrier(server, name, each, "CA1") for each in (bare, f"{bare}/", f"{bare}/{'A' * 90}", broken, f"{url}.")),
    ]
    if name == "plivo":
        wrong.append(Plivo(here(server, url), reduced=True))
    answers = [await refused(each) for each in wrong]
    assert [(403, b"")] * 3 == answers[:3]
    assert {(403, b""), (404, b"")} >= set(answers)
    assert 0 == server.house.door.admission.pending
    assert any(entry["event"] == "signature_refused" and entry["tried"] for entry in log)
    assert url.rpartition("/")[2] not in str(log)
    async with carrier(server, name, url, "CA1") as call:
        await until(lambda: server.house.door.admission.active)
        await call.hangup()
    assert [] == call.violations


async def test_s1_json_without_its_hash_in_the_url_is_refused(guarded: Any) -> None:
    """The official SDK lets such a body through unauthenticated."""
    server = await guarded()
    url = f"{PUBLIC}/twilio/status"
    headers = {"x-twilio-signature": signature_over(url), "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"http://127.0.0.1:{server.port}/twilio/status", data=b'{"CallSid": "CA1"}', headers=headers) as response,
    ):
        assert (403, b"") == (response.status, await response.read())


# --- S2: replay ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def talking(server: Server, name: str, url: str, call_id: str) -> AsyncIterator[Any]:
    before = server.house.door.admission.active
    async with carrier(server, name, url, call_id) as call:
        await until(lambda: server.house.door.admission.active > before)
        yield call


@pytest.mark.parametrize("name", NAMES)
async def test_s2_a_captured_upgrade_opens_nothing(guarded: Any, name: str) -> None:
    """While its call is on, when it is over, on another process with the same secret, and after a restart."""
    first, second = await guarded(), await guarded()
    url = await stream_url(first, name, "CA1")
    async with talking(first, name, url, "CA1") as call:
        assert [(403, b"")] * 2 == [await refused(carrier(each, name, url, "CA1")) for each in (first, second)]
        await call.hangup()
    assert [(403, b"")] * 2 == [await refused(carrier(each, name, url, "CA1")) for each in (first, second)]
    await first.stop()
    third = await guarded()
    assert (403, b"") == await refused(carrier(third, name, url, "CA1"))


async def test_s2_a_stream_may_be_served_by_another_process_than_its_webhook(guarded: Any) -> None:
    first, second = await guarded(), await guarded()
    url = await stream_url(first, "twilio", "CA1")
    async with talking(second, "twilio", url, "CA1") as call:
        assert (403, b"") == await refused(carrier(first, "twilio", url, "CA1"))
        await call.hangup()
    stranger = await guarded(secret=SECRET[::-1])
    assert (403, b"") == await refused(carrier(stranger, "twilio", await stream_url(first, "twilio", "CA2"), "CA2"))


@pytest.mark.parametrize("name", NAMES)
async def test_s2_a_carriers_own_retry_is_good_until_a_start_has_come(guarded: Any, name: str) -> None:
    server = await guarded()
    url = await stream_url(server, name, "CA1")
    for _ in range(2):
        made = carrier(server, name, url, "CA1", **{"setup_delay" if name == "relay" else "start_delay": 30.0})
        task = asyncio.get_running_loop().create_task(made.__aenter__())
        await until(lambda: server.house.door.admission.pending)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not server.house.door.admission.pending)
    async with talking(server, name, url, "CA1") as call:
        await call.hangup()
    assert [] == call.violations


def start_frame(call_id: str, stream_sid: str = "MZ9") -> str:
    """Twilio's."""
    start = {
        "accountSid": "AC1", "streamSid": stream_sid, "callSid": call_id, "tracks": ["inbound"],
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}, "customParameters": {},
    }  # fmt: skip
    return json.dumps({"event": "start", "sequenceNumber": "1", "start": start, "streamSid": stream_sid})


async def test_s2_of_two_connections_with_one_token_the_first_start_wins(guarded: Any, log: list[Any]) -> None:
    server = await guarded()
    url = await stream_url(server, "twilio", "CA1")
    headers = {"x-twilio-signature": twilio_signature(TOKEN, url)}
    async with aiohttp.ClientSession() as http, http.ws_connect(here(server, url), headers=headers) as late:
        async with talking(server, "twilio", url, "CA1") as call:
            await late.send_str(start_frame("CA1"))
            assert 1008 == (await late.receive(timeout=3)).data
            await call.speak(MULAW[:160])
            await call.hangup()
        assert 1000 == call.close_code
    assert "token_used" in [entry.get("reason") for entry in log if entry["event"] == "stream_refused"]
    await until(lambda: not server.streams)
    assert (0, 0) == (server.house.door.admission.active, server.house.door.admission.pending)


class Captured(NamedTuple):
    """A signed webhook as it was on the wire, to be sent again."""

    path: str
    form: dict[str, str]
    headers: dict[str, str]

    async def to(self, server: Server) -> Reply:
        return await request(server, self.path, self.form, self.headers)


def captured(server: Server, name: str, call_id: str, what: str = "answer", **more: str) -> Captured:
    form, path = form_of(name, call_id, **more), f"/{name}/{what}"
    return Captured(path, form, headers_for(server, name, PUBLIC + path, form))


def named(server: Server, name: str, reply: Reply) -> str:
    """The stream URL in an answer."""
    assert 200 == reply[0], reply
    return type(server.providers[name]).dial(reply[1].decode()).url


REPLAYED = (403, b"")


@pytest.mark.parametrize("name", NAMES)
async def test_s2_a_carriers_own_retry_is_answered_and_keeps_one_slot(guarded: Any, name: str) -> None:
    """On whatever process of the host; and only the account's carrier can open the stream that it names."""
    first, second = await guarded(), await guarded()
    asked = captured(first, name, "CA1")
    replies = [await asked.to(each) for each in (first, first, second)]
    assert 1 == first.house.door.admission.calls
    for reply in replies:
        url = named(first, name, reply)
        assert REPLAYED == await refused(KINDS[name](here(first, url), auth_token="guessed", public_url=url))
    async with talking(second, name, named(first, name, replies[0]), "CA1") as call:
        await call.hangup()


@pytest.mark.parametrize("name", NAMES)
async def test_s2_a_replayed_webhook_wins_nothing(
    guarded: Any, name: str, monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    """From the stream's start on, while it is on and when all is over, on every process and after a restart."""
    monkeypatch.setattr(door_module, "ENDING_SECS", 0.1)
    first, second = await guarded(), await guarded()
    asked = captured(first, name, "CA1")
    url = named(first, name, await asked.to(first))
    async with talking(second, name, url, "CA1") as call:
        assert [REPLAYED] * 2 == [await asked.to(each) for each in (first, second)]
        await call.hangup()
    await until(lambda: not second.streams)
    acted, told = captured(first, name, "CA1", "action"), captured(first, name, "CA1", "status")
    assert [200, 204] == [(await each.to(first))[0] for each in (acted, told)]
    assert [REPLAYED] * 2 == [await asked.to(each) for each in (first, second)]
    assert 200 == (await acted.to(second))[0], "a retry"
    await first.stop()
    third = await guarded()
    assert [REPLAYED] * 2 == [await asked.to(each) for each in (second, third)]
    assert REPLAYED == await captured(first, name, "CA1").to(third), "even one that has not been seen: the call is over"
    assert [0] * 2 == [each.house.door.admission.calls for each in (second, third)]
    remarks = [entry for entry in log if entry["event"] == "webhook_replayed"]
    assert {("CA1", name)} == {(entry["call_id"], entry["provider"]) for entry in remarks}
    assert 1 <= third.house.totals.sums.counts["telephony_auth_failures"][name, "replay"]


@pytest.mark.parametrize("name", NAMES)
async def test_s2_a_call_that_comes_back_is_answered_again(guarded: Any, name: str) -> None:
    """`after` leads it here again. Twilio's requests look as they did; Plivo's have a new nonce, and with the old one are old."""
    server = await guarded(providers={name: SIGNED[name] | {"after": "<Redirect>/there</Redirect>"}})
    asked, acted = captured(server, name, "CA1"), captured(server, name, "CA1", "action")
    for _ in range(3):
        async with talking(server, name, named(server, name, await asked.to(server)), "CA1") as call:
            await call.hangup()
        assert 200 == (await acted.to(server))[0]
        if name == "plivo":
            assert REPLAYED == await asked.to(server)
            asked, acted = captured(server, name, "CA1"), captured(server, name, "CA1", "action")


async def test_s2_a_second_end_that_is_still_to_come_is_waited_for(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twilio asks what comes next before we have seen the stream's end, with the words that it used the time before."""
    server = await guarded(providers={"twilio": SIGNED["twilio"] | {"after": "<Redirect>/there</Redirect>"}})
    asked, acted = captured(server, "twilio", "CA1"), captured(server, "twilio", "CA1", "action")
    async with talking(server, "twilio", named(server, "twilio", await asked.to(server)), "CA1") as call:
        await call.hangup()
    assert 200 == (await acted.to(server))[0]
    async with talking(server, "twilio", named(server, "twilio", await asked.to(server)), "CA1") as call:
        early = asyncio.get_running_loop().create_task(acted.to(server))
        await asyncio.sleep(0.3)
        assert not early.done()
        await call.hangup()
        assert 200 == (await early)[0]
        monkeypatch.setattr(door_module, "ENDING_SECS", 0.1)
    async with talking(server, "twilio", named(server, "twilio", await asked.to(server)), "CA1") as call:
        assert REPLAYED == await acted.to(server), "nothing ends"
        await call.hangup()


@pytest.mark.parametrize("name", NAMES)
async def test_s2_a_call_that_hears_overflow_may_ask_as_often_as_it_likes(guarded: Any, name: str) -> None:
    """`overflow` may have it wait and ask again; once there is room, it gets in."""
    server = await guarded(max_calls=1)
    async with talking(server, name, await stream_url(server, name, "CA1"), "CA1") as call:
        asked = captured(server, name, "CA2")
        for _ in range(3):
            status, body = await asked.to(server)
            assert (200, False) == (status, b"/stream/" in body)
        await call.hangup()
    await until(lambda: not server.house.door.admission.calls)
    async with talking(server, name, named(server, name, await asked.to(server)), "CA2") as call:
        await call.hangup()


async def test_s2_a_nonce_is_one_calls_even_where_the_signature_covers_no_body(guarded: Any) -> None:
    server = await guarded(providers={"plivo": SIGNED["plivo"] | {"accept_v2": True}})
    nonce, url = "12345678901234567890", f"{PUBLIC}/plivo/answer"
    mac = base64.b64encode(hmac.digest(TOKEN.encode(), f"{url}{nonce}".encode(), "sha256")).decode()
    headers = {"X-Plivo-Signature-V2": mac, "X-Plivo-Signature-V2-Nonce": nonce}
    first, other = (Captured("/plivo/answer", form_of("plivo", call_id), headers) for call_id in ("CA1", "CA2"))
    assert [200, 403, 200] == [(await each.to(server))[0] for each in (first, other, first)]
    disguised = other._replace(headers=headers | {"X-Plivo-Signature-V3-Nonce": "1", "X-Plivo-Signature-V3": "x"})
    assert REPLAYED == await disguised.to(server)


async def test_s2_what_a_carrier_says_of_a_calls_end_is_believed(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "ENDING_SECS", 0.1)
    server = await guarded()
    over = {"twilio": {"CallStatus": "completed"}, "plivo": {"Event": "Hangup"}}
    for name, words in over.items():
        asked = captured(server, name, "CA1")
        async with talking(server, name, named(server, name, await asked.to(server)), "CA1") as call:
            await call.hangup()
        assert 204 == (await webhook(server, name, "CA1", "status", **words))[0]
        assert REPLAYED == await asked.to(server)


def minted(name: str, call_id: str, ago: float, secret: str = SECRET) -> str:
    token = Tokens(secret).mint(name, call_id, "route-0", now=time.time() - ago, nonce=os.urandom(NONCE_BYTES))
    return f"wss://voice.example.com/{name}/stream/{token}"


async def test_s2_an_expired_token_opens_nothing(guarded: Any) -> None:
    server = await guarded()
    late = minted("twilio", "CA1", LIFETIME_SECS + LEEWAY_SECS + 2)
    assert (403, b"") == await refused(carrier(server, "twilio", late, "CA1"))
    async with talking(server, "twilio", minted("twilio", "CA1", LIFETIME_SECS - 5), "CA1") as call:
        await call.hangup()


# --- S15: tenants --------------------------------------------------------------------------------------------------------


async def test_s15_a_token_is_good_for_its_own_provider_and_call_only(guarded: Any, log: list[Any]) -> None:
    server = await guarded()
    admission = server.house.door.admission
    url = await stream_url(server, "twilio", "CA1")
    elsewhere = url.replace("/twilio/", "/relay/")
    assert (403, b"") == await refused(carrier(server, "relay", elsewhere, "CA1"))
    assert (403, b"") == await refused(carrier(server, "twilio", minted("plivo", "CA1", 0), "CA1"))
    async with carrier(server, "twilio", url, "CA2") as thief:
        assert 1008 == await thief.wait_closed()
    assert (0, 0) == (admission.active, admission.pending)
    assert ["other_call"] == [entry["reason"] for entry in log if entry["event"] == "stream_refused" and "provider" in entry][:1]
    async with talking(server, "twilio", url, "CA1") as call:  # the thief has used nothing up
        await call.hangup()
    assert 1000 == call.close_code


# --- S3: nothing to tell apart -------------------------------------------------------------------------------------------


async def test_s3_all_refusals_look_alike(guarded: Any) -> None:
    """A forged, an expired, another provider's, a used token, and a good one without a signature."""
    server = await guarded()
    used = await stream_url(server, "twilio", "CA1")
    async with talking(server, "twilio", used, "CA1") as call:
        await call.hangup()
    urls = [
        minted("twilio", "CA1", 0, SECRET[::-1]),
        minted("twilio", "CA1", 600),
        minted("relay", "CA1", 0),
        used,
        minted("twilio", "CA1", 0),
        "wss://voice.example.com/twilio/stream/x",
    ]
    answers = set()
    for url in urls:
        path = url.removeprefix("wss://voice.example.com")
        text = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        answer = await raw(server, f"{text}Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode())
        answers.add(re.sub(rb"\r\nDate: [^\r]*", b"", answer))
    (only,) = answers
    assert only.startswith(b"HTTP/1.1 403 ")
    assert only.endswith(b"\r\n\r\n")


# --- F9, F10 -------------------------------------------------------------------------------------------------------------


async def silent_upgrades(server: Server, number: int) -> list[int]:
    """That many streams that never say a word. Returns their close codes."""
    urls = [minted("twilio", f"CA{index}", 0) for index in range(number)]

    async def one(http: aiohttp.ClientSession, url: str) -> int:
        headers = {"x-twilio-signature": twilio_signature(TOKEN, url)}
        async with http.ws_connect(here(server, url), headers=headers) as socket:
            message = await socket.receive(timeout=30)
            return int(message.data)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(one(http, url)) for url in urls]
    return [each.result() for each in waiting]


async def test_f9_streams_that_never_start_are_closed_and_their_slots_are_back(guarded: Any) -> None:
    server = await guarded(start_timeout_secs=0.5, max_pending_per_address=100)
    assert [1008] * 100 == await silent_upgrades(server, 100)
    await until(lambda: not server.streams)
    admission = server.house.door.admission
    assert (0, 0, 0) == (admission.pending, admission.active, admission.calls)
    async with talking(server, "twilio", await stream_url(server, "twilio", "CA1"), "CA1") as call:
        await call.hangup()


async def test_f9_each_silent_upgrade_has_its_own_clock(guarded: Any) -> None:
    """The client is a process of its own. 5,000 of them, and what a call feels: tests/benchmarks/holders.py."""
    server = await guarded(start_timeout_secs=0.5, max_pending_per_address=200, secret=holders.SECRET)
    process = await asyncio.create_subprocess_exec(
        *holders.arguments(server.port, "upgraded", 200, 400, 30), stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    out, _ = await process.communicate()
    found = json.loads(out)
    assert (200, 200, [1008]) == (found["came"], found["ended"], found["codes"])
    assert found["min_secs"] >= 0.4
    print(f"closed {found['min_secs']:.2f} to {found['max_secs']:.2f} s after their upgrades")
    await until(lambda: not server.house.door.admission.pending)


async def test_f9_one_address_has_so_many_connections_that_have_not_started(guarded: Any) -> None:
    server = await guarded(max_pending_per_address=3)
    urls = [minted("twilio", f"CA{index}", 0) for index in range(4)]
    async with aiohttp.ClientSession() as http:
        headers = [{"x-twilio-signature": twilio_signature(TOKEN, url)} for url in urls]
        held = [await http.ws_connect(here(server, url), headers=own) for url, own in zip(urls[:3], headers[:3], strict=True)]
        assert (503, b"") == await refused(carrier(server, "twilio", urls[3], "CA3"))
        for socket in held:
            await socket.close()
    await until(lambda: not server.house.door.admission.pending)
    async with talking(server, "twilio", urls[3], "CA3") as call:
        await call.hangup()


async def test_f10_a_newer_stream_of_a_call_replaces_the_older(guarded: Any) -> None:
    async with RecordingService() as service:
        server = await guarded(services={"agent": {"kind": "websocket", "url": service.url}})
        async with talking(server, "twilio", await stream_url(server, "twilio", "CA1"), "CA1") as old:
            url = await stream_url(server, "twilio", "CA1", CallStatus="in-progress")
            async with carrier(server, "twilio", url, "CA1") as new:
                assert 4409 == await old.wait_closed()
                await new.speak(MULAW[:320])
                await until(lambda: 1 == len(server.streams))
                assert 1 == server.house.door.admission.active
                await new.hangup()
            assert 1000 == new.close_code
    await until(lambda: not server.streams)
    assert 0 == server.house.door.admission.calls


async def test_f10_the_same_start_again_makes_no_second_stream(guarded: Any) -> None:
    server = await guarded()
    async with talking(server, "twilio", await stream_url(server, "twilio", "CA1"), "CA1") as call:
        await call.raw(start_frame("CA1", call.stream_sid))
        await call.speak(MULAW[:800])
        await until(lambda: len(played(call)) >= 800)
        assert (1, 1) == (len(server.streams), server.house.door.admission.active)
        await call.hangup()
    assert MULAW[:800] == played(call)
    await until(lambda: not server.streams)
    assert (0, 0) == (server.house.door.admission.calls, server.house.door.admission.pending)


@pytest.mark.parametrize("call_id", ["CA1", "CA2"])
async def test_f10_a_start_of_another_stream_on_the_same_socket_ends_it(guarded: Any, call_id: str) -> None:
    server = await guarded()
    async with talking(server, "twilio", await stream_url(server, "twilio", "CA1"), "CA1") as call:
        await call.raw(start_frame(call_id, "MZ" + "9" * 32))
        assert 1008 == await call.wait_closed()
    await until(lambda: not server.streams)
    assert (0, 0) == (server.house.door.admission.calls, server.house.door.admission.pending)


# --- admission -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_o1_the_slot_is_kept_from_the_webhook_on_and_what_is_above_gets_the_overflow_answer(
    guarded: Any, name: str
) -> None:
    overflow = "<Hangup/>" if name == "plivo" else "<Say>All lines are busy.</Say>"
    server = await guarded(max_calls=2, providers={name: SIGNED[name] | {"overflow": overflow}})
    urls = [await stream_url(server, name, f"CA{number}") for number in range(2)]
    took = []
    for number in range(2, 12):
        began = time.perf_counter()
        status, body = await webhook(server, name, f"CA{number}")
        took.append((time.perf_counter() - began) * 1000)
        assert 200 == status
        assert overflow in body.decode()
    print(f"overflow answered within {max(took):.1f} ms")
    async with talking(server, name, urls[0], "CA0") as first, talking(server, name, urls[1], "CA1") as second:
        async with carrier(server, name, minted(name, "CA9", 0), "CA9") as third:  # of a process that had room
            assert 1008 == await third.wait_closed()
        await first.hangup()
        await second.hangup()
    await until(lambda: not server.house.door.admission.calls)
    assert await stream_url(server, name, "CA12")


@pytest.mark.parametrize("call_id", ["x" * 129, "x" * 5000, "é" * 100])
async def test_a_call_without_a_usable_id_keeps_no_slot(guarded: Any, call_id: str) -> None:
    server = await guarded()
    for name in NAMES:
        assert (400, b"this request names no call\n") == await webhook(server, name, call_id)
    assert 0 == server.house.door.admission.calls


# --- T2: who takes his time ----------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert porter.FIRST_BYTES_SECS + server_module.SLOW_HEADER_SECS <= 6
    monkeypatch.setattr(porter, "FIRST_BYTES_SECS", 0.4)
    for name in ("SLOW_HEADER_SECS", "BODY_SECS", "LINGER_SECS"):
        assert getattr(server_module, name) <= 5
        monkeypatch.setattr(server_module, name, 0.4)


async def drip(server: Server, begin: bytes, drop: bytes, seconds: float) -> float:
    """Sends `begin`, then a drop every 50 ms, until the gateway closes. Returns after how long."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    began = time.monotonic()
    try:
        writer.write(begin)
        while time.monotonic() - began < seconds:
            try:
                async with asyncio.timeout(0.05):
                    if not await reader.read(65536):
                        break
            except TimeoutError:
                writer.write(drop)
            except ConnectionError:
                break
        return time.monotonic() - began
    finally:
        writer.transport.abort()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("begin", "drop"),
    [
        (b"", b""),
        (b"G", b""),
        (b"GET /twilio/stream HTTP/1.1\r\n", b"X: y\r\n"),
        (b"GET /twilio/stream HTTP/1.1\r\nX: ", b"y"),
        (b"POST /twilio/answer HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n", b"a"),
        (b"POST /twilio/answer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"POST /twilio/answer HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n", b"a" * 65536),
    ],
    ids=["silent", "one letter", "headers", "one header", "body", "chunks", "flood"],
)
async def test_t2_whoever_drips_is_cut(guarded: Any, begin: bytes, drop: bytes) -> None:
    server = await guarded()
    assert await drip(server, begin, drop, 4.0) < 2.5


@pytest.mark.usefixtures("hasty")
async def test_t2_a_live_call_does_not_feel_those_who_drip(guarded: Any) -> None:
    server = await guarded()
    async with talking(server, "twilio", await stream_url(server, "twilio", "CA1"), "CA1") as call, asyncio.TaskGroup() as tasks:
        for _ in range(200):
            tasks.create_task(drip(server, b"GET /twilio/stream HTTP/1.1\r\n", b"X: y\r\n", 3.0))
        await call.speak(MULAW[:8000])
        await until(lambda: len(played(call)) >= 8000)
    assert MULAW[:8000] == played(call)


# --- T3: a flood ---------------------------------------------------------------------------------------------------------

BAD_UPGRADE = (
    b"GET /twilio/stream/" + b"A" * 120 + b" HTTP/1.1\r\nHost: voice.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nX-Twilio-Signature: AAAA\r\n\r\n"
)


BAD_WEBHOOK = (
    b"POST /twilio/answer HTTP/1.1\r\nHost: voice.example.com\r\nX-Twilio-Signature: AAAA\r\nContent-Length: 11\r\n\r\n"
    b"CallSid=CA1"
)


async def flood(server: Server, number: int, *pieces: bytes) -> int:
    """So many refused upgrades, or what else there is. Returns how many were answered with 403."""
    answered = 0

    async def some(share: int) -> None:
        nonlocal answered
        for _ in range(share):
            answer = await raw(server, *(pieces or [BAD_UPGRADE]))
            answered += answer.startswith(b"HTTP/1.1 403 ")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(10):
            tasks.create_task(some(number // 10))
    return answered


@pytest.mark.parametrize(
    ("pieces", "told", "reason"),
    [
        ([BAD_UPGRADE], "token_refused", "token"),
        ([BAD_UPGRADE[:30], BAD_UPGRADE[30:]], "token_refused", "token"),
        ([BAD_WEBHOOK], "signature_refused", "signature"),
        ([BAD_WEBHOOK[:-5], BAD_WEBHOOK[-5:]], "signature_refused", "signature"),
    ],
)
async def test_t3_a_flood_leaves_a_call_bit_exact_and_the_log_short(
    guarded: Any, log: list[Any], pieces: list[bytes], told: str, reason: str
) -> None:
    server = await guarded()
    async with talking(server, "twilio", await stream_url(server, "twilio", "CA1"), "CA1") as call:
        async with asyncio.TaskGroup() as tasks:
            flooding = tasks.create_task(flood(server, 500, *pieces))
            tasks.create_task(call.speak(MULAW[:8000]))
        await until(lambda: len(played(call)) >= 8000)
        await call.hangup()
    assert 500 == flooding.result()
    assert MULAW[:8000] == played(call)
    lines = [entry for entry in log if entry["event"] == told]
    assert 1 <= len(lines) <= 10
    assert 500 == server.house.totals.sums.counts["telephony_auth_failures"]["twilio", reason]
    assert (0, 0) == (server.house.door.admission.pending, server.house.door.admission.calls)


@pytest.mark.long
async def test_t3_a_minute_of_flood(guarded: Any, log: list[Any]) -> None:
    server = await guarded()
    audio = (MULAW * 40)[: 60 * 8000]
    async with talking(server, "twilio", await stream_url(server, "twilio", "CA1"), "CA1") as call:
        async with asyncio.TaskGroup() as tasks:
            flooding = tasks.create_task(flood(server, 60_000))
            tasks.create_task(call.speak(audio))
        await until(lambda: len(played(call)) >= len(audio))
        await call.hangup()
    assert 60_000 == flooding.result()
    assert audio == played(call)
    assert len([entry for entry in log if entry["event"] == "token_refused"]) <= 100


# --- T5: no HTTP ---------------------------------------------------------------------------------------------------------

HEALTH = b"GET /twilio/stream HTTP/1.1\r\nHost: x\r\n\r\n"
SECOND = b"a carrier's WebSocket connects here"  # what the gateway says to HEALTH
POST = b"POST /twilio/status HTTP/1.1\r\nHost: x\r\n"
NO_HTTP = {
    "TE and CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n" + HEALTH,
    "CL and TE": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HEALTH,
    "two CL": POST + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + HEALTH,
    "a list of CL": POST + b"Content-Length: 0, 44\r\n\r\n" + HEALTH,
    "CL with a plus": POST + b"Content-Length: +0\r\n\r\n" + HEALTH,
    "CL below nought": POST + b"Content-Length: -1\r\n\r\n" + HEALTH,
    "CL in hexadecimal": POST + b"Content-Length: 0x0\r\n\r\n" + HEALTH,
    "CL with an underscore": POST + b"Content-Length: 0_0\r\n\r\n" + HEALTH,
    "TE of another kind": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + HEALTH,
    "TE not at last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + HEALTH,
    "TE twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + HEALTH,
    "space before the colon": POST + b"Content-Length : 44\r\n\r\n" + HEALTH,
    "a folded header": POST + b"X: y\r\n Content-Length: 44\r\n\r\n" + HEALTH,
    "a header without a name": POST + b": x\r\n\r\n" + HEALTH,
    "a header without a colon": POST + b"Content-Length\r\n\r\n" + HEALTH,
    "NUL in a header": POST + b"X: a\0b\r\n\r\n" + HEALTH,
    "CR in a header": POST + b"X: a\rContent-Length: 44\r\n\r\n" + HEALTH,
    "chunk size too long": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 20 + b"\r\n",
    "chunk size no number": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + HEALTH,
    "chunk ends in LF": POST + b"Transfer-Encoding: chunked\r\n\r\n0\n\n" + HEALTH,
    "a long line": b"GET /twilio/stream/" + b"A" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long header": b"GET /twilio/stream HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 65536 + b"\r\n\r\n",
    "many headers": b"GET /twilio/stream HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(200)) + b"\r\n",
    "another version": b"GET /twilio/stream HTTP/9.9\r\nHost: x\r\n\r\n",
    "no version": b"GET /twilio/stream\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 32 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a method with a space": b"GE T /twilio/stream HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in the path": b"GET /twilio/stream x HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in the path": b"GET /twilio/stream\xff\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("label", NO_HTTP)
async def test_t5_what_two_servers_could_read_differently_is_refused(guarded: Any, label: str, log: list[Any]) -> None:
    server = await guarded()
    answer = await raw(server, NO_HTTP[label])
    assert SECOND not in answer
    assert re.match(rb"HTTP/(1\.[01]|0\.9) (400|403|405|431|501|505) |$", answer), answer[:100]
    assert len(re.findall(rb"HTTP/\d\.\d \d{3} ", answer)) <= 1
    assert [] == [entry for entry in log if entry["log_level"] == "error" or "exc_info" in entry]
    assert SECOND in await raw(server, HEALTH)


async def test_t5_nothing_behind_a_refused_upgrade_is_read(guarded: Any) -> None:
    server = await guarded()
    answer = await raw(server, BAD_UPGRADE + HEALTH * 3)
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert SECOND not in answer


async def test_t5_a_storm_of_rubbish_is_told_once_a_second(guarded: Any, log: list[Any]) -> None:
    server = await guarded()
    for _ in range(20):
        await raw(server, NO_HTTP["a header without a colon"])
    assert 1 <= len([entry for entry in log if entry["event"] == "bad_http"]) <= 2
    assert not [entry for entry in log if entry["event"] == "library_message"]


async def test_t5_a_good_upgrade_is_good_however_its_bytes_are_cut(guarded: Any) -> None:
    """Byte by byte, in halves, and with what the porter leaves to the HTTP server; a bad one is as bad."""
    server = await guarded()
    for number, pieces in enumerate((1000, 2, 400)):
        for good in (True, False):
            url = minted("twilio", f"CA{number}", 0)
            signature = twilio_signature(TOKEN if good else "another", url)
            head = BAD_UPGRADE.replace(b"/twilio/stream/" + b"A" * 120, url.removeprefix("wss://voice.example.com").encode())
            head = head.replace(b"X-Twilio-Signature: AAAA", b"x-twilio-signature:" + signature.encode() + b"\r\nX-Odd: caf\xe9")
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            size = len(head) // pieces + 1
            for at in range(0, len(head), size):
                writer.write(head[at : at + size])
                await asyncio.sleep(0)
            assert (await reader.readline()).startswith(b"HTTP/1.1 101 " if good else b"HTTP/1.1 403 ")
            writer.transport.abort()


# --- T10: who claims to be whom ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trusted", "lines", "address"),
    [
        ([], ["203.0.113.7"], "127.0.0.1"),
        (["10.0.0.0/8"], ["203.0.113.7", "10.0.0.1"], "127.0.0.1"),
        (["127.0.0.1"], ["203.0.113.7"], "203.0.113.7"),
        (["127.0.0.1"], ["198.51.100.1, 203.0.113.7"], "203.0.113.7"),
        (["127.0.0.1"], ["198.51.100.1", "203.0.113.7"], "203.0.113.7"),  # a liar's line, and below it our proxy's
        (["127.0.0.1", "203.0.113.0/24"], ["198.51.100.1", "203.0.113.7"], "198.51.100.1"),
        (["127.0.0.1"], ["rubbish"], "127.0.0.1"),
        (["127.0.0.1"], [], "127.0.0.1"),
    ],
)
async def test_t10_a_forwarded_address_counts_if_a_trusted_proxy_says_it(
    guarded: Any, trusted: list[str], lines: list[str], address: str
) -> None:
    server = await guarded(trusted_proxies=trusted)
    admission, seen = server.house.door.admission, []
    connect = admission.connect
    admission.connect = lambda where, now: (seen.append(where), connect(where, now))[1]
    url = minted("twilio", "CA1", 0)
    path, host = url.removeprefix("wss://voice.example.com"), b"\r\n".join(f"X-Forwarded-For: {each}".encode() for each in lines)
    answer = asyncio.get_running_loop().create_task(
        raw(
            server,
            f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {'A' * 22}==\r\nX-Twilio-Signature: {twilio_signature(TOKEN, url)}\r\n".encode()
            + (host + b"\r\n" if lines else b"")
            + b"\r\n",
        )
    )
    await until(lambda: seen)
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    assert [address] == seen


@pytest.mark.parametrize(
    "lie",
    [
        {"Host": "evil.example.com"},
        {"X-Forwarded-Host": "evil.example.com"},
        {"X-Forwarded-Proto": "http"},
        {"X-Forwarded-Port": "81"},
        {"X-Original-URL": "/plivo/answer"},
        {"Forwarded": "host=evil.example.com;proto=http"},
        {"X-Forwarded-Prefix": "/evil"},
    ],
)
@pytest.mark.parametrize("trusted", [[], ["127.0.0.1"]])
async def test_t10_the_public_url_is_configured_and_never_guessed(guarded: Any, lie: dict[str, str], trusted: list[str]) -> None:
    server = await guarded(trusted_proxies=trusted)
    form, path = form_of("twilio", "CA1"), "/twilio/answer"
    good = headers_for(server, "twilio", PUBLIC + path, form)
    status, body = await request(server, path, form, good | lie)
    assert 200 == status
    assert b"wss://voice.example.com/twilio/stream/" in body
    assert b"evil" not in body
    theirs = headers_for(server, "twilio", f"http://evil.example.com{path}", form)
    assert (403, b"") == await request(server, path, form, theirs | lie)


async def test_t10_a_header_that_is_not_believed_is_told_once(guarded: Any, log: list[Any]) -> None:
    server = await guarded()
    for number in range(3):
        headers = {"X-Forwarded-For": "203.0.113.7"}
        async with carrier(server, "plivo", minted("plivo", f"CA{number}", 0), f"CA{number}", headers=headers) as call:
            await call.hangup()
    (told,) = [entry for entry in log if entry["event"] == "forwarded_for_not_believed"]
    assert ("127.0.0.1", True) == (told["peer"], "trusted_proxies" in told["hint"])


# --- S4, S7, S8, S12: logs and metrics -----------------------------------------------------------------------------------

CANARIES = {
    "token": "c4na7yauthtoken0123456789abcdef0",
    "secret": "c4na7ysecret-0123456789-abcdefghij",
    "bearer": "c4na7y-bearer-of-the-service",
    "caller": "+14155550177",
    "called": "+14155550188",
    "parameter": "c4na7y-parameter",
    "digits": "7319",
    "words": "my card number is four two",
}


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """Everything that was logged, at debug level, as it is written."""
    root = logging.getLogger()
    level, handlers = root.level, [*root.handlers]
    structlog.reset_defaults()
    logs.configure(json=True, level="debug")
    doubles = logging.getLogger("websockets")  # the doubles' own; they know everything
    doubles.setLevel(logging.CRITICAL)
    yield lambda: [*capsys.readouterr().err.splitlines()]
    doubles.setLevel(logging.NOTSET)
    root.setLevel(level)
    root.handlers[:] = handlers
    structlog.reset_defaults()


async def betray(server: Server, number: int) -> list[str]:
    """One call on each carrier with everything in it that must not be told, and the attempts around it. Returns stream tokens."""
    tokens = []
    more = {"From": CANARIES["caller"], "To": CANARIES["called"]}
    for name in NAMES:
        call_id = f"CA{number}x{name}"
        status, body = await webhook(server, name, call_id, **more)
        assert 200 == status
        url = type(server.providers[name]).dial(body.decode()).url
        tokens.append(url.rpartition("/")[2])
        made = KINDS[name](here(server, url), auth_token=CANARIES["token"], public_url=url, seed=number, open_timeout=60)
        if name == "plivo":
            made.call_id, made.extra_headers = call_id, {"secret": CANARIES["parameter"]}
        else:
            made.call_sid, made.parameters = call_id, {"note": CANARIES["parameter"], "gw_caller": CANARIES["caller"]}
        async with made as call:
            if name == "relay":
                await call.says(CANARIES["words"])
            await call.digits(CANARIES["digits"])
            await call.raw(f'{{"broken": "{CANARIES["words"]} {CANARIES["caller"]}')
            await call.hangup()
        with pytest.raises(Refused):
            async with KINDS[name](here(server, url), auth_token="wrong", public_url=url):
                pass
        for what in ("action", "status"):
            await webhook(server, name, call_id, what, **more)
        await request(
            server, f"/{name}/answer?From={CANARIES['caller']}", form_of(name, call_id, **more), {"X-Twilio-Signature": "x"}
        )
        await request(server, f"/{name}/streams/{tokens[-1]}", None)
        await raw(server, f"GET /{name}/stream/{tokens[-1]}\0 HTTP/1.1\r\nAuthorization: {CANARIES['bearer']}\r\n\r\n".encode())
    return tokens


@pytest.mark.parametrize("calls", [6, pytest.param(3334, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
async def test_s4_s8_s12_nothing_private_is_in_any_line_of_the_log_or_in_metrics(
    launch: Launch, written: Any, calls: int
) -> None:
    providers = {name: entry | {"auth_token": CANARIES["token"]} for name, entry in SIGNED.items()}
    tokens: list[str] = []
    async with RecordingService() as service:
        agent = {"kind": "websocket", "url": service.url, "authorization": CANARIES["bearer"]}
        server = await launch(
            providers=providers, secret=CANARIES["secret"], public_url=PUBLIC, services={"agent": agent},
            max_calls_per_second=10_000, max_cpu_percent=100, log_level="debug", admin="127.0.0.1:0",
        )  # fmt: skip
        server.watchdog.overloaded = lambda: False  # type: ignore[method-assign]  # a slow machine is not what is looked at
        for number in range(calls):
            tokens += await betray(server, number)
        await until(lambda: not server.streams)
        assert server.admin is not None
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{server.admin.port}/metrics") as response:
            metrics = await response.text()
        await server.stop()
    assert "telephony_" in metrics
    told = [
        *(canary for name, canary in CANARIES.items() if name != "digits"),
        *tokens,
        "CA0x",
    ]  # S12: no call is a label, and every label is one of a few
    assert [] == [canary for canary in told if canary.lstrip("+") in metrics]
    assert len(metrics.splitlines()) < 2000
    lines = written()
    text = "\n".join(lines)
    assert text.count('"stream_ended"') == 3 * calls
    found = [name for name, canary in CANARIES.items() if name != "digits" and canary.lstrip("+") in text]
    assert [] == found
    assert not re.search(rf'"digits":"?{CANARIES["digits"]}', text)
    assert [] == [token for token in tokens if token in text]
    assert [] == [line for line in lines if not line.isprintable()]
    assert [] == [line for line in lines if "Traceback" in line]


@pytest.mark.parametrize("bad", ["\x1b[2J", "a\nb", "a\r\nFAKE: 1", "\u202e", "\u2028", "\x00", "\x9b31m", "\ud800"])
async def test_s7_what_a_caller_is_called_can_not_write_lines_or_colours(guarded: Any, written: Any, bad: str) -> None:
    server = await guarded()
    body = urlencode(form_of("twilio", "CA1") | {"From": f"sip:{bad}@example.com", "To": bad}, errors="surrogatepass").encode()
    url = f"{PUBLIC}/twilio/answer"
    headers = dict(server.providers["twilio"].sign(SignedRequest.read("POST", url, {}, body)))
    headers["Content-Type"] = "application/x-www-form-urlencoded"
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"http://127.0.0.1:{server.port}/twilio/answer", data=body, headers=headers) as response,
    ):
        assert 200 == response.status
        ElementTree.fromstring(await response.text())  # noqa: S314 — S6: well-formed, whatever is in it
    lines = written()
    assert any("call_answered" in line for line in lines)
    assert all(line.isprintable() and json.loads(line) for line in lines)


# --- S5, S6, S9, S14, S16 ------------------------------------------------------------------------------------------------


@pytest.mark.allow_errors("service_lost")
async def test_s5_a_service_can_not_send_us_elsewhere(launch: Launch) -> None:
    """A redirect is not followed, and nothing that a caller says is in the URL."""
    from aiohttp import web

    asked: list[str] = []
    async with RecordingService() as secret_place:

        async def handler(asking: web.Request) -> web.Response:
            asked.append(str(asking.rel_url))
            return web.Response(status=302, headers={"Location": secret_place.url.replace("ws://", "http://")})

        app = web.Application()
        app.router.add_get("/call", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            service = {"kind": "websocket", "url": f"ws://127.0.0.1:{runner.addresses[0][1]}/call", "connect_timeout_secs": 1}
            server = await launch(services={"agent": service})
            parameters = {"url": "http://169.254.169.254/", "host": "@evil"}
            async with TwilioMedia(f"ws://127.0.0.1:{server.port}/twilio/stream", parameters=parameters) as call:
                await call.wait_closed(20)
        finally:
            await runner.cleanup()
    assert asked
    assert {"/call"} == set(asked)
    assert [] == secret_place.links


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "evil", ['"/></Stream></Connect><Dial>+1900</Dial>', "<!DOCTYPE x [<!ENTITY y 'z'>]>&y;", "]]><x/>", "'\"&<>\x00\x0b\ufffe"]
)
async def test_s6_no_word_of_a_caller_becomes_markup(guarded: Any, name: str, evil: str) -> None:
    server = await guarded()
    form, path = form_of(name, "CA1") | {"From": f"sip:{evil}@x", "To": evil}, f"/{name}/answer"
    status, body = await request(server, path, form, headers_for(server, name, PUBLIC + path, form))
    assert 200 == status
    tags = [element.tag for element in ElementTree.fromstring(body).iter()]  # noqa: S314 — our own
    assert {"Response", "Connect", "Stream", "ConversationRelay", "Parameter", "Redirect"} >= set(tags)


async def test_s9_nothing_is_inflated(guarded: Any) -> None:
    server = await guarded()
    url = minted("twilio", "CA1", 0)
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(here(server, url), compress=15, headers={"x-twilio-signature": twilio_signature(TOKEN, url)}) as socket,
    ):
        assert 0 == socket.compress
    form, path = form_of("twilio", "CA1"), "/twilio/answer"
    plain = urlencode(form).encode()
    good = headers_for(server, "twilio", PUBLIC + path, form) | {"Content-Type": "application/x-www-form-urlencoded"}
    for coding, packed in (
        ("gzip", gzip.compress(plain)),
        ("deflate", zlib.compress(plain)),
        ("gzip", gzip.compress(bytes(10**7))),
    ):
        async with (
            aiohttp.ClientSession(headers=good | {"Content-Encoding": coding}) as http,
            http.post(f"http://127.0.0.1:{server.port}{path}", data=packed) as response,
        ):
            assert (403, b"") == (response.status, await response.read())


async def test_s14_no_secret_is_shown_and_no_core_dumped(guarded: Any, tmp_path: Path) -> None:
    server = await guarded()
    shown = f"{server.settings!r} {server.settings.providers!r} {server.settings.services!r} {server.providers!r}"
    assert TOKEN not in shown
    assert SECRET not in shown
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "providers: {twilio: {kind: twilio_media_streams, auth: none}}\nservices: {e: {kind: echo}}\nroutes: [{service: e}]\n"
    )
    text = path.read_text() + 'listen: "127.0.0.1:0"\n'
    path.write_text(text)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "-c", str(path), stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(10):
            while b"listening" not in await process.stderr.readline():
                pass
        assert 0 == resource.prlimit(process.pid, resource.RLIMIT_CORE)[0]
    finally:
        process.terminate()
        await process.communicate()
    assert 0 == process.returncode


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("size", [65_537, 200_000, 20_000_000])
async def test_s16_a_body_has_at_most_64_kib(guarded: Any, size: int) -> None:
    server = await guarded()
    head = b"POST /twilio/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    sized = await raw(server, head + b"Content-Length: %d\r\n\r\n" % size, b"a" * size)
    chunks = b"".join(b"%x\r\n%s\r\n" % (8192, b"a" * 8192) for _ in range(size // 8192 + 1))
    chunked = await raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    for answer in (sized, chunked):
        assert re.match(rb"HTTP/1.1 413 |$", answer), answer[:100]


async def test_s16_many_fields_cost_little_and_are_refused(guarded: Any) -> None:
    server = await guarded()
    counter = count()
    for form in ({f"{next(counter)}": "" for _ in range(8000)}, {"a" * 60_000: "b"}, {"%" * 20_000: "%%%"}):
        path = "/plivo/answer"
        began = time.process_time()
        assert (
            403
            == (
                await request(
                    server, path, form, {"X-Plivo-Signature-V3": ",".join("a" * 200), "X-Plivo-Signature-V3-Nonce": "1"}
                )
            )[0]
        )
        assert time.process_time() - began < 1.0
    assert UPGRADE["upgrade"] == "websocket"
