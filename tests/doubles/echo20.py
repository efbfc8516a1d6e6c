"""An echo service as anybody would write it in twenty lines. `python echo20.py PORT` runs it alone."""

import asyncio
import sys

import websockets

log: list[str] = []


async def echo(call):
    async for message in call:
        if isinstance(message, bytes):
            await call.send(message)
        else:
            log.append(message)
            print(message, flush=True)


async def main():
    async with websockets.serve(echo, "127.0.0.1", int(sys.argv[1])) as server:
        print(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
