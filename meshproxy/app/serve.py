"""`meshproxy serve`: one process, or a supervisor with several workers."""

import os
import sys
from functools import partial

import uvloop

from meshproxy.app.load import admin_token_of, journal_path, load
from meshproxy.app.process import run
from meshproxy.app.supervisor import supervise


def serve(config_path: str) -> int:
    """Serve a configuration until SIGTERM or SIGINT; the exit code. Unfit for a configuration that can't be used."""
    settings, secrets = load(config_path)
    admin_token = admin_token_of(settings)
    workers = settings.server.workers or len(os.sched_getaffinity(0))
    reload = partial(load, config_path)
    journal = None if settings.redis.url == "embedded" else journal_path(settings)
    try:
        if workers == 1:
            uvloop.run(run(settings, secrets, reload=reload, journal=journal, admin_token=admin_token))
        else:
            uvloop.run(supervise(settings, secrets, workers, reload=reload, journal=journal, admin_token=admin_token))
    except OSError as error:
        print(f"meshproxy: {error.strerror or error}: {error.filename or settings.server.listen}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
