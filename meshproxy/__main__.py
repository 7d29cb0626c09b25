"""`meshproxy ...` and `python -m meshproxy ...`."""

import sys

from meshproxy.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
