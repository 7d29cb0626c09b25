"""The configuration that a command's arguments name."""

import argparse
from pathlib import Path

import msgspec

from meshproxy.config import Settings, Unfit, parse


def load(args: argparse.Namespace) -> Settings:
    """The settings of --config, else the built-in defaults; --redis wins over redis.url. Unfit with every fault."""
    settings = read(args.config) if args.config else Settings()
    url = getattr(args, "redis", None)
    if url is None:
        return settings
    return msgspec.structs.replace(settings, redis=msgspec.structs.replace(settings.redis, url=url))


def read(path: str) -> Settings:
    """The settings of one file; Unfit too if it can't be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Unfit([f"{path}: can't be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise Unfit([f"{path}: not UTF-8"]) from error
    return parse(text)
