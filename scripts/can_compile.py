"""Whether C extensions can be built here: exits with 1, and says so, if not."""

# ruff: noqa: INP001 - a script, not a package

import shutil
import sys
import sysconfig
from pathlib import Path

if shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
    sys.stdout.write("no C compiler, or no Python.h: the compiled gateway is not tested\n")
    sys.exit(1)
