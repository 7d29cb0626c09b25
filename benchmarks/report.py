"""Results as tables to read, and as JSON for machines."""

import json
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.proxies import program
from benchmarks.suite import IDLE, LATENCY, REFUSAL, STRANGERS, UNARY, Results, titles

DIRECT = "direct"
REFERENCE = "nginx"

Row = list[str]


def as_json(results: Results) -> str:
    """Everything that was found, and on what."""
    found = {case: {proxy: asdict(result) for proxy, result in by.items()} for case, by in results.items()}
    return json.dumps({"machine": machine(), "versions": versions(), "cases": found}, indent=1) + "\n"


def machine() -> dict[str, str]:
    """What it ran on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return {"cpu": model[1] if model else platform.machine(), "kernel": platform.release(), "python": python}


def versions() -> dict[str, str]:
    """Of the programs and of the libraries that matter."""
    told = {name: _version_of(name) for name in ("nginx", "haproxy", "redis-server")}
    return told | {name: version(name) for name in ("meshproxy", "aiohttp", "uvloop", "hiredis")}


def _version_of(name: str) -> str:
    done = subprocess.run([program(name), "-v"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[\d.]*", done.stdout + done.stderr)
    return found[0] if found else "unknown"


def tables(results: Results, *, quick: bool) -> str:
    """The tables, in Markdown that also reads well in a terminal."""
    names = list(results[UNARY])
    parts = [
        _markdown(["CPU of the proxy, us", *names], list(_cpu_rows(results, names, quick=quick))),
        _markdown([f"latency, ms at {_rate(results):.0f} requests/s", DIRECT, *names], _latency_rows(results, names)),
        _markdown(["streams, ms", DIRECT, *names], list(_stream_rows(results, names, quick=quick))),
        _markdown(["memory", *names], [_memory_row(results, names)]),
    ]
    doubts = "\n".join(_doubts(results))
    if doubts:
        parts.append(f"Less than they should be:\n\n{doubts}")
    return "\n\n".join(parts) + "\n"


def _cpu_rows(results: Results, names: Sequence[str], *, quick: bool) -> Iterator[Row]:
    for case, (title, per) in titles(quick=quick).items():
        by = results[case]
        if not by:
            continue
        reference = by[REFERENCE].us if REFERENCE in by else None
        yield [f"{title}, {per}", *(_with_ratio(by[name].us if name in by else None, reference) for name in names)]


def _with_ratio(us: float | None, reference: float | None) -> str:
    if us is None:
        return ""
    told = f"{us:.0f}" if us >= 100 else f"{us:.1f}"
    return f"{told} ({us / reference:.1f}x)" if reference else told


def _rate(results: Results) -> float:
    return results[LATENCY][DIRECT].more["per_s"]


def _latency_rows(results: Results, names: Sequence[str]) -> list[Row]:
    by = results[LATENCY]
    rows = []
    for key, title in (("p50_ms", "p50"), ("p99_ms", "p99"), ("p999_ms", "p99.9")):
        direct = by[DIRECT].more[key]
        added = (f"+{by[name].more[key] - direct:.2f}" for name in names)
        rows.append([f"{title}, added to direct's", f"{direct:.2f}", *added])
    return rows


def _stream_rows(results: Results, names: Sequence[str], *, quick: bool) -> Iterator[Row]:
    told = (
        ("first_event_ms_p50", "to the first event, p50"),
        ("first_event_ms_p99", "p99"),
        ("gap_ms_p99", "gap, p99"),
    )
    for case, (title, _) in titles(quick=quick).items():
        if case.startswith("paced"):
            by = results[case]
            for key, what in told:
                yield [f"{title}: {what}", *(f"{by[name].more[key]:.1f}" for name in (DIRECT, *names))]


def _memory_row(results: Results, names: Sequence[str]) -> Row:
    found = (results[IDLE][name].more.get("bytes_per_stream") for name in names)
    return ["KiB an idle stream", *("" if each is None else f"{each / 1024:.1f}" for each in found)]


def _doubts(results: Results) -> Iterator[str]:
    """What makes figures less than they should be."""
    for case, by in results.items():
        lost = {name: result.more.get("cut", 0) for name, result in by.items()}
        if case != REFUSAL:
            lost = {name: count + by[name].more.get("refused", 0) for name, count in lost.items()}
        strangers = {name: result.more.get("strangers_busy", 0.0) for name, result in by.items() if name != DIRECT}
        if any(lost.values()):
            yield f"- {case}: refused or cut: {_told(lost, '.0f', 0)}"
        if max(strangers.values(), default=0.0) > STRANGERS:
            yield f"- {case}: others used the proxy's core: {_told(strangers, '.0%', STRANGERS)}"


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
