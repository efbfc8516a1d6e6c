"""Calls by a carrier's own API: placing them, transferring them, ending them and not only their streams.

Providers say what to ask and what the answers mean; here is the socket. Nothing is asked twice: who asks knows what to repeat.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Literal
from urllib.parse import urlencode, urlsplit

import aiohttp
import structlog
from msgspec import Struct

from gateway.errors import RemoteError
from gateway.provider import ApiReply, HttpRequest, Provider

API_SECS = 5.0
"""How long a carrier's API may take to answer, connecting included."""

LARGEST_REPLY = 64 * 1024
"""Bytes; what an API says of one call has some two thousand."""

CONNECTIONS = 16
"""To all APIs at once; further requests wait, within their time."""

NUMBER = re.compile(r"\+?[0-9]{2,20}|sips?:[^\s<>@]{1,64}@[^\s<>@]{1,190}|client:[A-Za-z0-9_.-]{1,100}")
"""What can be called; what the account may call is the carrier's to say."""

DOCUMENT_URL = re.compile(r"https?://[!-~]{1,2000}")


class ApiFailed(RemoteError):
    """The carrier's API did not do it; the text says why, without credentials. `unknown`: it may have, for no answer came."""

    def __init__(self, text: str, *, unknown: bool = False) -> None:
        super().__init__(text)
        self.unknown = unknown


class Placement(Struct, frozen=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """An operator's order for a call: whom, showing what, and by which route (default: the first that fits)."""

    provider: str
    to: str
    from_: str
    route: str | None = None


class Transfer(Struct, frozen=True, forbid_unknown_fields=True):
    """What a call is to go on with: XML elements, or the URL that answers with a document."""

    xml: str = ""
    url: str = ""


class CallControl:
    """One process's client of carriers' APIs. Make it in a running loop; `close` it at the end."""

    def __init__(self, user_agent: str, count: Callable[[str, str, str], None] = lambda *_: None) -> None:
        """`count` is told of each request: the provider's name, what was asked, and the result."""
        self._count = count
        self._log = structlog.get_logger("gateway.callcontrol")
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS),
            timeout=aiohttp.ClientTimeout(total=API_SECS),
            headers={"User-Agent": user_agent},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small answer stays small
        )

    async def close(self) -> None:
        await self._http.close()

    async def place(self, name: str, provider: Provider, order: Placement, base_url: str) -> str:
        """Have the provider called `name` place a call, which comes in by its ordinary answer URL. Returns the carrier's call id.

        Raises ValueError for what is no number, UnsupportedCommand for what the carrier can't be asked, ApiFailed.
        """
        for key, number in (("to", order.to), ("from", order.from_)):
            if not NUMBER.fullmatch(number):
                raise ValueError(f"{key}: neither a number such as +14155550100 nor sip:somebody@example.com")
        base = f"{base_url}/{name}"
        query = f"?{urlencode({'route': order.route})}" if order.route is not None else ""
        request = provider.place_call(order.to, order.from_, f"{base}/answer{query}", status_url=f"{base}/status")
        reply = await self._ask(name, provider, request, "place")
        self._log.info(
            "call_placed", provider=name, call_id=reply.call_id, called=order.to, caller=order.from_, route=order.route
        )
        return reply.call_id

    async def hang_up(self, name: str, provider: Provider, call_id: str) -> Literal["done", "over"]:
        """End the call: `over` where it had ended. Raises UnsupportedCommand (no credentials) and ApiFailed."""
        reply = await self._ask(name, provider, provider.hang_up_call(call_id), "hangup")
        self._log.info("call_hung_up", provider=name, call_id=call_id, outcome=reply.outcome)
        return "over" if reply.outcome == "over" else "done"

    async def transfer(
        self, name: str, provider: Provider, call_id: str, to: Transfer, publish: Callable[[str], str] | None = None
    ) -> None:
        """Have the call go on otherwise; the carrier ends its stream. `publish` is for carriers that fetch their documents.

        Raises ValueError, UnsupportedCommand and ApiFailed.
        """
        if bool(to.xml.strip()) == bool(to.url):
            raise ValueError("give one of xml (elements such as <Dial>…</Dial>) and url (that answers with a document)")
        if to.url and not DOCUMENT_URL.fullmatch(to.url):
            raise ValueError("url: is no http:// or https:// URL")
        request = provider.transfer_call(call_id, xml=to.xml, url=to.url, publish=publish)
        await self._ask(name, provider, request, "transfer")
        self._log.info("call_transferred", provider=name, call_id=call_id, by="xml" if to.xml else "url")

    async def _ask(self, name: str, provider: Provider, request: HttpRequest, what: str) -> ApiReply:
        """What the API says to it: `done`; to a hang-up also `over`. Raises ApiFailed."""
        result = "failed"
        try:
            status, body = await self._perform(request)
            reply = provider.reply(status, body)
            result = reply.outcome
            if reply.outcome == "over" and what != "hangup":
                raise ApiFailed(f"the carrier knows no such live call: {reply.problem}")
            if reply.outcome == "refused":
                raise ApiFailed(f"the carrier refused: {reply.problem}")
            if what == "place" and not reply.call_id:
                raise ApiFailed(f"the carrier answered HTTP {status} and named no call", unknown=True)
        except ApiFailed as failed:
            result = "unknown" if failed.unknown else result
            self._log.warning("carrier_api_failed", what=what, api=urlsplit(request.url).netloc, error=str(failed))
            raise
        finally:
            self._count(name, what, result)
        return reply

    async def _perform(self, request: HttpRequest) -> tuple[int, bytes]:
        """Status and body. The URL stays out of what is raised: it has ids in its path."""
        host = urlsplit(request.url).netloc
        data: bytes | Mapping[str, str] | None = request.body or (dict(request.form) if request.form else None)
        try:
            async with self._http.request(
                request.method, request.url, headers=request.headers, data=data, allow_redirects=False
            ) as response:
                if 300 <= response.status < 400:
                    raise ApiFailed(f"{host} answered with a redirect, which is not followed; write the final api_url")
                body = b""
                async for piece in response.content.iter_any():
                    body += piece
                    if len(body) > LARGEST_REPLY:
                        raise ApiFailed(f"{host} answered with more than {LARGEST_REPLY} bytes", unknown=True)
                return response.status, body
        except TimeoutError:
            raise ApiFailed(
                f"{host} did not answer within {API_SECS:g} s, so whether it is done is not known", unknown=True
            ) from None
        except aiohttp.ClientConnectorError as error:
            raise ApiFailed(f"can't connect to {host}: {error.os_error.strerror or type(error).__name__}") from None
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise ApiFailed(
                f"{host} broke off ({type(error).__name__}), so whether it is done is not known", unknown=True
            ) from None
