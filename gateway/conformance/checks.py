"""What is looked at, what to change where it fails, and how results are told. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from gateway.services.framed import SUBPROTOCOL_FRAMED
from gateway.services.native import SUBPROTOCOL_RAW

TEXTS_PER_SEC = 200.0
"""More texts than this within one second are a flood."""

Outcome = Literal["passed", "failed", "not applicable"]


class Check(Struct, frozen=True):
    """What is looked at, and what to change where it fails."""

    name: str
    title: str
    advice: str


class Result(Struct, frozen=True):
    """How one check came out. `detail` says what was seen; `advice` what to change."""

    check: str
    title: str
    outcome: Outcome
    detail: str = ""
    advice: str = ""


class Report(Struct, frozen=True):
    """All results. `mode` is what the service selected: `raw`, `framed`, or None where there was no connection."""

    url: str
    mode: str | None
    results: list[Result]

    @property
    def ok(self) -> bool:
        return not any(result.outcome == "failed" for result in self.results)

    def count(self, outcome: Outcome) -> int:
        return sum(result.outcome == outcome for result in self.results)


_SURVIVE = "Ignore it and go on; an exception in a message handler must not end the call."
_GROUPS: dict[str, tuple[Check, ...]] = {
    "Handshake": (
        Check("connect", "takes a WebSocket connection within 2 s", "Listen there, and accept before doing slow work."),
        Check("accept-key", "answers the handshake's key correctly", "Use a WebSocket library (RFC 6455, 4.2.2)."),
        Check("no-redirect", "does not redirect", "Configure the final URL: redirects are never followed."),
        Check(
            "subprotocol",
            "selects nothing, or one of the two offered modes",
            f"Answer Sec-WebSocket-Protocol with {SUBPROTOCOL_RAW} or {SUBPROTOCOL_FRAMED}, or leave it out.",
        ),
        Check("same-mode", "selects the same mode every time", "Choose by what is offered, not by chance or order of arrival."),
        Check("no-extension", "uses no extension that was not offered", "Switch compression off: none is offered."),
        Check("headers", "takes headers that it does not know (traceparent)", "Ignore request headers that you do not know."),
        Check("unknown-path", "answers a path it does not know in an orderly way", "Answer 404, or take the call; never 5xx."),
        Check("authorization", "refuses a wrong bearer token", "Answer 401 (or close with 4001) unless the token is right."),
    ),
    "Start": (
        Check(
            "format",
            "stays for a call in each audio format asked for",
            "Read start.media_format. Close with 4003 only for formats that you never want, and configure another one.",
        ),
        Check("frame-sizes", "takes frames of 10, 20, 40, 60 and 100 ms", "Take any length; go by len(message)."),
        Check("short-frame", "takes a last frame that is one sample long", "Take any whole number of samples."),
        Check("burst", "takes two seconds of audio at once", "Read as fast as messages come; never sleep between them."),
        Check(
            "text-stream",
            "stays for a stream of text (media_format null), or closes with 4003",
            "Look whether start.media_format is null before using it; close with 4003 if you need audio.",
        ),
        Check("text-silent", "sends no audio on a stream of text", "Send audio only if start.accepts has `audio`."),
        Check("anonymous", "takes a caller without a number", "Expect empty caller, called, direction and account_id."),
        Check("parameters", "takes long parameters and any Unicode", "Treat parameters as text of any length."),
    ),
    "What it is told": (
        Check("unknown-type", "ignores a message of a type it does not know", _SURVIVE),
        Check(
            "unknown-field",
            "ignores fields that it does not know, in start too",
            "Read the fields you know; do not forbid others.",
        ),
        Check(
            "json-spelling", "reads JSON in any order of keys, spacing and escapes", "Parse JSON with a parser, not by its text."
        ),
        Check("all-words", "stays through transcript, speech, spoken and gaps of other tracks", _SURVIVE),
        Check("dtmf", "stays through keys 0-9 * # A-D", _SURVIVE),
        Check("outcomes", "stays through checkpoints it never asked for, with each outcome", _SURVIVE),
        Check("clear-told", "stays through a clear it did not ask for", _SURVIVE),
        Check("gap", "stays through missing audio", "Take a gap as a fact; go on with the audio that follows."),
        Check(
            "fault",
            "stays through a fault, and does not answer it with the next one",
            "Log faults. Never answer one automatically: two machines would talk for ever.",
        ),
        Check("flow", "stays through pause and resume", _SURVIVE),
        Check("idle", "keeps a silent call open", "Have no timeout on messages; the gateway pings every 20 s."),
        Check("ping", "answers a WebSocket ping within 2 s", "Leave pings to your library, and do not block its loop."),
    ),
    "What it says": (
        Check(
            "commands",
            "sends JSON texts of known types with right fields",
            "See gateway/PROTOCOL.md; misspelt fields are refused.",
        ),
        Check("accepts", "sends only commands that the call accepts", "Look into start.accepts before sending a command."),
        Check("pace", "does not flood the call with texts", f"Send fewer than {TEXTS_PER_SEC:g} texts a second."),
        Check("whole-samples", "sends whole samples", "Cut audio at multiples of the sample size, in each message."),
        Check(
            "message-size", "sends messages below 4 MiB (audio) and 64 KiB (text)", "Send long audio in pieces, say of a second."
        ),
        Check("checkpoint-names", "does not reuse the name of a pending checkpoint", "Count: greeting-1, greeting-2."),
        Check(
            "checkpoint-count",
            "keeps the number of pending checkpoints bounded",
            "Ask for one for each sentence, not each frame.",
        ),
        Check("clear-once", "answers a clear not with the next one", "`clear` from the gateway tells; it does not ask."),
        Check("barge-in", "stays when the caller talks over it", _SURVIVE),
        Check("pause", "stops sending when told to pause", "On `flow` with state `pause` stop sending until `resume`."),
        Check("resume-flow", "stays when the flow resumes", _SURVIVE),
    ),
    "The end": (
        Check(
            "close-time",
            "completes the closing handshake within 2 s of stop",
            "Keep reading after `stop`; do slow work elsewhere.",
        ),
        Check(
            "close-code", "closes with 1000 after stop", "Let the handler end without an exception; 1011 says that it crashed."
        ),
        Check("stop-at-once", "takes a stop right after start", "Expect `stop` at any time."),
        Check("stop-speaking", "takes a stop while it speaks", "Expect the connection to close while you send."),
        Check("stop-reasons", "takes every reason of stop", "Treat reasons you do not know like those you know."),
        Check("going-away", "takes a close without stop", "Treat every close as the end of the call's connection."),
        Check(
            "cut",
            "takes new calls after a connection was cut",
            "Catch the exception of a lost connection in the call's own task.",
        ),
        Check(
            "close-codes", "closes only with codes that mean something", "Use the codes of gateway/PROTOCOL.md; never just cut."
        ),
    ),
    "Rubbish": (
        Check(
            "rubbish-text",
            "other calls live on when one gets a text that is no JSON",
            "Handle each connection's errors by itself.",
        ),
        Check(
            "rubbish-json",
            "other calls live on when one gets JSON that is no message",
            "Handle each connection's errors by itself.",
        ),
        Check(
            "rubbish-binary",
            "other calls live on when one gets half samples and empty messages",
            "Handle each connection's errors by itself.",
        ),
        Check(
            "before-start", "other calls live on when one says things before start", "Handle each connection's errors by itself."
        ),
    ),
    "Many calls": (
        Check("concurrent", "serves many calls at once", "One task for each connection; nothing that blocks the loop."),
        Check("isolation", "never plays one caller's audio to another", "Keep a call's state in its handler, not in globals."),
        Check("sequence", "serves one short call after the other", "Free what a call held when its connection closes."),
        Check(
            "mass-hangup",
            "takes new calls when many are cut at once",
            "Catch the exception of a lost connection in the call's own task.",
        ),
    ),
    "Coming back": (
        Check(
            "reconnect",
            "takes a second connection for a call whose first was cut",
            "Expect the same `session` again, in a new `start`.",
        ),
        Check("ready", "framed: sends ready within 5 s", 'Send {"type": "ready", "next": 0} when you have read `start`.'),
        Check("ready-once", "framed: sends ready once on each connection", "Say ready after `start` only."),
        Check("header", "framed: every audio message has the header", "Put the 16 bytes before the samples, in each message."),
        Check("numbers", "framed: numbers its frames 0, 1, 2, …", "Count frames of a session, across its connections."),
        Check("acks", "framed: acknowledges audio within 2 s of it", 'Send {"type": "ack", "seq": …} a few times a second.'),
        Check(
            "ack-valid",
            "framed: acknowledges only what was sent, and never goes back",
            "Acknowledge the highest seq that you have.",
        ),
        Check("resume", "framed: says ready when a call comes back", "Answer a `start` with `resume` like any other."),
        Check(
            "resume-next", "framed: asks for the first frame it has not had", "`next` is the highest seq that you have, plus one."
        ),
        Check(
            "resume-numbers",
            "framed: goes on with its own numbers",
            "Go on from `resume.next_out` or before; never leave numbers out.",
        ),
        Check(
            "resume-unknown",
            "framed: says ready to a session it has never seen",
            "You were restarted, maybe: say ready with next null.",
        ),
        Check(
            "replaced",
            "framed: takes a newer connection while the older seems open",
            "Let the newer one win; close the older with 4409.",
        ),
    ),
}
CHECKS: tuple[Check, ...] = tuple(check for group in _GROUPS.values() for check in group)
GROUPS: dict[str, str] = {check.name: group for group, checks in _GROUPS.items() for check in checks}
