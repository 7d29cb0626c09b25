"""Results as tables to read, and as JSON for machines."""

import json
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.cases import Result
from benchmarks.processes import program
from benchmarks.suite import CHANGES, IDLE, LATENCIES_PER_S, REFUSAL, STRANGERS, UNARY, Results, latency_key, titles

DIRECT = "direct"
REFERENCE = "nginx"

Row = list[str]


def as_json(results: Results, repeats: Sequence[Results]) -> str:
    """Return the medians and every repeat, and on what they were measured."""

    def plain(measured: Results) -> dict[str, dict[str, object]]:
        return {case: {proxy: asdict(result) for proxy, result in by.items()} for case, by in measured.items()}

    document = {
        "machine": machine(),
        "versions": versions(),
        "cases": plain(results),
        "repeats": [plain(repeat) for repeat in repeats],
    }
    return json.dumps(document, indent=1) + "\n"


def machine() -> dict[str, str]:
    """What it ran on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return {"cpu": model[1] if model else platform.machine(), "kernel": platform.release(), "python": python}


def versions() -> dict[str, str]:
    """Of the programs and of the libraries that matter."""
    programs = {name: _version_of(name) for name in ("nginx", "haproxy", "redis-server")}
    return programs | {name: version(name) for name in ("meshproxy", "aiohttp", "uvloop", "hiredis")}


def _version_of(name: str) -> str:
    done = subprocess.run([program(name), "-v"], capture_output=True, text=True, check=False)
    number = re.search(r"\d+\.\d+[\d.]*", done.stdout + done.stderr)
    return number[0] if number else "unknown"


def tables(results: Results, *, quick: bool) -> str:
    """Return the tables, in Markdown that also reads well in a terminal."""
    names = list(results[UNARY])
    parts = [
        _markdown(["CPU of the proxy, us", *names], list(_cpu_rows(results, names, quick=quick))),
        _markdown(["latency of whole answers, ms", DIRECT, *names], list(_latency_rows(results, names))),
        _markdown(["streams, ms", DIRECT, *names], list(_stream_rows(results, names, quick=quick))),
        _markdown(["memory and bytes", *names], list(_other_rows(results, names))),
    ]
    doubts = "\n".join(_doubts(results))
    if doubts:
        parts.append(f"Of these rows not everything counts:\n\n{doubts}")
    return "\n\n".join(parts) + "\n"


def _cpu_rows(results: Results, names: Sequence[str], *, quick: bool) -> Iterator[Row]:
    for case, (title, per) in titles(quick=quick).items():
        by = results[case]
        reference = by[REFERENCE].us if REFERENCE in by else None
        yield [f"{title}, {per}", *(_cpu(by.get(name), reference) for name in names)]


def _cpu(result: Result | None, reference: float | None) -> str:
    """Return microseconds, the ratio to the reference, and the spread over the repeats."""
    if result is None or result.us is None:
        return ""
    us = f"{result.us:.0f}" if result.us >= 100 else f"{result.us:.1f}"
    ratio = f" ({result.us / reference:.1f}x)" if reference else ""
    spread = f" ±{result.more['spread'] / 2:.0%}" if result.more.get("repeats", 0) > 1 else ""
    return us + ratio + spread


def _figure(by: Mapping[str, Result], name: str, key: str, form: str) -> str:
    value = by[name].more.get(key) if name in by else None
    return "" if value is None else format(value, form)


def _latency_rows(results: Results, names: Sequence[str]) -> Iterator[Row]:
    for per_s in LATENCIES_PER_S:
        by = results[latency_key(per_s)]
        for key, title in (("p50_ms", "p50"), ("p99_ms", "p99"), ("p999_ms", "p99.9")):
            yield [f"{per_s}/s: {title}", *(_figure(by, name, key, ".2f") for name in (DIRECT, *names))]


def _stream_rows(results: Results, names: Sequence[str], *, quick: bool) -> Iterator[Row]:
    figures = (
        ("first_event_ms_p50", "to the first event, p50"),
        ("first_event_ms_p99", "p99"),
        ("gap_ms_p99", "gap, p99"),
    )
    for case, (title, _) in titles(quick=quick).items():
        if case.startswith("paced"):
            for key, label in figures:
                yield [f"{title}: {label}", *(_figure(results[case], name, key, ".1f") for name in (DIRECT, *names))]


def _other_rows(results: Results, names: Sequence[str]) -> Iterator[Row]:
    sizes = (results[IDLE][name].more.get("bytes_per_stream") for name in names)
    yield ["KiB an idle stream", *("" if size is None else f"{size / 1024:.1f}" for size in sizes)]
    whole = {0.0: "no", 1.0: "yes"}
    changed = (results[CHANGES][name].more.get("whole_changed", -1.0) for name in names)
    yield ["whole answer: body changed", *(whole.get(share, "") for share in changed)]
    events = (_figure(results[CHANGES], name, "events_changed", ".0f") for name in names)
    yield ["stream of 103 events: changed, dropped or added", *events]


def _doubts(results: Results) -> Iterator[str]:
    """Say which rows have less behind them than they should."""
    for case, by in results.items():
        lost = {name: result.more.get("cut", 0) for name, result in by.items()}
        if case != REFUSAL:
            lost = {name: count + by[name].more.get("refused", 0) for name, count in lost.items()}
        uneven = {name: result.more.get("uneven", 0.0) for name, result in by.items()}
        strangers = {name: result.more.get("strangers_busy", 0.0) for name, result in by.items() if name != DIRECT}
        if any(lost.values()):
            yield f"- {case}: refused or cut: {_told(lost, '.0f', 0)}"
        if any(uneven.values()):
            yield f"- {case}: streams with another number of events than were sent: {_told(uneven, '.0f', 0)}"
        if max(strangers.values(), default=0.0) > STRANGERS:
            yield f"- {case}: not reported, for others used the proxy's core: {_told(strangers, '.0%', STRANGERS)}"


def _told(values: Mapping[str, float], form: str, above: float) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items() if value > above)


def _markdown(head: Row, rows: Sequence[Row]) -> str:
    """A table whose columns line up, the numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    rule = ["-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)]
    first, *others = (_line(row, widths) for row in [head, *rows])
    return "\n".join([first, f"|{'|'.join(rule)}|", *others])


def _line(row: Row, widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return f"| {' | '.join(cells)} |"
