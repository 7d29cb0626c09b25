"""The proxy that anyone would write first: `python -m benchmarks.naive PORT UPSTREAM_PORT [PORT UPSTREAM_PORT]`.

aiohttp's server and client, `iter_any` to `write`; no keys, no limits, no credit, no metrics, no logs.
"""

import argparse
import asyncio

import aiohttp
import uvloop
from aiohttp import web

NOT_PASSED_ON = {"host", "content-length", "transfer-encoding", "connection"}


async def serve(pairs: list[tuple[int, int]]) -> None:
    """Serve until killed."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as session:
        runners = [await _listen(session, port, upstream_port) for port, upstream_port in pairs]
        await asyncio.Event().wait()
        del runners


async def _listen(session: aiohttp.ClientSession, port: int, upstream_port: int) -> web.AppRunner:
    async def handle(request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in NOT_PASSED_ON}
        url = f"http://127.0.0.1:{upstream_port}{request.path_qs}"
        async with session.post(url, data=await request.read(), headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in NOT_PASSED_ON:
                    response.headers[name] = value
            response.content_length = answer.content_length
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=1 << 25)
    app.router.add_post("/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    return runner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.naive", description="A proxy of aiohttp's server and client, and nothing more."
    )
    parser.add_argument("ports", nargs="+", type=int, metavar="PORT UPSTREAM_PORT", help="in pairs, on loopback")
    ports = parser.parse_args().ports
    if len(ports) % 2:
        parser.error("a PORT has no UPSTREAM_PORT")
    uvloop.run(serve(list(zip(ports[::2], ports[1::2], strict=True))))
