"""`python -m benchmarks [--quick]`, or `make bench`."""

import argparse
import os
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import proxies, suite
from benchmarks.plot import svg
from benchmarks.processes import OTHER_CORE, PROXY_CORE
from benchmarks.report import DIRECT, as_json, machine, tables

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
README = HERE / "README.md"
PLOT = HERE.parent / "docs" / "benchmark.svg"
DESCRIPTORS = 16_384


def main() -> int:
    """Run, and write the table, the JSON and the plot. A quick run writes the table alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="meshproxy beside other proxies.")
    parser.add_argument("--quick", action="store_true", help="within a minute: fewer, shorter cases; nothing written")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PROXY",
        help="nginx, haproxy, meshproxy, naive, pipe, litellm; nothing written",
    )
    args = parser.parse_args()
    missing = {PROXY_CORE, OTHER_CORE} - os.sched_getaffinity(0)
    if missing:
        parser.error(f"needs the cores {PROXY_CORE} and {OTHER_CORE}")
    os.sched_setaffinity(0, {OTHER_CORE})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
    start = time.monotonic()
    results = _run(args.only, quick=args.quick)
    told = tables(results, quick=args.quick)
    print(told)
    if not args.quick and not args.only:
        RESULTS.write_text(as_json(results))
        PLOT.write_text(svg(results))
        _put_into_readme(f"{'; '.join(machine().values())}\n\n{told}")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _run(only: list[str] | None, *, quick: bool) -> suite.Results:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshproxy-bench-")))
        behind = stack.enter_context(proxies.upstreams(directory))
        up = [stack.enter_context(start(behind, directory)) for start in proxies.available(only)]
        direct = proxies.Proxy(DIRECT, None, behind.unary, behind.streams)
        return suite.run(directory, up, direct, quick=quick, tell=lambda what: print(what, file=sys.stderr))


def _put_into_readme(told: str) -> None:
    before, begin, rest = README.read_text().partition("<!-- results -->\n")
    _, end, after = rest.partition("<!-- end of results -->")
    README.write_text(f"{before}{begin}{told}{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
