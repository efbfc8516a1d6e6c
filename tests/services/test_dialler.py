"""What all calls of a process share about a service: who may dial it, and when they hear that it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.services.dialler import HANDSHAKES, Dialler, Unreachable
from gateway.settings import WebsocketService
from tests.doubles import RecordingService


@pytest.fixture
async def dialler() -> AsyncIterator[Dialler]:
    subject = Dialler("test")
    yield subject
    await subject.close()


async def fail(dialler: Dialler, service: WebsocketService, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Unreachable):
            await dialler.dial("agent", service)


async def test_a_dead_service_is_probed_by_one_and_all_hear_when_it_is_back(dialler: Dialler) -> None:
    async with RecordingService() as service:
        settings = WebsocketService(url=service.url)
        await service.down()
        await fail(dialler, settings, 5)
        await fail(dialler, settings, 20)
        assert 5 == dialler.dials, "the breaker is open"
        loop = asyncio.get_running_loop()
        ended: list[float] = []

        async def wait() -> None:
            await dialler.pause("agent", 5.0, by_the_clock=False)
            ended.append(loop.time())

        began = loop.time()
        async with asyncio.timeout(3), asyncio.TaskGroup() as tasks:
            for _ in range(10):
                tasks.create_task(wait())
            await asyncio.sleep(0.15)
            assert 1 == len(ended), "the scout"
            await service.up()
            socket = await dialler.dial("agent", settings)
        assert max(ended) - began < 1
        await socket.close()


async def test_one_dead_service_does_not_keep_calls_from_another(dialler: Dialler) -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with listener, RecordingService() as service:
        hole = WebsocketService(url=f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}/", connect_timeout_secs=0.5)
        async with asyncio.TaskGroup() as tasks:

            async def lose() -> None:
                with pytest.raises(Unreachable):
                    await dialler.dial("hole", hole)

            for _ in range(3 * HANDSHAKES):
                tasks.create_task(lose())
            await asyncio.sleep(0.1)
            async with asyncio.timeout(0.3):
                await (await dialler.dial("agent", WebsocketService(url=service.url))).close()
        assert dialler.dials <= HANDSHAKES + 1 + 5, "those that queued did not dial once the breaker was open"


async def test_hundreds_of_connections_are_no_limit(dialler: Dialler) -> None:
    """The client library's own limit is a hundred; the hundred and first call would have waited for one to end."""
    async with RecordingService() as service:
        settings = WebsocketService(url=service.url)
        sockets = await asyncio.gather(*(dialler.dial("agent", settings) for _ in range(120)))
        assert 120 == len(service.links)
        for socket in sockets:
            socket.abandon()
