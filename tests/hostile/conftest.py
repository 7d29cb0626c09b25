"""Hostile clients, against the whole gateway on the loop that it runs on in production."""

import uvloop


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": uvloop.new_event_loop}
