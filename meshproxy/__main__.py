"""`meshproxy ...` and `python -m meshproxy ...`."""

import os
import signal
import sys


def main() -> int:
    """Run one command; the process's exit code.

    SIGHUP waits from here on until `serve` can reload (app/serve.py): by default it ends a process.
    """
    if sys.argv[1:2] == ["serve"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    _open_closed_streams()
    from meshproxy.cli.command_line import main as run  # noqa: PLC0415 - it takes a while

    return run()


def _open_closed_streams() -> None:
    """Open standard streams that were closed, as with `2>&-`, as /dev/null: the next socket would take the stream's number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)  # noqa: FBT003 - by the workers
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115 - open for good


if __name__ == "__main__":
    sys.exit(main())
