"""The configuration that a command's arguments name."""

import argparse
import os

from msgspec.structs import replace

from meshproxy.config import Redis, SecretReader, Settings, Unfit


def load(args: argparse.Namespace) -> Settings:
    """The settings of --config, else the built-in defaults. Unfit with every fault."""
    if not args.config:
        return Settings()
    from meshproxy.app.load import read  # noqa: PLC0415 - help needs none of what a file is checked with

    return read(args.config)


def load_redis(args: argparse.Namespace) -> Redis:
    """The store of --redis, else of the configuration, with its secrets. Unfit with every fault. No other secret is read."""
    redis = load(args).redis
    url = getattr(args, "redis", None)
    if url is not None:
        return replace(redis, url=url, password=None)
    from meshproxy.app.load import secret_text  # noqa: PLC0415 - as above

    reader = SecretReader(os.environ, secret_text)
    redis = reader.redis(redis)
    if reader.faults:
        raise Unfit(reader.faults)
    return redis
