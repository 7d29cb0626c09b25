"""`meshproxy ...` and `python -m meshproxy ...`."""

import signal
import sys


def main() -> int:
    """Run one command; the process's exit code.

    SIGHUP waits from here on until `serve` can reload (app/serve.py): by default it ends a process.
    """
    if sys.argv[1:2] == ["serve"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from meshproxy.cli.command_line import main as run  # noqa: PLC0415 - it takes a while

    return run()


if __name__ == "__main__":
    sys.exit(main())
