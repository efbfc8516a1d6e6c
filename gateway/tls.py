"""The gateway's own certificate: loaded, watched, exchanged while calls go on. Whatever speaks TLS asks here for a context."""

from __future__ import annotations

import re
import ssl
import time
from binascii import Error as Base64Error
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from gateway.errors import ConfigError
from gateway.settings import Tls

CHECK_SECS = 10.0
"""How often the owner of a `Certificate` calls `check`."""

SOON_DAYS = 14
"""A certificate that expires within so many days is worth a warning; renewals happen 30 days before."""

_DAY_SECS = 86_400
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _GENERALIZED_TIME, _EXPLICIT_VERSION = 0x17, 0x18, 0xA0


class Certificate:
    """A certificate and its key. Give `context` to a listener once; `check` it every CHECK_SECS, and on SIGHUP with `force`.

    Connections that exist keep what they were made with; new ones get the newest files that are good.
    """

    def __init__(self, files: Tls, log: FilteringBoundLogger, *, wall_clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigError when the files can't be used."""
        self._files = files
        self._log = log
        self._wall_clock = wall_clock
        self._seen = self._state()
        self._current, self.not_after = load(files)
        # A context of its own that never changes hands each handshake to the newest one. Loading into a context in use would
        # leave it without a key where the new files don't belong together.
        self.context = load(files)[0]
        self.context.sni_callback = self._choose
        self._warned = 0.0
        log.info("tls_certificate", **self._facts())
        self._warn()

    @property
    def days_left(self) -> float:
        """Until the certificate expires; negative once it has."""
        return (self.not_after - self._wall_clock()) / _DAY_SECS

    def check(self, *, force: bool = False) -> bool:
        """Take new files if there are some. True: they are in use. False: nothing is new, or it can't be used and was logged."""
        state = self._state()
        if state == self._seen and not force:
            self._warn()
            return False
        self._seen = state
        try:
            self._current, self.not_after = load(self._files)
        except ConfigError as error:
            self._log.error("tls_reload_failed", problem=str(error), kept_days_left=round(self.days_left, 1))
            return False
        self._warned = 0.0
        self._log.info("tls_reloaded", **self._facts())
        self._warn()
        return True

    def use(self, files: Tls) -> bool:
        """Take these files from now on, at once. Returns what `check` does."""
        self._files = files
        return self.check(force=True)

    def _choose(self, connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called by each handshake, whether it names a server or not."""
        connection.context = self._current

    def _facts(self) -> dict[str, object]:
        expires = datetime.fromtimestamp(self.not_after, UTC).isoformat()
        return {"certificate": self._files.certificate, "expires": expires, "days_left": round(self.days_left, 1)}

    def _warn(self) -> None:
        """Once a day, while there is reason to."""
        now = self._wall_clock()
        if self.days_left < SOON_DAYS and abs(now - self._warned) >= _DAY_SECS:
            self._warned = now
            self._log.warning("tls_expires_soon", **self._facts())

    def _state(self) -> list[tuple[int, int, int] | None]:
        return [_stat(path) for path in (self._files.certificate, self._files.key)]


def load(files: Tls) -> tuple[ssl.SSLContext, float]:
    """(a context for servers, when its certificate expires in seconds since 1970). Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
        return context, expiry(Path(files.certificate).read_text(encoding="ascii", errors="replace"))
    except ssl.SSLError as error:
        mismatch = "MISMATCH" in (error.reason or "")
        why = "the key does not belong to the certificate" if mismatch else "one of them is not PEM, or not what it should be"
    except (OSError, ValueError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    raise ConfigError(f"tls: {files.certificate} and {files.key} can't be used: {why}")


def expiry(pem: str) -> float:
    """When the first certificate of a PEM file expires, in seconds since 1970. Raises ValueError."""
    block = _PEM.search(pem)
    if block is None:
        raise ValueError("there is no certificate in the file")
    try:
        certificate, _ = _inside(ssl.PEM_cert_to_DER_cert(block[0]), 0)
        fields, _ = _inside(certificate, 0)
        at = _after(fields, 0) if fields[0] == _EXPLICIT_VERSION else 0
        for _ in ("serial number", "signature algorithm", "issuer"):
            at = _after(fields, at)
        validity, _ = _inside(fields, at)
        at = _after(validity, 0)
        text, kind = _inside(validity, at)[0].decode("ascii"), validity[at]
        if kind == _UTC_TIME:  # two digits of a year from 1950 to 2049, says RFC 5280
            text = ("19" if text >= "5" else "20") + text
        elif kind != _GENERALIZED_TIME:
            raise ValueError("no date")
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except (ValueError, IndexError, Base64Error) as error:
        raise ValueError("the first certificate in the file can't be read") from error


def _inside(der: bytes, at: int) -> tuple[bytes, int]:
    """(content of the element at `at`, where the next one begins)."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(der[start : start + size]), start + size
    return der[start : start + length], start + length


def _after(der: bytes, at: int) -> int:
    return _inside(der, at)[1]


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase; write it without one: openssl pkey -in KEY -out KEY.plain")


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
