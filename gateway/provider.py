"""What a provider must be. A provider turns wire frames into events and commands into wire frames, and nothing else:
it never opens a socket, reads a clock, logs, or touches samples.

Every wire protocol is written twice, as mirror halves: `Codec` is our half, `Carrier` the other one. The simulator plays
a carrier with the second; conformance tests plug the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Literal, Protocol, runtime_checkable
from urllib.parse import parse_qsl

from msgspec import Struct, field

from gateway.events import Command, Event, Message
from gateway.media import MediaFormat

MOST_FIELDS = 1000
"""Of one form or query; sorting more is work for nobody's benefit. Carriers send some thirty."""


class SignedRequest(Struct, frozen=True):
    """A carrier's HTTP request as it reached us.

    `url` is the public URL, character for character as the carrier dialled it (built from `public_url`, never from Host);
    header names are lower case; `body` is raw; `form` is the decoded form or query, first value wins. Signatures are checked
    against `url` and `body` alone, so `form` must say what they say: `read` sees to that.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    form: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, method: str, url: str, headers: Mapping[str, str], body: bytes = b"") -> SignedRequest:
        """The request with its form read as a signature covers it: from the raw body of a POST, else from the query.

        Always UTF-8, never by the unsigned Content-Type, which could give the same body another meaning. Never raises.
        """
        encoded = body.decode(errors="replace") if method == "POST" else url.partition("#")[0].partition("?")[2]
        try:
            pairs = parse_qsl(encoded, keep_blank_values=True, max_num_fields=MOST_FIELDS)
        except ValueError:
            pairs = []
        lower = {name.lower(): value for name, value in headers.items()}
        return cls(method, url, lower, body, dict(reversed(pairs)))


class Identity(Struct, frozen=True):
    """What makes a signed request that one: `text` is of what the signature covers, and nobody else can make another one of it.

    `nonce`: the carrier signs one, and never says the same twice; else a call that comes back says what it said before.
    """

    text: str
    nonce: bool = False


class Answer(Struct, frozen=True):
    """The reply to a carrier's webhook. `ends_call`: the carrier has nothing left to do with the call."""

    body: str
    content_type: str = "application/xml"
    status: int = 200
    ends_call: bool = False


class HttpRequest(Struct, frozen=True):
    """A request somebody else shall perform: providers return values and never open a socket. It has a form or a raw body."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    form: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def __repr__(self) -> str:
        """Headers hold credentials, forms and bodies numbers."""
        return f"HttpRequest({self.method} {self.url}, headers={[*self.headers]}, …)"


class ApiReply(Struct, frozen=True):
    """What a carrier's API answered. `over`: the call has ended already; `problem` tells an operator why it was not `done`."""

    outcome: Literal["done", "over", "refused"]
    call_id: str = ""
    problem: str = ""


class Call(Struct, frozen=True):
    """A call as a carrier knows it before any stream exists. `over`: the carrier says that it has ended."""

    call_id: str
    caller: str = ""
    called: str = ""
    direction: str = "inbound"
    account_id: str = ""
    over: bool = False


class StreamStatus(Struct, frozen=True):
    """What a carrier's status callback says of a stream: ids are empty, and the event is `other`, where it tells none we know."""

    call_id: str
    stream_id: str
    event: Literal["started", "stopped", "failed", "degraded", "other"]
    reason: str = ""


class Dial(Struct, frozen=True):
    """A carrier's reading of an answer: where to connect, what to say in the start frame, whom to ask and tell afterwards.

    `greeting` is what a carrier of text says to the caller of its own accord.
    """

    url: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    media_format: MediaFormat | None = None
    tracks: tuple[str, ...] = ("inbound",)
    bidirectional: bool = True
    action_url: str | None = None
    greeting: str = ""
    status_url: str | None = None


class StreamEnd(Struct, frozen=True):
    """How a stream ended that a carrier asks after: by our `request`, by its socket's `failure`, or by the caller's `hangup`."""

    stream_id: str
    cause: Literal["request", "failure", "hangup"]
    duration_secs: int = 0
    handoff: str | None = None


