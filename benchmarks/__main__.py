"""`python -m benchmarks [--quick]`, or `make bench`."""

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import peers, proxies, suite
from benchmarks.plot import svg
from benchmarks.processes import OTHER_CORE, PROXY_CORE
from benchmarks.report import DIRECT, as_json, machine, tables

HERE = Path(__file__).parent
README = HERE / "README.md"
PLOT = HERE.parent / "docs" / "benchmark.svg"
REFERENCE_PYTHON = "3.11"  # Debian's: the plot is of its run
DESCRIPTORS = 16_384
REPEATS = 3


def main() -> int:
    """Run, and write tables, JSON and the plot. A quick run, or one of some proxies, writes nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="meshproxy beside other proxies.")
    parser.add_argument("--quick", action="store_true", help="within a minute: one repeat of fewer, shorter cases")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"whose medians are reported (default {REPEATS})")
    parser.add_argument(
        "--only", nargs="+", metavar="PROXY", help="nginx, haproxy, meshproxy, naive, pipe or a peer's name"
    )
    args = parser.parse_args()
    missing = {PROXY_CORE, OTHER_CORE} - os.sched_getaffinity(0)
    if missing:
        parser.error(f"needs the cores {PROXY_CORE} and {OTHER_CORE}")
    os.sched_setaffinity(0, {OTHER_CORE})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
    start = time.monotonic()
    repeats = [_run(args.only, quick=args.quick) for _ in range(1 if args.quick else args.repeats)]
    results = suite.combined(repeats)
    report = tables(results, quick=args.quick)
    print(report)
    if not args.quick and not args.only:
        python = ".".join(platform.python_version_tuple()[:2])
        (HERE / f"results-{python}.json").write_text(as_json(results, repeats))
        _put_into_readme(python, f"{'; '.join(machine().values())}; medians of {args.repeats}\n\n{report}")
        if python == REFERENCE_PYTHON:
            PLOT.write_text(svg(results))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _run(only: list[str] | None, *, quick: bool) -> suite.Results:
    """One repeat, with processes that are new."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshproxy-bench-")))
        behind = stack.enter_context(proxies.upstreams(directory))
        starts = [start for start in (*proxies.own(), *peers.available()) if only is None or start.__name__ in only]
        up = [stack.enter_context(start(behind, directory)) for start in starts]
        direct = proxies.Proxy(DIRECT, None, behind.unary, behind.streams)
        return suite.repeat(directory, up, direct, quick=quick, report=lambda line: print(line, file=sys.stderr))


def _put_into_readme(python: str, report: str) -> None:
    before, begin, rest = README.read_text().partition(f"<!-- results {python} -->\n")
    _, end, after = rest.partition("<!-- end of results -->")
    README.write_text(f"{before}{begin}{report}{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
