"""A gateway in a process of its own: its log, its memory, its descriptors."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests import oracles


class GatewayProcess:
    """One that runs. `log` is the file of its standard error, JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process, self.log = process, log
        self.port = self.admin_port = 0
        self._read_to = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    def new_entries(self) -> list[dict[str, Any]]:
        """The log's lines since the last question."""
        with self.log.open("rb") as file:
            file.seek(self._read_to)
            whole = file.read().rpartition(b"\n")[0]
        self._read_to += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]

    def status(self, name: str) -> int:
        """A number of /proc/PID/status: `VmRSS` in KiB, `Threads`."""
        found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    @property
    def rss_kib(self) -> int:
        return self.status("VmRSS")

    @property
    def descriptors(self) -> int:
        return len([*Path(f"/proc/{self.pid}/fd").iterdir()])

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def listening(self) -> None:
        """Until it listens. The ports are known then."""
        async with asyncio.timeout(60):
            while not self.port:
                assert self.process.returncode is None, self.log.read_text()
                for entry in self.new_entries():
                    if entry["event"] == "listening":
                        self.port = int(entry["address"].rpartition(":")[2])
                    elif entry["event"] == "admin_listening":
                        self.admin_port = int(entry["address"].rpartition(":")[2])
                await asyncio.sleep(0.02)


@asynccontextmanager
async def gateway(
    directory: Path, document: dict[str, object], *, program: str = "", allow_errors: Collection[str] = (), judge: bool = True
) -> AsyncIterator[GatewayProcess]:
    """A gateway with this configuration until the block ends; then SIGTERM, and it must end well.

    Its log must hold no error but those allowed, and nothing private, unless somebody else is the `judge`. `program` runs before
    it, in its process.
    """
    config, log = directory / "gateway.yaml", directory / "gateway.log"
    config.write_text(json.dumps({"listen": "127.0.0.1:0", **document}))
    script = f"{program}\nfrom gateway.cli import main\nmain()"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, "serve", "--workers", "1", "--config", config),
            stderr=file,
            env={**os.environ, "NO_COLOR": "1"},
        )
    running = GatewayProcess(process, log)
    try:
        await running.listening()
        yield running
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 15)
        except TimeoutError:
            process.kill()
            raise
    text = log.read_text()
    assert process.returncode == 0, text[-2000:]
    if not judge:
        return
    assert not (errors := oracles.loud(text, allow_errors)), "\n".join(errors)[:5000]
    assert not (words := oracles.private(text)), words[:10]


def probe(socket_path: Path, answer: str) -> str:
    """A program for a gateway's process: what its function `answer`, given as source, returns is told to whoever connects."""
    return f"""
import collections, gc, json, socket, threading

{answer}

def probe():
    server = socket.socket(socket.AF_UNIX)
    server.bind({str(socket_path)!r})
    server.listen()
    while True:
        one, _ = server.accept()
        one.sendall(json.dumps(answer()).encode())
        one.close()

threading.Thread(target=probe, daemon=True).start()
"""


async def asked(socket_path: Path) -> Any:
    """What a probe answers now."""
    reader, writer = await asyncio.open_unix_connection(str(socket_path))
    answer = json.loads(await reader.read())
    writer.close()
    return answer