class Limits(Struct, frozen=True):
    """What may be on its way to this carrier. Milliseconds of audio.

    `lead_ms` ahead of real time by default, never more than `ceiling_ms`; a live frame lasts `frame_ms`, a frame out of a
    backlog at most `max_frame_ms`.
    """

    lead_ms: int = 200
    ceiling_ms: int = 5000
    frame_ms: int = 20
    max_frame_ms: int = 60


class Habits(Struct, frozen=True):
    """How a carrier behaves, for doubles that play one: documented behaviour, no guesses.

    `text` — it carries words, not audio. `says_stop` — it sends a stop before it closes. `echoes_cleared` — a clear sends
    back the marks it cut as if they had played. `confirms_clear` — a clear is acknowledged. `subprotocol` — it offers this.
    `id_prefixes` — of call, stream and account, before 32 hexadecimal digits; None: UUIDs.
    `stream_attempts` — how often it tries to connect a stream. `webhook_retries` — of a webhook whose connection fails, and with
    `retries_silence` of one that is not answered in time. `tells_hangup` — the action is asked after a hang-up too, for nothing.
    """

    text: bool = False
    says_stop: bool = True
    echoes_cleared: bool = False
    confirms_clear: bool = False
    subprotocol: str | None = None
    id_prefixes: tuple[str, str, str] | None = None
    stream_attempts: int = 1
    webhook_retries: int = 1
    retries_silence: bool = False
    tells_hangup: bool = False


class Codec(Protocol):
    """Our half of one stream. Stateful (ids, counters), pure: no clock, no socket."""

    accepts: frozenset[type[Message]]
    """Commands this stream's wire can express (none on a stream that only listens)."""

    limits: Limits

    def decode(self, frame: str | bytes) -> Iterable[Event]:
        """Events of one frame, in order; an empty iterable for frames that mean nothing to anybody (Twilio's `connected`).

        Raises MalformedFrame and nothing else. A frame of an unknown kind is `Unknown(kind)`.
        """
        ...

    def encode(self, command: Command) -> Iterable[str | bytes]:
        """Frames that carry out one command; `Stop` may need none (the server closes the socket after it).

        Raises UnsupportedCommand if the wire can't say it, NotStarted before the start frame was decoded.
        """
        ...


@runtime_checkable
class Numbered(Protocol):
    """A `Codec` whose carrier numbers its messages, +1 each, whatever they are; then frames out of order are put in order."""

    def number(self, frame: str | bytes) -> int | None:
        """The number of a frame; None where it has none that can be read. Asked only where audio seems to be missing."""
        ...


class Carrier(Protocol):
    """The carrier's half of one stream: what a simulator, a test or a dialect towards a service speaks."""

    habits: ClassVar[Habits]

    def encode(self, event: Event) -> Iterable[str | bytes]:
        """Frames with which the carrier tells this event: documented shape and counters; none where it has no word for it."""
        ...

    def decode(self, frame: str | bytes) -> Iterable[Command]:
        """Commands of one frame from us, as strictly as the carrier reads them.

        Raises MalformedFrame with what the real carrier would have said against the frame (error number and reason).
        """
        ...


@runtime_checkable
class Returning(Protocol):
    """A `Carrier` that tells a call which has had a stream before from a new one."""

    def come_back(self) -> None:
        """This is not the call's first stream. Before the Start is encoded."""
        ...


