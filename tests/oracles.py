"""What must hold after every end-to-end test, whatever it was about: no error in the log but those that the test expects, nothing
that asyncio has to complain of, no secret and no phone number.

In process it is a fixture of `conftest.py`: each test that launches a gateway is judged. Processes of their own are judged by
`tests.processes.gateway`. A test that provokes errors says which: `@pytest.mark.allow_errors("service_lost")`.
"""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from structlog._base import BoundLoggerBase

from gateway import logs

LOUD = frozenset({"error", "critical", "exception", "fatal"})
SECRET_KEYS = frozenset({"auth_token", "signing_key", "secret", "admin_token", "authorization", "dialect_token"})
_PRIVATE = re.compile(r"(?<![\w+])\+\d{8,15}(?!\d)|/stream/[A-Za-z0-9_-]{30,}")
"""Phone numbers and the tokens of streams."""


class Watch(logging.Handler):
    """Everything that is logged: by structlog as it was said, and the errors of libraries."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self.libraries: list[str] = []
        self.secrets: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.libraries.append(f"{record.name}: {record.getMessage()[:1000]}")

    def keep_secret(self, document: object) -> None:
        """Whatever in a configuration must never be seen again."""
        if isinstance(document, Mapping):
            for key, value in document.items():
                if key in SECRET_KEYS:
                    self.secrets.update(each for each in ([value] if isinstance(value, str) else value or ()) if len(each) >= 8)
                self.keep_secret(value)
        elif isinstance(document, (list, tuple)):
            for each in document:
                self.keep_secret(each)

    def wrong(self, allowed: Collection[str]) -> list[str]:
        """A line for each thing that should not be there."""
        found = []
        for method, entry in self.entries:
            if method in LOUD and entry["event"] not in allowed:
                found.append(f"error in the log: {entry}")
            line = json.dumps(logs.redact(None, method, dict(entry)), ensure_ascii=False, default=str)
            found += [f"private in the log: {each!r} in {line}" for each in private(line, self.secrets)]
        return found + [f"error of a library: {line}" for line in self.libraries if line.partition(":")[0] not in allowed]


def private(text: str, secrets: Collection[str] = ()) -> list[str]:
    """Phone numbers, stream tokens and these secrets in a text of the log."""
    return [*_PRIVATE.findall(text), *(secret for secret in secrets if secret in text)]


def loud(log: str, allowed: Collection[str] = ()) -> list[str]:
    """Lines of a process's log that tell of a fault of ours: errors, and whatever is no line of it (a traceback, a warning)."""
    found = []
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            found.append(line)
            continue
        if entry.get("event") not in allowed and (entry.get("level") in LOUD or "Traceback" in line):
            found.append(line)
    return found


@contextmanager
def watching() -> Iterator[Watch]:
    """Sees what is logged in this block, whatever becomes of it."""
    watch = Watch()
    process = BoundLoggerBase._process_event

    def seen(self: Any, method: str, event: str | None, values: dict[str, Any]) -> Any:
        watch.entries.append((method, {**self._context, **values, "event": event}))
        return process(self, method, event, values)

    BoundLoggerBase._process_event = seen  # type: ignore[method-assign]
    logging.getLogger().addHandler(watch)
    try:
        yield watch
        gc.collect()  # what was never retrieved is told when it goes
    finally:
        BoundLoggerBase._process_event = process  # type: ignore[method-assign]
        logging.getLogger().removeHandler(watch)
