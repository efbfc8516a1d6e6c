"""Who is let in: signatures, one-use stream tokens, admission. The listener asks here before it does any work."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping

from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from gateway.admission import Admission, client_address, networks
from gateway.diary import FINGERPRINT_BYTES, Entry, Kind, Verdict, judge, unpack
from gateway.errors import RemoteError, SignatureMismatch, UnsupportedCommand
from gateway.events import Start
from gateway.ledger import Book, Ledger
from gateway.provider import Call, Provider, SignedRequest
from gateway.settings import Settings
from gateway.shares import Shares
from gateway.tokens import NONCE_BYTES, Ticket, TokenError, Tokens

REMARK_SECS = 1.0
"""One line a second tells of refusals, however many there are."""


ENDING_SECS = 3.0
"""A call's stream has this long to end before what its carrier says again, as if it had, is a replay."""


class Refused(RemoteError):
    """Not let in: answer with `status` and say nothing else. `reason` is a metric label."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Pass(Struct):
    """A connection that was let in and has not started. `ticket` is None where a provider needs none (`auth: none`)."""

    address: str
    ticket: Ticket | None


class Door:
    """One process's doorkeeper. `now` is the event loop's clock; tokens use the wall clock."""

    def __init__(
        self,
        settings: Settings,
        providers: Mapping[str, Provider],
        log: FilteringBoundLogger,
        remarks: Remarks | None = None,
        *,
        ledger: Book | None = None,
        shares: Shares | None = None,
    ) -> None:
        """`ledger` is what doors of one secret remember together; without one, this host's."""
        self._settings = settings
        self._providers = providers
        self._log = log
        # Without a secret only loopback is served, and a restart may well forget the streams it has named.
        self.secret = settings.secret or (shares.secret if shares is not None else secrets.token_hex(32))
        self._tokens = Tokens(self.secret)
        self._ledger: Book = ledger if ledger is not None else Ledger(self.secret)
        self._trusted = networks(settings.trusted_proxies)
        self.admission = Admission(
            settings.max_calls, settings.max_calls_per_second, settings.max_pending_per_address, others=shares
        )
        self.remarks = remarks or Remarks(log.warning)
        self._forwarded_unbelieved = False
        if self._ledger.problem:
            log.warning("tokens_not_shared", problem=self._ledger.problem)

    def renewed(self, settings: Settings, providers: Mapping[str, Provider]) -> Door:
        """A door for the calls to come, which shares with this one all that both must know: tokens, slots. The secret stays."""
        door = copy.copy(self)
        door._settings = settings
        door._providers = providers
        door._trusted = networks(settings.trusted_proxies)
        door._forwarded_unbelieved = False
        self.admission.limit(settings.max_calls, settings.max_calls_per_second, settings.max_pending_per_address)
        return door

    def address(self, peer: str | None, forwarded_for: str, now: float) -> str:
        """Whose connection it is: the peer, or what a trusted proxy says of it in all its X-Forwarded-For, joined by commas."""
        address = client_address(peer, forwarded_for, self._trusted)
        if forwarded_for and not self._forwarded_unbelieved and address == client_address(peer, "", ()):
            self._forwarded_unbelieved = True  # said once: whoever likes can send this header
            self.remarks.tell("forwarded_for_not_believed", now, peer=address, hint="is it a proxy of yours? trusted_proxies")
        return address

    def authenticate(self, name: str, request: SignedRequest, now: float) -> None:
        """Raises Refused 403 unless the provider's account signed this request. The log names the URL forms that were tried."""
        try:
            self._providers[name].authenticate(request)
        except SignatureMismatch as error:
            if self.remarks.due("signature_refused", now):
                self.remarks.tell("signature_refused", now, provider=name, why=str(error), tried=error.tried)
            raise Refused(403, "signature") from None

    async def recognize(self, name: str, request: SignedRequest, call: Call, *, asks_for_stream: bool) -> None:
        """Whether a signed webhook is the carrier's. Raises Refused 403 where somebody says again what the carrier has said.

        One that asks for a stream is noted by `answered`, once it got one; every other one is noted here.
        """
        patience = asyncio.get_running_loop().time() + ENDING_SECS
        while (verdict := self._judge(name, request, call, asks_for_stream)) is Verdict.EARLY:
            if asyncio.get_running_loop().time() > patience:
                break
            await asyncio.sleep(0.1)
        if verdict is Verdict.EARLY or verdict is Verdict.REPLAY:
            self.remarks.tell("webhook_replayed", asyncio.get_running_loop().time(), provider=name, call_id=call.call_id)
            raise Refused(403, "replay")
        if verdict is Verdict.FRESH and not asks_for_stream:
            self._note(name, call.call_id, Kind.ANSWERED, request)
        if verdict is Verdict.FRESH and call.over:
            self.over(name, call.call_id)

    def answered(self, name: str, request: SignedRequest, call: Call) -> None:
        """A webhook that asked for a stream got one: said again once that has started, it is a replay."""
        if self._judge(name, request, call, True) is Verdict.FRESH:
            self._note(name, call.call_id, Kind.ANSWERED, request)

    def over(self, name: str, call_id: str) -> None:
        """The whole call is over: no stream of it will be asked for any more."""
        if self._signs(name):
            self._note(name, call_id, Kind.OVER)

    def announce(self, name: str, call: Call, route: str, now: float) -> str:
        """A call's webhook is about to be answered: keeps a slot for it and returns a token that lets one stream of it in.

        Raises Refused 503 when there is no slot, MalformedFrame when the call's id is none; then nothing is kept.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        token = self._tokens.mint(name, call.call_id, route, now=time.time(), nonce=nonce)
        refusal = self.admission.reserve(f"{name}/{call.call_id}", now)
        if refusal is not None:
            self.remarks.tell("call_refused", now, provider=name, reason=refusal)
            raise Refused(503, refusal)
        return token

    def ticket(self, name: str, token: str, now: float) -> Ticket | None:
        """What the token of a stream's URL says; None where none is needed. Raises Refused 403. Go on to `knock` with it."""
        if not token and self._settings.providers[name].auth == "none":
            return None
        try:
            ticket = self._tokens.read(token, name, now=time.time())
        except TokenError as error:
            self.remarks.tell("token_refused", now, provider=name, reason=error.reason)
            raise Refused(403, "token") from None
        if self._ledger.used(ticket.nonce, ticket.expires):
            self.remarks.tell("token_refused", now, provider=name, reason="used")
            raise Refused(403, "token")
        return ticket

    def publish(self, name: str, document: str) -> str:
        """What stands at the end of the one URL at which this provider, and nobody else, gets this document, once and soon.

        Raises UnsupportedCommand if it is too long for that.
        """
        try:
            return self._tokens.seal(document, name, now=time.time(), nonce=secrets.token_bytes(NONCE_BYTES))
        except ValueError as error:
            raise UnsupportedCommand(f"xml: {error}; give a url that answers with it") from None

    def document(self, name: str, sealed: str, now: float) -> str:
        """The document of such a URL, whose request was authenticated. Raises Refused 403."""
        try:
            found = self._tokens.unseal(sealed, name, now=time.time())
            reason = "" if self._ledger.use(found.nonce, found.expires, time.time()) else "used"
        except TokenError as error:
            reason = error.reason
        if reason:
            self.remarks.tell("token_refused", now, provider=name, reason=reason)
            raise Refused(403, "token")
        return found.text

    def knock(self, name: str, request: SignedRequest, ticket: Ticket | None, address: str, now: float) -> Pass:
        """A connection asks for an upgrade. Raises Refused. Call `enter` or `leave` with what it returns, once."""
        self.authenticate(name, request, now)
        refusal = self.admission.connect(address, now)
        if refusal is not None:
            self.remarks.tell("connection_refused", now, provider=name, reason=refusal)
            raise Refused(503, refusal)
        return Pass(address, ticket)

    def enter(self, name: str, admitted: Pass, start: Start, now: float) -> str | None:
        """The start frame has come: None, and call `left` when the stream is over; else why it is not let in.

        Only now is the token used up: a carrier's own connect retries are good until a start frame has come.
        """
        ticket = admitted.ticket
        wrong = None
        if ticket is not None:
            if ticket.call_id != start.call_id:
                wrong = "other_call"
            elif not self._ledger.use(ticket.nonce, ticket.expires, time.time()):
                wrong = "token_used"
        if wrong is None:
            refusal = self.admission.started(f"{name}/{start.call_id}", admitted.address, now)
            if refusal is None and ticket is not None:
                self._note(name, start.call_id, Kind.ENTERED)
            return refusal
        self.leave(admitted)
        self.remarks.tell("stream_refused", now, provider=name, reason=wrong)
        return wrong

    def leave(self, admitted: Pass) -> None:
        """A connection that was let in is over and never started."""
        self.admission.connection_over(admitted.address)

    def left(self, name: str, call_id: str, now: float) -> None:
        """A stream that had entered is over."""
        self.admission.ended(f"{name}/{call_id}", now)
        if self._signs(name) and not self.admission.has_stream(f"{name}/{call_id}"):
            self._note(name, call_id, Kind.LEFT)

    def close(self) -> None:
        self._ledger.close()

    def _signs(self, name: str) -> bool:
        return self._settings.providers[name].auth != "none"

    def _judge(self, name: str, request: SignedRequest, call: Call, asks_for_stream: bool) -> Verdict:
        identity = self._providers[name].identity(request)
        if identity is None:
            return Verdict.RETRY  # nobody can tell, and nothing is noted
        now = time.time()
        subject = _subject(name, call.call_id)
        if identity.nonce:  # which may cover nothing of the body: then the same one could name any call
            calls = [entry.fingerprint for entry in unpack(self._ledger.notes(_subject(name, identity.text), now))]
            if any(each != _fingerprint(subject) for each in calls):
                return Verdict.REPLAY
        diary = unpack(self._ledger.notes(subject, now))
        fingerprint = _fingerprint(_subject(name, identity.text))
        return judge(diary, fingerprint, now, asks_for_stream=asks_for_stream, nonce=identity.nonce)

    def _note(self, name: str, call_id: str, kind: Kind, request: SignedRequest | None = None) -> None:
        identity = self._providers[name].identity(request) if request is not None else None
        now, subject = time.time(), _subject(name, call_id)
        entry = Entry(kind, int(now))
        if identity is not None:
            said = _subject(name, identity.text)
            entry = Entry(kind, int(now), _fingerprint(said))
            if identity.nonce:
                self._ledger.note(said, Entry(kind, int(now), _fingerprint(subject)).pack(), now)
        self._ledger.note(subject, entry.pack(), now)


def _subject(name: str, text: str) -> bytes:
    return f"{name}/{text}".encode("utf-8", "surrogatepass")


def _fingerprint(subject: bytes) -> bytes:
    return hashlib.sha256(subject).digest()[:FINGERPRINT_BYTES]


class Remarks:
    """One line a second per event; the next one says how many were not told."""

    def __init__(self, log: Callable[..., object]) -> None:
        self._log = log
        self._last: dict[str, float] = {}
        self._untold: dict[str, int] = {}

    def due(self, event: str, now: float) -> bool:
        """Whether `tell` would write a line; if not, the event is counted. For what is dear to describe."""
        if now - self._last.get(event, float("-inf")) < REMARK_SECS:
            self._untold[event] = self._untold.get(event, 0) + 1
            return False
        return True

    def tell(self, event: str, now: float, log: Callable[..., object] | None = None, **values: object) -> None:
        if not self.due(event, now):
            return
        self._last[event] = now
        (log or self._log)(event, untold=self._untold.pop(event, 0), **values)
