"""A provider that says everything it hears, our key included, in every way that a provider can fail."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

ANSWER = "canary-answer"
STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503, 529)
WAYS = (
    *(f"say-{status}" for status in STATUSES),
    "html",
    "text",
    "redirect",
    "well",
    "error-in-200",
    "error-event",
    "cut",
)

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


class Parrot:
    """What it heard, and where it is."""

    def __init__(self) -> None:
        self.url = ""
        self.heard: list[tuple[dict[str, str], bytes]] = []

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.heard.append((headers, body))
        told = json.loads(body)
        said = f"I heard {headers} and {body.decode()}"
        return await _answer(request, told["model"], said, stream=told.get("stream", False))


async def _answer(request: web.Request, way: str, said: str, *, stream: bool) -> web.StreamResponse:
    error = {"error": {"message": said, "code": 500, "metadata": {"raw": said}}}
    echo = {
        "x-echo": said[:500].replace("\n", " "),
        "set-cookie": f"a={said[:100]}",
        "openai-organization": "org-canary",
    }
    if way.startswith("say-"):
        return web.json_response(error, status=int(way.removeprefix("say-")), headers=echo)
    if way == "html":
        return web.Response(
            status=502, text=f"<html><title>{said}</title></html>", content_type="text/html", headers=echo
        )
    if way == "text":
        return web.Response(
            status=500, text=("x" * 1990 + request.headers["authorization"].removeprefix("Bearer ")) * 10, headers=echo
        )
    if way == "redirect":
        return web.Response(status=302, headers={"location": "http://127.0.0.1:1/elsewhere", **echo})
    if way == "error-in-200" and not stream:
        return web.json_response(error, headers=echo)
    if not stream:
        choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
        return web.json_response({"model": "parrot", "choices": [choice], "usage": USAGE}, headers=echo)
    return await _stream(request, way, error, echo)


async def _stream(request, way, error, headers) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream", **headers})
    await response.prepare(request)
    if way != "error-in-200":
        await _event(response, {"choices": [{"index": 0, "delta": {"content": ANSWER}}]})
    if way in {"error-event", "error-in-200"}:
        await _event(response, error)
    elif way == "cut":
        request.transport.abort()
    else:
        await _event(response, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await _event(response, {"choices": [], "usage": USAGE})
        await response.write(b"data: [DONE]\n\n")
    return response


async def _event(response: web.StreamResponse, event) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@asynccontextmanager
async def parrot() -> AsyncIterator[Parrot]:
    bird = Parrot()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", bird.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    bird.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield bird
    finally:
        await runner.cleanup()
