"""Who is let in: signatures, one-use stream tokens, admission. The listener asks here before it does any work."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Mapping

from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from gateway.admission import Admission, client_address, networks
from gateway.errors import RemoteError, SignatureMismatch
from gateway.events import Start
from gateway.ledger import Ledger
from gateway.provider import Call, Provider, SignedRequest
from gateway.settings import Settings
from gateway.tokens import NONCE_BYTES, Ticket, TokenError, Tokens

REMARK_SECS = 1.0
"""One line a second tells of refusals, however many there are."""


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
        self, settings: Settings, providers: Mapping[str, Provider], log: FilteringBoundLogger, remarks: Remarks | None = None
    ) -> None:
        self._settings = settings
        self._providers = providers
        self._log = log
        # Without a secret only loopback is served, and a restart may well forget the streams it has named.
        secret = settings.secret or secrets.token_hex(32)
        self._tokens = Tokens(secret)
        self._ledger = Ledger(secret)
        self._trusted = networks(settings.trusted_proxies)
        self.admission = Admission(settings.max_calls, settings.max_calls_per_second, settings.max_pending_per_address)
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
            return self.admission.started(f"{name}/{start.call_id}", admitted.address, now)
        self.leave(admitted)
        self.remarks.tell("stream_refused", now, provider=name, reason=wrong)
        return wrong

    def leave(self, admitted: Pass) -> None:
        """A connection that was let in is over and never started."""
        self.admission.connection_over(admitted.address)

    def left(self, name: str, call_id: str, now: float) -> None:
        """A stream that had entered is over."""
        self.admission.ended(f"{name}/{call_id}", now)

    def close(self) -> None:
        self._ledger.close()


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