class Provider(Protocol):
    """One configured account. `Config` is a struct for its YAML section; unknown keys in it are errors."""

    Config: ClassVar[type[Struct]]
    title: ClassVar[str]
    """The carrier's own name of the product."""
    docs: ClassVar[str]
    """The carrier's page about the protocol."""
    emits: ClassVar[frozenset[type[Message]]]
    """Events this wire can tell; feeds the feature matrix and is proven by the wire transcripts."""
    subprotocols: ClassVar[tuple[str, ...]]
    """WebSocket subprotocols to select if, and only if, the carrier offers them."""

    def __init__(self, config: Struct) -> None: ...

    def authenticate(self, request: SignedRequest) -> str:
        """Returns if the request, a webhook or a WebSocket upgrade, was signed with the account's secret, or need not be.

        What it returns is the form of the URL that was signed, fit for a log, empty where none needs to be.
        Raises SignatureMismatch and nothing else, whatever the request is made of. Takes the same time for every signature.
        """
        ...

    def identity(self, request: SignedRequest) -> Identity | None:
        """What tells a request that `authenticate` has let pass from every other one; None where nothing is signed."""
        ...

    def sign(self, request: SignedRequest) -> Mapping[str, str]:
        """The headers, in lower case, with which the carrier signs this webhook or upgrade, made with the first secret.

        For doubles, for `doctor` and for finding a proxy's fault. Empty where the account has no secret.
        """
        ...

    def answer(
        self,
        request: SignedRequest,
        stream_url: str,
        *,
        action_url: str | None = None,
        status_url: str | None = None,
        resumed: bool = False,
    ) -> Answer:
        """What to do with the call of this webhook: the XML that makes the carrier dial `stream_url` (`wss://…`).

        `action_url` is asked once a conversation's stream has ended (answer it with `after`); without it, the configured
        elements are in this answer already. `status_url` is told of the stream, where the carrier does such a thing. `resumed`:
        the call has had a stream, which was lost, and is not to notice: nobody is greeted again.
        Raises MalformedFrame when the request names no call.
        """
        ...

    def after(self, request: SignedRequest) -> Answer:
        """What the carrier gets at the action URL: the configured elements, else an empty document, which ends the call."""
        ...

    def gone(self, request: SignedRequest) -> Answer:
        """The same where the service was lost: the elements for that case, else those of `after`."""
        ...

    def overflow(self) -> Answer:
        """What the carrier gets in place of a stream when there is no room for one more call."""
        ...

    def status(self, request: SignedRequest) -> StreamStatus:
        """What a status callback says. Never raises: `other` is the event of what is not understood."""
        ...

    def place_call(self, to: str, from_: str, answer_url: str, *, status_url: str | None = None) -> HttpRequest:
        """The request to the carrier's API that has it call `to`, showing `from_`, and ask `answer_url` once that is answered.

        `status_url` is told of the call's end. Perform it, and have `reply` read the answer; the reply's `call_id` is what the
        webhooks will name. Raises UnsupportedCommand without credentials for the API; so do the next two.
        """
        ...

    def hang_up_call(self, call_id: str) -> HttpRequest:
        """The request that ends a call, not only its stream."""
        ...

    def transfer_call(
        self, call_id: str, *, xml: str = "", url: str = "", publish: Callable[[str], str] | None = None
    ) -> HttpRequest:
        """The request that has a call go on with these XML elements, or with what `url` answers; exactly one is given.

        Where the carrier takes no document but the URL of one, `publish` makes a URL that answers it once with a document.
        The carrier ends the call's stream. Raises UnsupportedCommand for what this carrier can't be asked.
        """
        ...

    def reply(self, status: int, body: bytes) -> ApiReply:
        """What the API's answer to one of these three means. Never raises."""
        ...

    def call(self, request: SignedRequest) -> Call:
        """The call that a webhook is about. Raises MalformedFrame when it names none."""
        ...

    def codec(self) -> Codec:
        """A fresh codec for one stream."""
        ...

    @classmethod
    def carrier(cls) -> Carrier:
        """A fresh carrier half for one stream. It learns ids, format and parameters from the `Start` it encodes first."""
        ...

    @classmethod
    def webhook(cls, call: Call, url: str, ended: StreamEnd | None = None) -> HttpRequest:
        """The unsigned request that asks `url` what to do with `call` or, once a stream of it has `ended`, what comes next."""
        ...

    @classmethod
    def dial(cls, answer: str) -> Dial:
        """What the carrier reads out of our answer. Raises MalformedFrame with what it would have complained about."""
        ...
