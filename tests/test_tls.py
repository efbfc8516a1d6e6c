"""The gateway's own TLS: files good and bad, renewals under a live call, connections that never say hello."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway import server as server_module
from gateway import tls
from gateway.errors import ConfigError
from gateway.server import Server
from gateway.settings import Tls
from tests.conftest import Launch
from tests.doubles import Refused, TwilioMedia
from tests.test_end_to_end import MULAW, played

LOG = structlog.get_logger()


class Files:
    """A certificate that localhost can have, in two files, from an authority of our own."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        self.trusted = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.trusted))
        self.tls = Tls(str(directory / "certificate.pem"), str(directory / "key.pem"))
        self.renew()

    def renew(self, **options: Any) -> int:
        """New files. Returns the certificate's serial number."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1", **options)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        for path, content in ((self.tls.certificate, chain), (self.tls.key, issued.private_key_pem.bytes())):
            fresh = Path(f"{path}.new")
            fresh.write_bytes(content)
            os.replace(fresh, path)  # noqa: PTH105 — as a renewal does it
        return x509.load_pem_x509_certificate(chain).serial_number

    def damage(self, fault: str) -> None:
        certificate, key = Path(self.tls.certificate), Path(self.tls.key)
        match fault:
            case "another key":
                key.write_bytes(self.authority.issue_cert("localhost").private_key_pem.bytes())
            case "half a certificate":
                certificate.write_bytes(certificate.read_bytes()[:300])
            case "no file":
                certificate.unlink()
            case _:
                key.write_text("hello")

    @property
    def options(self) -> dict[str, str]:
        return {"certificate": self.tls.certificate, "key": self.tls.key}

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.trusted)

    async def serial(self, port: int) -> int:
        """Of the certificate that a new connection gets, once it was found good."""
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=self.trust)
        try:
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(der).serial_number
        finally:
            writer.close()
            await writer.wait_closed()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def self_signed(until: datetime) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a" * 60)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = builder.not_valid_before(datetime(1990, 1, 1)).not_valid_after(until).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


def check(server: Server) -> None:
    """As it is done every few seconds."""
    assert server._certificate is not None
    server._certificate.check()


async def renewals(server: Server, files: Files, count: int) -> list[int]:
    """That many new certificates; every second time the file system is asked, else somebody says so (SIGHUP)."""
    wrong = []
    for number in range(count):
        serial = files.renew()
        if number % 2:
            server.reload()
        else:
            check(server)
        seen = await files.serial(server.port)
        wrong += [] if seen == serial else [number]
        await asyncio.sleep(0)
    return wrong


async def carry_a_call_over_renewals(launch: Launch, files: Files, count: int, audio: bytes) -> None:
    server = await launch(tls=files.options)
    url = f"wss://127.0.0.1:{server.port}/twilio/stream"
    async with TwilioMedia(url) as call:
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(renewals(server, files, count))
            tasks.create_task(call.speak(audio))
        await asyncio.sleep(0.3)
        await call.hangup()
    assert [] == renewing.result()
    assert [] == call.violations
    assert 1000 == call.close_code
    assert audio == played(call)


async def test_t9_renewals_drop_no_call(launch: Launch, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files.trusted))
    await carry_a_call_over_renewals(launch, files, 20, MULAW[:12000])


async def test_t9_the_real_program_takes_a_renewed_certificate_on_sighup(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is run: another process, and on Linux another event loop."""
    from tests.test_doctor import TOKEN, document, free_port
    from tests.test_security import answer_twilio

    monkeypatch.setenv("SSL_CERT_FILE", str(files.trusted))
    port, path = free_port(), tmp_path / "gateway.yaml"
    path.write_text(json.dumps(document(port, tls=files.options, public_url=f"https://127.0.0.1:{port}")))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--workers", "1", "-c", str(path), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        while b"listening" not in await process.stderr.readline():
            pass
        before = await files.serial(port)
        url = await answer_twilio(f"https://127.0.0.1:{port}", "CA1", ssl_context=files.trust)
        async with TwilioMedia(url, auth_token=TOKEN, call_sid="CA1") as call:
            await call.speak(MULAW[:1600])
            after = files.renew()
            process.send_signal(signal.SIGHUP)
            while b"tls_reloaded" not in await process.stderr.readline():
                pass
            assert [after] == [await files.serial(port)] != [before]
            await call.speak(MULAW[1600:8000])
            await call.until(lambda: len(played(call)) >= 8000)
            await call.hangup()
        assert MULAW[:8000] == played(call)
        with pytest.raises(Refused, match="403"):
            async with TwilioMedia(url, auth_token=TOKEN, call_sid="CA1"):
                pass
    finally:
        process.terminate()
        await process.communicate()
    assert 0 == process.returncode


