"""A strict double of Twilio ConversationRelay: hears nothing, speaks text at a known speed, tells what it spoke."""

import asyncio
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from websockets.exceptions import ConnectionClosed

from .twilio_media import ACCOUNT_SID, AUTH_TOKEN, sid, signature
from .wire import Peer, misshapen

By = Literal["none", "dtmf", "speech", "any"]
STRIKES = 10
DIGITS = re.compile(r"[0-9w#*]+")
URL = re.compile(r"https?://[^\s/]+\S*")
SENTENCE = re.compile(r".*?[.!?:;,]+(?=\s)", re.DOTALL)
LONGEST = 60
"""Pieces of speech end at punctuation or, without any, at a space within so many characters."""


@dataclass(eq=False)
class Run:
    """Speech in a row with the same flags; `play` and `sendDigits` are runs of their own."""

    kind: Literal["text", "play", "digits"]
    text: str
    interruptible: By
    preemptible: bool
    cycle: int
    closed: bool = False
    seconds: float = 0.0


@dataclass(eq=False)
class Speaking:
    run: Run
    piece: str
    start: float


class ConversationRelay(Peer):
    """One session. Everything settable that the TwiML noun can set and that shows on the socket."""

    refused_code = "64102"
    protocol_code = "64105 protocol error:"

    def __init__(
        self,
        url: str,
        *,
        characters_per_second: float = 200.0,
        speech_delay: float = 0.02,
        events: Iterable[str] = ("speaker-events", "tokens-played"),
        interruptible: By = "any",
        preemptible: bool = False,
        dtmf_detection: bool = True,
        partial_prompts: bool = True,
        report_input: By = "none",
        welcome_greeting: str = "",
        greeting_interruptible: By = "any",
        parameters: Mapping[str, str] | None = None,
        language: str = "en-US",
        caller: str = "+15550100001",
        called: str = "+15550100002",
        call_status: str = "RINGING",
        call_sid: str | None = None,
        dtmf_window: float = 0.02,
        play_seconds: float = 0.1,
        auth_token: str = AUTH_TOKEN,
        public_url: str | None = None,
        setup_delay: float = 0.0,
        seed: int = 0,
        **peer: Any,
    ) -> None:
        signed = signature(auth_token, public_url or url.replace("ws://", "wss://", 1))
        headers = {
            "accept-encoding": "gzip",
            "cache-control": "no-cache",
            "pragma": "no-cache",
            "x-twilio-signature": signed,
            "x-amzn-bedrock-agentcore-runtime-custom-twilio-signature": signed,
        }
        super().__init__(url, headers=headers, user_agent="Jetty/11.0.24", seed=seed, **peer)
        self.characters_per_second, self.speech_delay, self.events = characters_per_second, speech_delay, set(events)
        self.interruptible, self.preemptible, self.report_input = interruptible, preemptible, report_input
        self.dtmf_detection, self.partial_prompts = dtmf_detection, partial_prompts
        self.welcome_greeting, self.greeting_interruptible = welcome_greeting, greeting_interruptible
        self.parameters, self.language = dict(parameters or {}), language
        self.caller, self.called, self.call_status = caller, called, call_status
        self.dtmf_window, self.play_seconds, self.setup_delay = dtmf_window, play_seconds, setup_delay
        self.call_sid = call_sid or sid("CA", self.random)
        self.session_id = sid("VX", self.random)

        self.tokens: list[str] = []
        """Every token taken, as it came."""
        self.spoken_pieces: list[tuple[float, str]] = []
        """(time, piece) that the caller heard; joined it is `spoken`."""
        self.interrupts: list[tuple[str, int]] = []
        """(utteranceUntilInterrupt, durationUntilInterruptMs) told."""
        self.plays: list[tuple[str, int]] = []
        """(source, loop) of every `play` that began."""
        self.dtmf: list[str] = []
        """Digits of every `sendDigits` that was sent."""
        self.languages: list[dict[str, str]] = []
        self.ended = False
        self.handoff: str | None = None
        """handoffData of `end`."""
        self.cut_by_end = ""
        """Text that was never spoken because `end` came first."""
        self.unreported: list[str] = []
        """What the caller said or pressed that the settings keep from the gateway."""
        self.errors_told = 0
        self.session_status = "completed"
        """SessionStatus of the action request that would follow: `ended`, `completed`, `failed`."""
        self._ready = False
        self._strikes = 0
        self._runs: deque[Run] = deque()
        self._cycle = 0
        self._cycle_open = False
        self._fence = False
        self._speaking: Speaking | None = None
        self._agent_on = False
        self._wake = asyncio.Event()

    # To the gateway.

    async def _tell(self, frame: dict[str, Any]) -> None:
        async with self._sending:
            if self.shuffle and self.random.random() < 0.1:
                await self._put({"type": self.random.choice(("x-future", "Prompt", "connected"))})
            await self._put(frame)

    async def _begin(self) -> None:
        if self.setup_delay:
            await asyncio.sleep(self.setup_delay)
        self._ready = True
        await self._tell(
            {
                "type": "setup",
                "sessionId": self.session_id,
                "callSid": self.call_sid,
                "parentCallSid": "",
                "from": self.caller,
                "to": self.called,
                "forwardedFrom": "",
                "callerName": "",
                "direction": "inbound",
                "callType": "PSTN",
                "callStatus": self.call_status,
                "accountSid": ACCOUNT_SID,
                "customParameters": self.parameters,
            }
        )
        if self.welcome_greeting:
            self._runs.append(Run("text", self.welcome_greeting, self.greeting_interruptible, False, 0, closed=True))
        self._spawn(self._speak())

    async def info(self, name: str, value: str) -> None:
        """An `info` message, sent only when subscribed (debugging ones always)."""
        needed = {"agentSpeaking": "speaker-events", "clientSpeaking": "speaker-events", "tokensPlayed": "tokens-played"}.get(
            name
        )
        if needed is None or needed in self.events:
            await self._tell({"type": "info", "name": name, "value": value})

    async def _prompt(self, text: str, last: bool, lang: str) -> None:
        await self._tell({"type": "prompt", "voicePrompt": text, "lang": lang, "last": last})

    async def says(self, text: str, *, partials: Iterable[str] = (), lang: str | None = None, gap: float = 0.0) -> bool:
        """The caller speaks one utterance: partials (each the whole so far), then the final. False when the settings hide it."""
        lang = lang or self.language
        partial = [p for p in partials if self.partial_prompts]
        if self._busy():
            if self._open_to("speech"):
                await self.info("clientSpeaking", "on")
                await self._interrupt()
                if partial:
                    await self._prompt(partial.pop(0), False, lang)
                await self._agent(False)
            elif self.report_input not in ("speech", "any"):
                self.unreported.append(text)
                return False
            else:
                await self.info("clientSpeaking", "on")
        else:
            if partial:
                await self._prompt(partial.pop(0), False, lang)
            await self.info("clientSpeaking", "on")
        for piece in partial:
            await asyncio.sleep(gap)
            await self._prompt(piece, False, lang)
        await asyncio.sleep(gap)
        await self.info("clientSpeaking", "off")
        await self._prompt(text, True, lang)
        return True

    async def digits(self, digits: str) -> bool:
        """Keys, one message each; during speech the interrupt follows after `dtmf_window`. False when the settings hide any."""
        hidden = len(self.unreported)
        for digit in digits:
            if not self.dtmf_detection:
                self.unreported.append(digit)
            elif not self._busy():
                await self._tell({"type": "dtmf", "digit": digit})
            elif self._open_to("dtmf"):
                doomed = [*([self._speaking.run] if self._speaking else []), *self._runs]
                self._fence = True
                await self._tell({"type": "dtmf", "digit": digit})
                await asyncio.sleep(self.dtmf_window)
                await self._interrupt(doomed)
                await self._agent(False)
            elif self.report_input in ("dtmf", "any"):
                await self._tell({"type": "dtmf", "digit": digit})
            else:
                self.unreported.append(digit)
        return len(self.unreported) == hidden

    async def error(self, description: str) -> None:
        """An `error` of Twilio's own making."""
        self.errors_told += 1
        await self._tell({"type": "error", "description": description})

    async def hangup(self) -> None:
        if not self.closed.is_set():
            await self.close(1000, "Closing websocket session")

    # The voice.

    @property
    def spoken(self) -> str:
        """All the text the caller heard."""
        return "".join(piece for _, piece in self.spoken_pieces)

    @property
    def agent_speaking(self) -> bool:
        return self._agent_on

    async def spoken_out(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109
        """Wait until something was taken and all of it was spoken."""
        await self.until(lambda: (self.tokens or self.plays or self.dtmf) and not self._busy() and not self._agent_on, timeout)

    def _busy(self) -> bool:
        return self._speaking is not None or bool(self._runs)

    def _open_to(self, by: By) -> bool:
        run = self._speaking.run if self._speaking else self._runs[0]
        return run.interruptible in (by, "any")

    async def _agent(self, on: bool) -> None:
        if on != self._agent_on:
            self._agent_on = on
            self.changed()
            await self.info("agentSpeaking", "on" if on else "off")

    def _cut(self) -> tuple[str, int]:
        """Silence the current piece: the whole words spoken of it, and for how long."""
        now = self._speaking
        self._speaking = None
        self._wake.set()
        if now is None:
            return "", 0
        seconds = max(0.0, self.now() - now.start)
        if now.run.kind != "text":
            return "", int(seconds * 1000)
        heard = now.piece[: int(seconds * self.characters_per_second)]
        if len(heard) < len(now.piece) and not now.piece[len(heard)].isspace():
            heard = heard[: heard.rfind(" ") + 1].rstrip() if " " in heard else ""
        return heard, int(seconds * 1000)

    async def _told_played(self, piece: str) -> None:
        if piece:
            self.spoken_pieces.append((self.now(), piece))
            await self.info("tokensPlayed", piece)

    async def _interrupt(self, doomed: list[Run] | None = None) -> None:
        """Drop what is queued (or only what was queued when the key was pressed) and tell how far we came."""
        current = self._speaking
        heard, milliseconds = ("", 0) if doomed is not None and current and current.run not in doomed else self._cut()
        for run in list(self._runs) if doomed is None else doomed:
            if run in self._runs:
                self._runs.remove(run)
        self._fence = True
        self.interrupts.append((heard, milliseconds))
        await self._told_played(heard)
        await self._tell({"type": "interrupt", "utteranceUntilInterrupt": heard, "durationUntilInterruptMs": milliseconds})

    async def _preempt(self) -> None:
        """A later message has come: what may be cut by it is cut, without an interrupt."""
        for run in [run for run in self._runs if run.preemptible]:
            self._runs.remove(run)
        if self._speaking and self._speaking.run.preemptible:
            await self._told_played(self._cut()[0])

    def _next_piece(self, waited: bool) -> tuple[Run, str] | None:
        while self._runs:
            run = self._runs[0]
            if run.kind != "text":
                self._runs.popleft()
                return run, run.text
            if not run.text:
                if run.closed or len(self._runs) > 1:
                    self._runs.popleft()
                    continue
                return None
            whole = run.closed or len(self._runs) > 1
            found = SENTENCE.match(run.text)
            if found and found.end() <= LONGEST:
                piece = found.group()
            elif whole and len(run.text) <= LONGEST:
                piece = run.text
            elif len(run.text) > LONGEST or waited:
                piece = run.text[: run.text.rfind(" ", 0, LONGEST) + 1] or run.text[:LONGEST]
            else:
                return None
            run.text = run.text[len(piece) :]
            if whole and not run.text:
                self._runs.popleft()
            return run, piece
        return None

    async def _speak(self) -> None:
        waited = False
        with suppress(ConnectionClosed):
            while not self.ended:
                self._wake.clear()
                found = self._next_piece(waited)
                waited = False
                if found is None:
                    if self._agent_on and not self._runs:
                        await self._agent(False)
                    self.changed()
                    try:
                        await asyncio.wait_for(self._wake.wait(), 0.15 if self._runs else None)
                    except TimeoutError:
                        waited = True
                    continue
                run, piece = found
                seconds = run.seconds or len(piece) / self.characters_per_second
                if not self._agent_on:
                    self._speaking = Speaking(run, piece, self.now() + self.speech_delay)
                    mine = self._speaking
                    await asyncio.sleep(self.speech_delay)
                    if self._speaking is mine:
                        await self._agent(True)
                else:
                    mine = self._speaking = Speaking(run, piece, self.now())
                if run.kind == "play":
                    self.plays.append((run.text, max(1, round(run.seconds / self.play_seconds)) if self.play_seconds else 1))
                while self._speaking is mine and (left := mine.start + seconds - self.now()) > 0:
                    self._wake.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), left)
                if self._speaking is mine:
                    self._speaking = None
                    if run.kind == "text":
                        await self._told_played(piece)
                    elif run.kind == "digits":
                        self.dtmf.append(piece)
                        await self.info("tokensPlayed", piece)

    # From the gateway.

    async def _not_json(self, frame: str | bytes, why: str) -> None:
        await self._strike(why, frame, frame if isinstance(frame, str) else repr(frame))

    async def _strike(self, why: str, frame: object, raw: str) -> None:
        self.violate(f"64107 {why}", frame)
        self._strikes += 1
        await self.error(f"Invalid message received, code: 64107, {raw}")
        if self._strikes >= STRIKES:
            self.session_status = "failed"
            await self.ws.close(1007, "Too many consecutive malformed messages.")

    async def _judge(self, frame: dict[str, Any]) -> None:
        if not self._ready:
            self.violate("64107 sent before setup", frame)
        elif wrong := self._wrong(frame):
            await self._strike(wrong, frame, json.dumps(frame))
        else:
            self._strikes = 0
            if not self.ended:
                await self._obey(frame)

    def _wrong(self, frame: dict[str, Any]) -> str | None:
        match frame.get("type"):
            case "text":
                return misshapen(
                    frame,
                    "text",
                    {"type": "string", "token": "string"},
                    {"last": "boolean", "lang": "string", "interruptible": "boolean", "preemptible": "boolean"},
                )
            case "play":
                wrong = misshapen(
                    frame,
                    "play",
                    {"type": "string", "source": "string"},
                    {"loop": "integer", "interruptible": "boolean", "preemptible": "boolean"},
                )
                if wrong is None and not URL.fullmatch(frame["source"]):
                    return "play.source: not a URL"
                if wrong is None and frame.get("loop", 1) < 0:
                    return "play.loop: below zero"
                return wrong
            case "sendDigits":
                wrong = misshapen(frame, "sendDigits", {"type": "string", "digits": "string"})
                return wrong or (None if DIGITS.fullmatch(frame["digits"]) else "sendDigits.digits: not [0-9w#*]+")
            case "language":
                wrong = misshapen(
                    frame, "language", {"type": "string"}, {"ttsLanguage": "string", "transcriptionLanguage": "string"}
                )
                return wrong or (None if len(frame) > 1 and all(frame.values()) else "language: names none")
            case "end":
                return misshapen(frame, "end", {"type": "string"}, {"handoffData": "string"})
            case str() as kind:
                return f"unknown type {kind!r}"
            case _:
                return "no type"

    def _by(self, frame: dict[str, Any]) -> By:
        return {True: "any", False: "none", None: self.interruptible}[frame.get("interruptible")]

    async def _obey(self, frame: dict[str, Any]) -> None:
        match frame["type"]:
            case "text":
                if not self._cycle_open:
                    self._cycle += 1
                    await self._preempt()
                self.tokens.append(frame["token"])
                preemptible = frame.get("preemptible", self.preemptible)
                tail = self._runs[-1] if self._runs else None
                if (
                    tail is None
                    or self._fence
                    or tail.closed
                    or (tail.kind, tail.cycle, tail.interruptible, tail.preemptible)
                    != ("text", self._cycle, self._by(frame), preemptible)
                ):
                    tail = Run("text", "", self._by(frame), preemptible, self._cycle)
                    self._runs.append(tail)
                self._fence = False
                tail.text += frame["token"]
                tail.closed = frame.get("last", False)
                self._cycle_open = not tail.closed
            case "play":
                await self._preempt()
                loops = frame.get("loop", 1) or 1000
                preemptible = frame.get("preemptible", False)
                run = Run("play", frame["source"], self._by(frame), preemptible, 0, True, loops * self.play_seconds)
                self._runs.append(run)
            case "sendDigits":
                self._runs.append(Run("digits", frame["digits"], self.interruptible, False, 0, True, 0.02 * len(frame["digits"])))
            case "language":
                self.languages.append({name: value for name, value in frame.items() if name != "type"})
            case "end":
                self.ended = True
                self.session_status = "ended"
                self.handoff = frame.get("handoffData")
                rest = self._speaking.piece if self._speaking and self._speaking.run.kind == "text" else ""
                heard = self._cut()[0]
                await self._told_played(heard)
                self.cut_by_end = rest[len(heard) :] + "".join(run.text for run in self._runs if run.kind == "text")
                self._runs.clear()
                self._spawn(self._end())
        self._wake.set()

    async def _end(self) -> None:
        await asyncio.sleep(0.09)
        with suppress(ConnectionClosed):
            await self.close(1000, "Closing websocket session")
