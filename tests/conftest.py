"""What several test files need: a running gateway, and speech."""

from __future__ import annotations

import gc
import json
import wave
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.resources import files

import numpy as np
import numpy.typing as npt
import pytest
import structlog
from hypothesis import settings as hypothesis_settings

from gateway import config, ledger
from gateway.cli import make_server
from gateway.server import Server
from tests.oracles import Watch, watching

hypothesis_settings.register_profile("gateway", deadline=None)  # a busy machine is no failure
hypothesis_settings.load_profile("gateway")

Launch = Callable[..., Awaitable[Server]]


@pytest.fixture(autouse=True)
def own_ledgers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test remembers another one's calls, which have the same names; the gateways of one test remember together."""
    monkeypatch.setattr(ledger, "SHARED_MEMORY", tmp_path_factory.mktemp("ledgers"))


def pytest_collection_finish() -> None:
    """What is there before the first test stays, and need not be looked through after each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def oracle(request: pytest.FixtureRequest) -> Iterator[Watch | None]:
    """After each test with a gateway: see `tests.oracles`."""
    if "launch" not in request.fixturenames:
        yield None
        return
    with watching() as watch:
        yield watch
    allowed = {event for marker in request.node.iter_markers("allow_errors") for event in marker.args}
    wrong = watch.wrong(allowed)
    assert not wrong, "if the test provokes it, mark it: @pytest.mark.allow_errors(event)\n" + "\n".join(wrong)[:5000]


@pytest.fixture
async def launch(oracle: Watch) -> AsyncIterator[Launch]:
    """`await launch(services={…}, routes=[…], **options)` runs a gateway with every provider until the test ends."""
    servers: list[Server] = []

    async def start(
        *,
        services: dict[str, object] | None = None,
        routes: list[object] | None = None,
        providers: dict[str, object] | None = None,
        **options: object,
    ) -> Server:
        services = services or {"echo": {"kind": "echo"}}
        document = {
            "listen": "127.0.0.1:0",
            "providers": providers
            or {
                "twilio": {"kind": "twilio_media_streams", "auth": "none"},
                "relay": {"kind": "twilio_conversation_relay", "auth": "none"},
                "plivo": {"kind": "plivo_audio_streaming", "auth": "none"},
            },
            "services": services,
            "routes": routes or [{"service": next(iter(services))}],
            **options,
        }
        oracle.keep_secret(document)
        server = make_server(config.parse(json.dumps(document)))
        await server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.stop()


@pytest.fixture
def log() -> Iterator[list[structlog.typing.EventDict]]:
    """Everything that is logged while the test runs, whatever a command tested before it has set up."""
    structlog.reset_defaults()
    with structlog.testing.capture_logs() as entries:
        yield entries  # type: ignore[misc]


def bundled_speech() -> npt.NDArray[np.int16]:
    """The clip that ships with the package: 16-bit samples at 8 kHz."""
    (path,) = (entry for entry in files("gateway").joinpath("speech").iterdir() if entry.name.endswith(".wav"))
    with path.open("rb") as file, wave.open(file) as clip:  # type: ignore[arg-type]
        assert (1, 2, 8000) == (clip.getnchannels(), clip.getsampwidth(), clip.getframerate())
        return np.frombuffer(clip.readframes(clip.getnframes()), dtype="<i2")
