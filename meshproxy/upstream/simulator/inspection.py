"""/_sim: what the simulator received, for tests in any language to ask."""

import msgspec
from aiohttp import web

from meshproxy.upstream.simulator.faults import REDIRECTED
from meshproxy.upstream.simulator.journal import COMPLETED, Journal


def add_routes(router: web.UrlDispatcher, journal: Journal) -> None:
    """GET and DELETE /_sim/requests, GET /_sim/stats, and the place that redirects lead to."""
    desk = _Desk(journal)
    router.add_get("/_sim/requests", desk.requests)
    router.add_delete("/_sim/requests", desk.clear)
    router.add_get("/_sim/stats", desk.stats)
    router.add_route("*", REDIRECTED, desk.redirected)


class _Desk:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def requests(self, _request: web.Request) -> web.Response:
        """Oldest first."""
        return _json({"requests": [entry.told() for entry in self._journal.entries]})

    async def clear(self, _request: web.Request) -> web.Response:
        self._journal.clear()
        return web.Response(status=204)

    async def stats(self, _request: web.Request) -> web.Response:
        return _json(self._journal.stats())

    async def redirected(self, request: web.Request) -> web.Response:
        """Nobody should come here: a gateway never follows a redirect. Whoever does is noted."""
        entry = self._journal.open(request, await request.read())
        self._journal.close(entry, COMPLETED)
        return _json({"redirected": True})


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
