"""`python -m simulation`: play histories by their seeds, and report those that break a rule.

    python -m simulation --seeds 1000 --from 1     # these seeds
    python -m simulation --minutes 30 --jobs 2     # seeds from --from on, for so long
    python -m simulation --replay 17               # the transcript of one, shrunk if it fails

The exit code is 1 if a history fails, 2 for options that can't be meant, 74 if the output can't be written, 130 after Ctrl-C.
What plays is imported once the options are read: that takes a second, and an error or Ctrl-C needn't wait for it.
"""
# ruff: noqa: PLC0415

import argparse
import errno
import os
import signal
import sys

MAX_JOBS = 64


def at_least_one(word: str) -> int:
    """Return a number of the command line that is at least 1. Raises ArgumentTypeError."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of at least 1")
    return int(word)


def processes(word: str) -> int:
    """Return how many processes a word of the command line asks for. Raises ArgumentTypeError."""
    if at_least_one(word) > MAX_JOBS:
        raise argparse.ArgumentTypeError(f"{word!r} is more than {MAX_JOBS} processes")
    return int(word)


def _seed(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of at least 0")
    return int(word)


def _minutes(word: str) -> float:
    try:
        if 0 < float(word) < float("inf"):
            return float(word)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{word!r} is no number above 0")


def main(words: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulation", description="Play histories by their seeds.", allow_abbrev=False
    )
    parser.add_argument(
        "--seeds", type=at_least_one, metavar="N", help="how many (100); with --minutes, at most so many"
    )
    parser.add_argument("--from", dest="first", type=_seed, metavar="SEED", help="the first one (1)")
    parser.add_argument("--minutes", type=_minutes, metavar="M", help="as many as fit, one at least")
    parser.add_argument("--jobs", type=processes, metavar="N", help="processes (1)")
    parser.add_argument("--stop", action="store_true", help="end at the first seed that breaks a rule")
    parser.add_argument("--replay", type=_seed, metavar="SEED", help="print the transcript of this one")
    parser.add_argument("--whole", action="store_true", help="with --replay: set-up and the reading of the books too")
    asked = parser.parse_args(words)
    if asked.replay is not None:
        others = [f"--{name}" for name in ("seeds", "minutes", "jobs") if getattr(asked, name) is not None]
        others += ["--from"] * (asked.first is not None) + ["--stop"] * asked.stop
        if others:
            parser.error(f"--replay plays one seed: {', '.join(others)} can't go with it")
        from simulation.replay import replay

        return replay(asked.replay, whole=asked.whole)
    if asked.whole:
        parser.error("--whole goes with --replay")
    from simulation.batch import play

    count = asked.seeds if asked.seeds is not None or asked.minutes is not None else 100
    first = 1 if asked.first is None else asked.first
    return play(first, count, asked.minutes, jobs=asked.jobs or 1, stops=asked.stop)


def _run() -> int:
    """Run the command line of this process, and return its exit code."""
    if sys.stderr is None:  # it was closed before, and the gateways' logs are said to go there
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open until the end
    try:
        if sys.stdout is None:  # it was closed before
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has enough, as `head` has
        code = 128 + signal.SIGPIPE
    except OSError as error:
        print(f"python -m simulation: the output can't be written: {error.strerror}", file=sys.stderr)
        code = os.EX_IOERR
    else:
        return code
    if sys.stdout is not None:  # what is left in its buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(_run())
