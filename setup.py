"""The build. With MESHPROXY_COMPILE=1 the modules on the way of every request and event become C extensions: the same code,
compiled by mypyc. It takes the extra `compile`, a C compiler, Python's headers, and half a minute.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

# Not among them: whatever defines Structs that are decoded, whose annotations mypyc doesn't keep; what a class outside inherits
# from; what msgspec does in C already; what tests take the place of a method in; and what is asked a few times a minute.
FAST_PATH = {
    ".": "money",
    "wire": "chat event head headers replies sse",
    "policy": "access balance breaker budget catalog failover params pricing tokens transforms window",
    "upstream": "body connection http1 pool provider response",
    "ledger": "cache directory keyspace ledger link",
    "telemetry": "metrics sink",
    "gateway": (
        "admission admitter attempts authenticate exchange first_event health lease pipeline record relay resolve settlement"
    ),
    "server": "body chat connection downstream request_id",
}


def extensions() -> list[Extension]:
    """None, unless they are asked for."""
    if os.environ.get("MESHPROXY_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415 - only who compiles has it

    paths = [str(Path("meshproxy", room, f"{name}.py")) for room, names in FAST_PATH.items() for name in names.split()]
    options = ["--config-file=", "--ignore-missing-imports"]  # strictness is `make check`'s
    return mypycify([*options, *paths], opt_level="3", debug_level="0", multi_file=True)


setup(ext_modules=extensions())
