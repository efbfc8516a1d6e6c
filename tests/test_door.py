"""The doorkeeper without sockets: order of checks, counters that always come back, one remark a second."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway import config, porter
from gateway.cli import make_server
from gateway.door import Door, Refused, Remarks
from gateway.errors import MalformedFrame
from gateway.events import Start
from gateway.media import MULAW_8K
from gateway.porter import Porters, Visitor
from gateway.provider import Call, SignedRequest
from gateway.tokens import Ticket
from tests.test_doctor import document

README = Path(__file__).parent.parent / "README.md"


def make(**options: Any) -> Door:
    settings = config.parse(json.dumps(document(8080, **options)))
    return Door(settings, make_server(settings).providers, structlog.get_logger())


def request(door: Door, url: str) -> SignedRequest:
    bare = SignedRequest("GET", url, {"upgrade": "websocket"})
    return SignedRequest("GET", url, dict(bare.headers) | dict(door._providers["twilio"].sign(bare)))


def start(call_id: str) -> Start:
    return Start(stream_id="MZ1", call_id=call_id, media_format=MULAW_8K)


def knock(door: Door, call_id: str, now: float) -> tuple[Any, Ticket | None]:
    token = door.announce("twilio", Call(call_id), "route-0", now)
    ticket = door.ticket("twilio", token, now)
    return door.knock("twilio", request(door, f"wss://x/twilio/stream/{token}"), ticket, "192.0.2.1", now), ticket


def counts(door: Door) -> tuple[int, int]:
    return door.admission.pending, door.admission.calls


def test_a_call_from_the_webhook_to_its_end() -> None:
    door = make()
    admitted, ticket = knock(door, "CA1", 0)
    assert ticket is not None
    assert ("CA1", "route-0", (1, 1)) == (ticket.call_id, ticket.route, counts(door))
    assert door.enter("twilio", admitted, start("CA1"), 1) is None
    assert (0, 1) == counts(door)
    door.left("twilio", "CA1", 2)
    assert (0, 0) == counts(door)


@pytest.mark.parametrize("end", ["leaves", "other call", "used", "no room"])
def test_whatever_becomes_of_a_connection_its_place_is_free_again(end: str) -> None:
    door = make(max_calls=1)
    admitted, ticket = knock(door, "CA1", 0)
    match end:
        case "leaves":
            door.leave(admitted)
        case "other call":
            assert "other_call" == door.enter("twilio", admitted, start("CA2"), 1)
        case "used":
            assert ticket is not None
            assert door._ledger.use(ticket.nonce, ticket.expires, time.time())
            assert "token_used" == door.enter("twilio", admitted, start("CA1"), 1)
        case _:
            assert door.admission.started("twilio/CA9", "192.0.2.9", 100) is None  # the reservation has expired
            assert "max_calls" == door.enter("twilio", admitted, start("CA1"), 101)
    assert 0 == door.admission.pending


def test_a_refused_knock_leaves_nothing_behind() -> None:
    door = make(max_pending_per_address=1)
    _, ticket = knock(door, "CA1", 0)
    with pytest.raises(Refused) as caught:
        door.knock("twilio", SignedRequest("GET", "wss://x/", {"upgrade": "websocket"}), ticket, "192.0.2.1", 0)
    assert (403, "signature") == (caught.value.status, caught.value.reason)
    with pytest.raises(Refused) as caught:
        knock(door, "CA2", 0)
    assert (503, "pending") == (caught.value.status, caught.value.reason)
    assert 1 == door.admission.pending


def test_a_call_that_can_not_be_named_or_has_no_room_keeps_no_slot() -> None:
    door = make(max_calls=1)
    with pytest.raises(MalformedFrame):
        door.announce("twilio", Call("x" * 200), "route-0", 0)
    assert (0, 0) == counts(door)
    door.announce("twilio", Call("CA1"), "route-0", 0)
    with pytest.raises(Refused) as caught:
        door.announce("twilio", Call("CA2"), "route-0", 0)
    assert (503, "max_calls", (0, 1)) == (caught.value.status, caught.value.reason, counts(door))
    door.announce("twilio", Call("CA1"), "route-0", 0)  # its carrier asks once more


def test_a_used_token_is_refused_before_anything_else_is_looked_at() -> None:
    door = make()
    token = door.announce("twilio", Call("CA1"), "route-0", 0)
    ticket = door.ticket("twilio", token, 0)
    assert ticket is not None
    assert door._ledger.use(ticket.nonce, ticket.expires, time.time())
    with pytest.raises(Refused) as caught:
        door.ticket("twilio", token, 0)
    assert (403, "token") == (caught.value.status, caught.value.reason)


def test_remarks_are_one_line_a_second_and_count_the_rest() -> None:
    told: list[tuple[str, Any]] = []
    remarks = Remarks(lambda event, **values: told.append((event, values)))
    for number in range(1000):
        remarks.tell("a", number / 1000, number=number)
    assert remarks.due("a", 1.0)
    remarks.tell("b", 0.5)
    remarks.tell("a", 1.0, number=1000)
    assert [("a", {"untold": 0, "number": 0}), ("b", {"untold": 0}), ("a", {"untold": 999, "number": 1000})] == told


HEAD = b"GET /twilio/stream/abc HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\nX-Sig:  a b \r\n\r\n"


def test_the_porter_reads_a_plain_upgrade() -> None:
    headers = {"host": "x", "upgrade": "WebSocket", "x-sig": "a b"}
    assert Visitor("twilio", "abc", "/twilio/stream/abc", headers) == porter._visitor(HEAD)
    assert Visitor("twilio", "abc", "/twilio/stream/abc", headers) == porter._visitor(HEAD + b"more")


@pytest.mark.parametrize(
    "data",
    [
        HEAD[:-2],
        HEAD.replace(b"GET", b"POST"),
        HEAD.replace(b"GET", b"get"),
        HEAD.replace(b"abc", b"a%20c"),
        HEAD.replace(b"abc", b"abc?x=1"),
        HEAD.replace(b"abc", b"abc/"),
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HEAD.replace(b"WebSocket", b"h2c"),
        HEAD.replace(b"X-Sig", b"X Sig"),
        HEAD.replace(b"X-Sig", b"Host"),
        HEAD.replace(b"X-Sig", b" X-Sig"),
        HEAD.replace(b"a b", b"a\xe9b"),
        HEAD.replace(b"a b", b"a\x00b"),
        HEAD.replace(b"\r\n", b"\n"),
        b"",
        b"\x16\x03\x01",
    ],
)
def test_the_porter_leaves_to_the_server_what_is_not_plain(data: bytes) -> None:
    assert porter._visitor(data) is None


async def test_the_porter_hands_on_every_byte_and_ends_what_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Behind(asyncio.Protocol):
        got = b""

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            Behind.got += data
            self.transport.write(data.upper())

    monkeypatch.setattr(porter, "FIRST_BYTES_SECS", 0.2)
    asked: list[Visitor] = []
    porters = Porters(Behind, lambda visitor: bool(asked.append(visitor)))
    listener = await asyncio.get_running_loop().create_server(porters, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in (b"hel", b"lo"):
        writer.write(piece)
        assert piece.upper() == await reader.readexactly(len(piece))
    writer.close()
    assert b"hello" == Behind.got
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD)
    assert (await reader.read()).startswith(b"HTTP/1.1 403 Forbidden\r\n")
    writer.close()
    assert ["abc"] == [visitor.token for visitor in asked]
    silent, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(2):
        assert b"" == await silent.read()
    writer.close()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(0.05)
    assert 1 == len(porters.waiting)
    porters.close()
    await asyncio.sleep(0.05)
    assert not porters.waiting
    writer.close()
    listener.close()


def test_the_readmes_configuration_would_start(tmp_path: Path) -> None:
    section = README.read_text().partition("## Connect a number")[2]
    found = re.search(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert found
    text = found[1]
    for name in ("fullchain", "privkey"):
        (tmp_path / f"{name}.pem").write_text("-")
        text = text.replace(f"/etc/gateway/{name}.pem", str(tmp_path / f"{name}.pem"))
    environ = dict.fromkeys(("GATEWAY_SECRET", "TWILIO_AUTH_TOKEN", "PLIVO_AUTH_TOKEN"), "3d1e8b60c4f7a92e5b08d6c17f4a3e92")
    settings = config.parse(text, environ=environ)
    assert {"twilio", "plivo"} == set(settings.providers)
    assert {None} == {entry.auth for entry in settings.providers.values()}
