"""A call as its carrier runs it, around its streams: asks the webhook, connects, and goes on as told when a socket is gone."""

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener
from uuid import uuid4
from xml.etree import ElementTree

from .audio import AudioPeer
from .conversation_relay import ConversationRelay
from .plivo import FORMATS, Plivo
from .twilio_media import ACCOUNT_SID, AUTH_TOKEN, TwilioMedia, signature
from .wire import Peer, Refused

TIMEOUT = 15.0
"""Seconds a webhook may take, with both carriers."""


class _Stay(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = build_opener(_Stay, ProxyHandler({}))


def _post(url: str, form: Mapping[str, str], headers: Mapping[str, str]) -> tuple[int, str]:
    """Status and body; status 0 where there was no connection."""
    request = Request(url, urlencode(form).encode(), dict(headers), method="POST")  # noqa: S310
    try:
        with _OPENER.open(request, timeout=TIMEOUT) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""


def plivo_post_signature(token: str, url: str, form: Mapping[str, str], nonce: str) -> str:
    """`X-Plivo-Signature-V3` of a POST with a body."""
    parts = urlsplit(url)
    query = "&".join(f"{name}={value}" for name, value in sorted(parse_qsl(parts.query, keep_blank_values=True)))
    body = "".join(name + value for name, value in sorted(form.items()))
    text = f"{parts.scheme}://{parts.netloc}{parts.path}?{query}{'.' if query else ''}{body}.{nonce}"
    return base64.b64encode(hmac.new(token.encode(), text.encode(), hashlib.sha256).digest()).decode()


P = TypeVar("P", bound=Peer)


class Calling(Generic[P]):
    """One call of `kind` (`TwilioMedia`, `ConversationRelay` or `Plivo`), asked for at `answer_url`.

    `options` go to each stream's double. `reach` maps a URL as the carrier knows it, and signs it, to where it is sent.
    Twilio asks the action of a `<Connect>`, Plivo goes on with the `<Redirect>` behind the `<Stream>`; when the caller hangs up,
    ConversationRelay asks once more and heeds no answer, and the others ask nothing. A webhook without a connection is asked once
    more; Plivo tries a stream three times.
    """

    def __init__(
        self,
        kind: type[P],
        answer_url: str,
        *,
        auth_token: str = AUTH_TOKEN,
        reach: Callable[[str], str] = str,
        on_attached: Callable[[P], None] | None = None,
        caller: str = "+15550100001",
        called: str = "+15550100002",
        most_streams: int = 100,
        **options: Any,
    ) -> None:
        self.kind, self.answer_url, self.auth_token, self.reach, self.options = kind, answer_url, auth_token, reach, options
        self.on_attached, self.caller, self.called, self.most_streams = on_attached, caller, called, most_streams
        self.streams: list[P] = []
        """Every stream that was connected; the last is the present one, if any."""
        self.gaps: list[float] = []
        """Seconds from the end of a stream to the next one's start frame."""
        self.asked: list[tuple[str, dict[str, str], int]] = []
        """(URL, form, status) of each webhook; status 0: no connection."""
        self.refused: list[Refused] = []
        """Streams that could not be connected."""
        self.ended_with: str | None = None
        """The document that ended the call; "" when none was had; None while it lasts or when the caller hung up."""
        self.over = asyncio.Event()
        self.lost_frames = 0
        """Of what the caller said: 20 ms each, for which there was no stream."""
        self.call_id = str(uuid4()) if issubclass(kind, Plivo) else f"CA{uuid4().hex}"
        self.hung_up = False
        self._group = asyncio.TaskGroup()
        self._attached = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._running = self._group.create_task(self._run())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            await self.hangup()
        else:
            self._running.cancel()
        await self._group.__aexit__(kind, error, trace)

    @property
    def peer(self) -> P | None:
        """The stream that is up."""
        return self.streams[-1] if self.streams and not self.streams[-1].closed.is_set() else None

    async def attached(self, count: int = 1, timeout: float = 10.0) -> P:  # noqa: ASYNC109
        """Wait for the stream number `count`."""
        async with asyncio.timeout(timeout), self._attached:
            await self._attached.wait_for(lambda: len(self.streams) >= count)
        return self.streams[count - 1]

    async def hangup(self) -> None:
        """The caller hangs up; returns when the call is over."""
        if not self.over.is_set():
            self.hung_up = True
            if (peer := self.peer) is not None:
                await peer.hangup()
            elif not self._running.done() and not self.streams:
                self._running.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.shield(self._running)

    async def speak(self, audio: bytes) -> None:
        """Say this in real time, whatever becomes of the streams meanwhile; what finds none is lost."""
        peer = await self.attached()
        assert isinstance(peer, AudioPeer)
        step, begun = 20 * peer.bytes_per_ms, monotonic()
        for number, at in enumerate(range(0, len(audio), step)):
            await asyncio.sleep(max(0.0, begun + number / 50 - monotonic()))
            now = self.peer
            if not isinstance(now, AudioPeer) or not await now.speak(audio[at : at + step], pace="fast"):
                self.lost_frames += 1

    # The carrier.

    async def _run(self) -> None:
        try:
            document: str | None = await self._ask(self.answer_url, self._form("first"))
            ended: float | None = None
            while document is not None and len(self.streams) < self.most_streams:
                found = self._stream(document)
                if found is None:
                    self.ended_with = document
                    return
                url, options, action = found
                peer = await self._connect(url, options, ended)
                ended = monotonic()
                if self.hung_up:
                    if peer is not None and action and isinstance(peer, ConversationRelay):
                        await self._ask(urljoin(self.answer_url, action), self._form("completed", peer))
                    return
                if not action:
                    self.ended_with = document
                    return
                document = await self._ask(urljoin(self.answer_url, action), self._form("failed", peer))
            self.ended_with = ""
        finally:
            self.over.set()

    async def _connect(self, url: str, options: dict[str, Any], ended: float | None) -> P | None:
        """Runs one stream until its socket is gone."""
        for _ in range(3 if issubclass(self.kind, Plivo) else 1):
            own = {"auth_token": self.auth_token, "public_url": url, "seed": uuid4().int}
            peer = self.kind(self.reach(url), **own | self.options | options)
            if isinstance(peer, TwilioMedia | ConversationRelay):
                peer.call_sid = self.call_id
            elif isinstance(peer, Plivo):
                peer.call_id = self.call_id
            try:
                async with peer:
                    if ended is not None:
                        self.gaps.append(monotonic() - ended)
                    if self.on_attached is not None:
                        self.on_attached(peer)
                    async with self._attached:
                        self.streams.append(peer)
                        self._attached.notify_all()
                    await peer.closed.wait()
                return peer
            except Refused as refused:
                self.refused.append(refused)
            if self.hung_up:
                break
        return None

    async def _ask(self, url: str, form: dict[str, str]) -> str | None:
        for _ in range(2):
            status, body = await asyncio.to_thread(_post, self.reach(url), form, self._signature(url, form))
            self.asked.append((url, form, status))
            if status:
                return body if status == 200 else None
        return None

    def _signature(self, url: str, form: Mapping[str, str]) -> dict[str, str]:
        if not issubclass(self.kind, Plivo):
            return {"X-Twilio-Signature": signature(self.auth_token, url, form)}
        nonce = f"{len(self.asked) + 5429567804466091622:020d}"
        signed = plivo_post_signature(self.auth_token, url, form, nonce)
        return {"X-Plivo-Signature-V3": signed, "X-Plivo-Signature-V3-Nonce": nonce}

    def _form(self, when: str, peer: Peer | None = None) -> dict[str, str]:
        if issubclass(self.kind, Plivo):
            return {
                "CallUUID": self.call_id,
                "From": self.caller.removeprefix("+"),
                "To": self.called.removeprefix("+"),
                "Direction": "inbound",
                "CallStatus": "ringing" if when == "first" else "in-progress",
                "Event": "StartApp" if when == "first" else "Redirect",
            }
        form = {
            "AccountSid": ACCOUNT_SID,
            "ApiVersion": "2010-04-01",
            "CallSid": self.call_id,
            "CallStatus": {"first": "ringing", "completed": "completed"}.get(when, "in-progress"),
            "Direction": "inbound",
            "From": self.caller,
            "To": self.called,
        }
        if when != "first" and isinstance(peer, ConversationRelay):
            status = "ended" if peer.ended else when
            form |= {"SessionId": peer.session_id, "SessionStatus": status, "SessionDuration": "1"}
            if peer.handoff is not None:
                form["HandoffData"] = peer.handoff
            if status == "failed":
                form |= {"ErrorCode": "64105", "ErrorMessage": "Websocket ended"}
        return form

    def _stream(self, document: str) -> tuple[str, dict[str, Any], str | None] | None:
        """(URL, options of the double, what to ask afterwards) of the stream in a document; None: there is none."""
        try:
            verbs = [*ElementTree.fromstring(document)]  # noqa: S314
        except ElementTree.ParseError:
            return None
        for at, verb in enumerate(verbs):
            if issubclass(self.kind, Plivo):
                if verb.tag == "Stream":
                    kind, _, rate = verb.get("contentType", "").partition(";rate=")
                    assert (kind, int(rate)) in FORMATS
                    follows = verbs[at + 1 :]
                    action = (follows[0].text or "").strip() if follows and follows[0].tag == "Redirect" else None
                    options = {"encoding": kind, "sample_rate": int(rate), "extra_headers": verb.get("extraHeaders", "")}
                    return (verb.text or "").strip(), options, action
            elif verb.tag == "Connect":
                noun = verb[0]
                parameters = {each.get("name", ""): each.get("value", "") for each in noun if each.tag == "Parameter"}
                options = {"parameters": parameters}
                if noun.tag == "ConversationRelay":
                    options |= {"welcome_greeting": noun.get("welcomeGreeting", "")}
                    if self.streams:
                        options |= {"call_status": "IN_PROGRESS"}
                return noun.get("url", ""), options, verb.get("action")
        return None
