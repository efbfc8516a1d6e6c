"""The doorkeeper without sockets: order of checks, counters that always come back, one remark a second."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from gateway.porter import Porters, Sight, Visitor
from gateway.provider import Call, SignedRequest
from gateway.tokens import Ticket
from tests.conftest import Launch
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
POST = b"POST /twilio/answer?x=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na=b"


def test_the_porter_reads_a_plain_upgrade() -> None:
    headers = {"host": "x", "upgrade": "WebSocket", "x-sig": "a b"}
    visitor = Visitor("twilio", "abc", "GET", "/twilio/stream/abc", headers)
    assert visitor == porter._read(HEAD)
    assert visitor == porter._read(HEAD + b"more")


def test_the_porter_reads_a_plain_webhook() -> None:
    headers = {"host": "x", "content-length": "3"}
    assert Visitor("twilio", None, "POST", "/twilio/answer?x=1", headers, b"a=b") == porter._read(POST)
    bare = b"GET /twilio/action HTTP/1.1\r\nHost: x\r\n\r\n"
    assert Visitor("twilio", None, "GET", "/twilio/action", {"host": "x"}) == porter._read(bare)


@pytest.mark.parametrize("whole", [HEAD, POST])
def test_the_porter_waits_for_the_rest(whole: bytes) -> None:
    assert {Sight.PIECE} == {porter._read(whole[:cut]) for cut in range(len(whole))}


@pytest.mark.parametrize(
    "path",
    [b"/", b"/x", b"/wp-login.php?a=b", b"/twilio/answers", b"/twilio/answer/", b"/twilio/answer/x", b"/twilio/stream/",
     b"/twilio/stream/a/b", b"//twilio/answer", b"/twilio/Stream/abc", b"/answer"],
)  # fmt: skip
def test_the_porter_knows_which_paths_lead_nowhere(path: bytes) -> None:
    for line in (HEAD, POST):
        method, _, rest = line.split(b" ", 2)
        assert Sight.NOWHERE is porter._read(b" ".join([method, path, rest]))


UNCLEAR = [
    HEAD.replace(b"GET", b"POST"),
    HEAD.replace(b"GET", b"get"),
    HEAD.replace(b"abc", b"a%20c"),
    HEAD.replace(b"abc", b"abc?x=1"),
    HEAD.replace(b"/abc", b""),
    HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"),
    HEAD.replace(b"WebSocket", b"h2c"),
    HEAD.replace(b"X-Sig", b"X Sig"),
    HEAD.replace(b"X-Sig", b"Host"),
    HEAD.replace(b"X-Sig", b" X-Sig"),
    HEAD.replace(b"a b", b"a\xe9b"),
    HEAD.replace(b"a b", b"a\x00b"),
    HEAD.replace(b"\r\n", b"\n"),
    HEAD.replace(b"twilio", b"tw.lio"),
    HEAD.replace(b"GET /", b"GET http://x/"),
    HEAD.replace(b"X-Sig", b"Expect"),
    POST.replace(b"answer", b"%61nswer"),
    POST.replace(b": 3", b": 2"),
    POST.replace(b": 3", b": +3"),
    POST.replace(b": 3", b": 3\r\nTransfer-Encoding: chunked"),
    POST.replace(b": 3", b": 3\r\nContent-Length: 3"),
    POST.replace(b": 3", b": 300\r\nExpect: 100-continue"),
    POST.replace(b": 3", b": 3\r\nUpgrade: websocket"),
    POST.replace(b": 3", b": 65537"),
    POST.replace(b"POST", b"PUT"),
    b"GET /twilio/stream\r\n\r\n",
    b"rubbish\r\nand more",
    b"\x16\x03\x01\xfc",
]


@pytest.mark.parametrize("data", UNCLEAR)
def test_the_porter_leaves_to_the_server_what_is_not_plain(data: bytes) -> None:
    assert Sight.UNCLEAR is porter._read(data)


class Behind(asyncio.Protocol):
    """In the HTTP server's place: says what it hears in capitals."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())


@asynccontextmanager
async def porters(*, admits: bool) -> AsyncIterator[tuple[Porters, list[Visitor], Any]]:
    """(the porters, whom they asked for, how to connect)."""
    asked: list[Visitor] = []
    made = Porters(Behind, lambda visitor: (asked.append(visitor), admits)[1])
    listener = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    writers: list[asyncio.StreamWriter] = []

    async def connect(*pieces: bytes) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.sockets[0].getsockname()[1])
        writers.append(writer)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02)
        return reader

    try:
        yield made, asked, connect
    finally:
        for writer in writers:
            writer.transport.abort()
        made.close()
        listener.close()


@pytest.mark.parametrize("whole", [HEAD, POST])
async def test_the_porter_puts_pieces_together_and_hands_on_every_byte(whole: bytes) -> None:
    async with porters(admits=True) as (made, asked, connect):
        for cut in (1, 20, len(whole) - 1):
            reader = await connect(whole[:cut], whole[cut:], b"more")
            assert (whole + b"more").upper() == await reader.readexactly(len(whole) + 4)
        assert not made.waiting
    assert 3 == len(asked)
    assert {len(asked[0].body)} == {len(visitor.body) for visitor in asked}


@pytest.mark.parametrize("whole", [HEAD, POST])
async def test_the_porter_refuses_whatever_comes_in_pieces(whole: bytes) -> None:
    async with porters(admits=False) as (_, asked, connect):
        for pieces in ([whole], [whole[:9], whole[9:50], whole[50:]]):
            reader = await connect(*pieces)
            assert (await reader.read()).startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert 2 == len(asked)
        reader = await connect(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 404 Not Found\r\n")
        assert 2 == len(asked)


async def test_the_porter_has_patience_for_so_many_pieces_bytes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porter, "FIRST_BYTES_SECS", 0.3)
    async with porters(admits=False) as (made, asked, connect):
        reader = await connect(*[b"G"] * porter._MOST_PIECES)
        assert b"G" * porter._MOST_PIECES == await reader.readexactly(porter._MOST_PIECES)
        long = b"GET /twilio/stream/abc HTTP/1.1\r\nX: " + b"Y" * porter._MOST_HELD_BYTES
        reader = await connect(long)
        assert long.upper() == await reader.readexactly(len(long))
        reader = await connect(HEAD[:40])
        assert 1 == len(made.waiting)
        async with asyncio.timeout(2):
            assert HEAD[:40].upper() == await reader.readexactly(40)
            silent = await connect()
            assert b"" == await silent.read()
        assert not made.waiting
    assert not asked


async def test_of_more_than_so_many_who_say_nothing_the_oldest_has_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porter, "MOST_WAITING", 3)
    async with porters(admits=True) as (made, _, connect):
        silent = [await connect() for _ in range(3)]
        late = await connect(HEAD)
        assert HEAD.upper() == await late.readexactly(len(HEAD))
        assert b"" == await silent[0].read()
        assert 2 == len(made.waiting)
        made.close()
        assert [b"", b""] == [await reader.read() for reader in silent[1:]]


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


async def test_the_porter_knows_every_path_of_the_server(launch: Launch) -> None:
    server = await launch()
    assert server._runner is not None
    paths = {
        re.sub(r"\{\w+\}", "x", resource.canonical)
        for resource in server._runner.app.router.resources()
        if not resource.canonical.startswith("/{path")
    }
    assert len(paths) > 5
    for path in paths:
        assert porter._PLACE.fullmatch(path.encode()), path
