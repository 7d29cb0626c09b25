"""The configuration that a command's arguments name."""

import argparse

from msgspec.structs import replace

from meshproxy.app.load import read
from meshproxy.config import Settings


def load(args: argparse.Namespace) -> Settings:
    """The settings of --config, else the built-in defaults; --redis wins over redis.url. Unfit with every fault."""
    settings = read(args.config) if args.config else Settings()
    url = getattr(args, "redis", None)
    return settings if url is None else replace(settings, redis=replace(settings.redis, url=url))
