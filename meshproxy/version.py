"""What version this is, from the package's own metadata."""

from importlib.metadata import version

VERSION = version("meshproxy")
