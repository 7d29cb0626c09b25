"""The composition root: the one place that reads files, environment and clock, and puts the rooms together."""

from meshproxy.app.application import create_app
from meshproxy.app.load import load
from meshproxy.app.process import Running, run, serve

__all__ = ["Running", "create_app", "load", "run", "serve"]
