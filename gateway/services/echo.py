"""The embedded service: sends the caller's audio and words back. Good for a first call, with no second process.

Keys do something too: `*` clears what is still to be played, `#` ends the call once it has played, any other key asks for a
checkpoint named after it.
"""

from __future__ import annotations

import asyncio

from gateway.events import After, Audio, Checkpoint, Clear, Dtmf, Event, Say, Start, Stop, Transcript
from gateway.services import Line, LinkFigures
from gateway.settings import EchoService


class EchoLink:
    """Echo for one stream."""

    held_bytes = 0
    """See `Link`."""

    def __init__(self, name: str, service: EchoService, line: Line) -> None:
        self._name = name
        self._took_at = asyncio.get_running_loop().time()
        self._delay_ms = service.delay_ms
        self._line = line
        self._media_format = line.start.media_format
        self._keys = 0
        self.forwarded_bytes = 0

    @property
    def unknown(self) -> bool:
        """See `Link`."""
        return False

    def figures(self) -> LinkFigures:
        """See `Link`."""
        return LinkFigures(self._name, "serving", self._took_at)

    async def run(self) -> None:
        while True:
            for event in await self._line.subscription.take():
                if isinstance(event, Stop):
                    return
                self._answer(event)

    def _answer(self, event: Event) -> None:
        perform = self._line.perform
        match event:
            case Audio():
                self.forwarded_bytes += len(event.payload)
                perform(Audio(event.payload))
            case Start():
                self._fill()
            case Dtmf():
                for digit in event.digits:
                    self._press(digit)
            case Transcript(final=True):
                perform(Say(f"You said: {event.text}"))
                self._keys += 1
                perform(Checkpoint(f"sentence-{self._keys}"))
            case _:
                pass

    def _press(self, digit: str) -> None:
        if digit == "#":
            self._line.perform(Stop(after=After.PLAYED))
        elif digit == "*" and self._media_format is not None:
            self._line.perform(Clear())
            self._fill()
        else:
            self._keys += 1
            self._line.perform(Checkpoint(f"key-{self._keys}"))

    def _fill(self) -> None:
        """Silence ahead of the echo is what delays it."""
        if self._delay_ms and self._media_format is not None:
            self._line.perform(Audio(self._media_format.silence(self._delay_ms)))