@pytest.mark.long
async def test_t9_a_hundred_renewals_drop_no_call(launch: Launch, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files.trusted))
    await carry_a_call_over_renewals(launch, files, 100, MULAW * 4)


@pytest.mark.parametrize("fault", ["another key", "half a certificate", "no file", "no PEM"])
@pytest.mark.allow_errors("tls_reload_failed")
async def test_t9_bad_new_files_keep_the_old_ones(launch: Launch, files: Files, log: list[Any], fault: str) -> None:
    server = await launch(tls=files.options)
    before = await files.serial(server.port)
    files.damage(fault)
    check(server)
    check(server)
    assert before == await files.serial(server.port)
    (entry,) = [each for each in log if each["event"] == "tls_reload_failed"]
    assert "error" == entry["log_level"]
    assert files.tls.certificate in entry["problem"]
    after = files.renew()
    check(server)
    assert after == await files.serial(server.port)


def test_a_certificate_about_to_expire_is_worth_a_warning(files: Files, log: list[Any]) -> None:
    now = [datetime.now(UTC).timestamp()]
    files.renew(not_after=datetime.now(UTC) + timedelta(days=20))
    certificate = tls.Certificate(files.tls, LOG, wall_clock=lambda: now[0])
    assert 19.9 < certificate.days_left <= 20
    assert ["tls_certificate"] == [entry["event"] for entry in log]
    now[0] += 7 * 86_400
    assert [False] * 3 == [certificate.check() for _ in range(3)]
    now[0] += 86_400
    certificate.check()
    warnings = [entry for entry in log if entry["event"] == "tls_expires_soon"]
    assert [13.0, 12.0] == [entry["days_left"] for entry in warnings], "once a day"


@pytest.mark.parametrize("year", [1991, 2049, 2050, 2112])
def test_expiry_is_read_as_others_read_it(year: int) -> None:
    until = datetime(year, 12, 30, 23, 59, 58, tzinfo=UTC)
    pem = self_signed(until)
    assert x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc.timestamp() == tls.expiry(f"comment\n{pem}")


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_expiry_of_a_damaged_certificate_is_an_error_and_never_a_crash(cut: int) -> None:
    lines = self_signed(datetime(2040, 1, 1, tzinfo=UTC)).splitlines()
    text = "".join(lines[1:-1])
    for damaged in (text[:cut], text[:cut] + "A" + text[cut + 1 :]):
        pem = f"{lines[0]}\n{damaged}\n{lines[-1]}\n"
        with suppress(ValueError):
            assert isinstance(tls.expiry(pem), float)


def test_what_can_not_be_loaded_is_told_in_a_sentence(files: Files, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x" * 12)
        )
    )
    other = tmp_path / "other.pem"
    other.write_bytes(files.authority.issue_cert("localhost").private_key_pem.bytes())
    for path, sentence in ((locked, "passphrase"), (other, "does not belong"), (tmp_path / "none", "No such file")):
        with pytest.raises(ConfigError, match=sentence):
            tls.load(Tls(files.tls.certificate, str(path)))


async def test_old_protocols_are_refused(launch: Launch, files: Files) -> None:
    server = await launch(tls=files.options)
    old = files.trust
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", server.port, ssl=old)
    assert await files.serial(server.port)


async def test_t2_a_slow_tls_hello_is_cut(launch: Launch, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_SECS", 0.3)
    server = await launch(tls=files.options)
    loop = asyncio.get_running_loop()
    began = loop.time()
    for hello in (b"", b"\x16\x03\x01\x02\x00\x01"):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(hello)
        async with asyncio.timeout(3):
            assert b"" == await reader.read()
        writer.close()
    assert loop.time() - began < 3
    assert await files.serial(server.port)
