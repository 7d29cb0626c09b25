"""Which cases are run, how long, and over which proxies: case by case, so that a machine's moods meet all proxies alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import cases
from benchmarks.cases import Result
from benchmarks.proxies import Proxy

Results = dict[str, dict[str, Result]]  # by case, then by proxy

CHANGES = "changes"
IDLE = "idle"
LATENCIES_PER_S = (300, 2000)
REFUSAL = "refusal"
UNARY = "unary"

STRANGERS = 0.1  # of the proxy's core, used by others: a row above it isn't reported
TRIES = 3
AGAIN_UNTIL_S = 100.0  # spoilt cases of one repeat are run again so long; without that a repeat takes some 200 s
HEADROOM = 1.2  # times the rate of a latency: who reached less with whole answers is not measured


@dataclass(frozen=True)
class Case:
    """`per`: what `us` is for each of. `direct`: the upstreams themselves are measured too, to know what they add."""

    key: str
    title: str
    per: str
    run: Callable[[Proxy], Result]
    direct: bool = False


def latency_key(per_s: int) -> str:
    """Return the key of the case that measures latency at a rate."""
    return f"latency_{per_s}"


def suite(directory: Path, *, quick: bool) -> list[Case]:
    """Return the cases in their order; memory first, while no heap has grown."""
    unary = partial(cases.unary, directory=directory)
    if quick:
        return [
            _idle(200),
            Case(UNARY, "whole answer", "request", partial(unary, seconds=1)),
            _paced(200, 10, 1.5),
            _alone(200, 1.5),
            Case("burst", "100 events at once", "event", partial(cases.burst, seconds=1.0)),
        ]
    return [
        _idle(1000),
        Case(UNARY, "whole answer", "request", partial(unary, seconds=5)),
        Case("prompt_64k", "whole answer, prompt of 64 KiB", "request", partial(unary, seconds=4, prompt_bytes=65_536)),
        *(_paced(streams, 10, 3.0) for streams in (50, 200)),
        _paced(1000, 40, 4.0),
        _alone(300, 3.0),
        Case("burst", "100 events at once", "event", partial(cases.burst, seconds=3.0)),
    ]


def repeat(
    directory: Path, proxies: Sequence[Proxy], direct: Proxy, *, quick: bool, report: Callable[[str], None]
) -> Results:
    """Run everything once. Latencies come last, at rates that a proxy has shown to reach."""
    runner = _Runner(report, 0.0 if quick else AGAIN_UNTIL_S)
    everyone = [direct, *proxies]
    results: Results = {}
    for case in suite(directory, quick=quick):
        results[case.key] = runner.over(everyone if case.direct else proxies, case)
    refusing = [proxy for proxy in proxies if proxy.empty_key is not None]
    refuse = partial(cases.refusals, directory=directory, seconds=1 if quick else 4)
    results[REFUSAL] = runner.over(refusing, Case(REFUSAL, "429", "refusal", refuse))
    for per_s in LATENCIES_PER_S:
        able = [proxy for proxy in proxies if results[UNARY][proxy.name].more.get("per_s", 0.0) > HEADROOM * per_s]
        load = partial(cases.latency, per_s=per_s, seconds=1.5 if quick else 5.0)
        case = Case(latency_key(per_s), f"latency at {per_s}/s", "request", load)
        results[case.key] = runner.over([direct, *able], case)
    results[CHANGES] = runner.over(proxies, Case(CHANGES, "changes", "answer", cases.changes))
    return results


def combined(repeats: Sequence[Results]) -> Results:
    """Return the medians of all figures, with the spread of `us` over the repeats: (largest - smallest) / median.

    A repeat whose core had strangers on it for more than STRANGERS doesn't count. Where none is left, `us` is None.
    """
    return {
        case: {name: _median([repeat[case][name] for repeat in repeats if name in repeat[case]]) for name in by}
        for case, by in repeats[0].items()
    }


def _median(repeats: Sequence[Result]) -> Result:
    undisturbed = [result for result in repeats if not _is_spoilt(result)]
    if not undisturbed:
        return Result(0, more={"strangers_busy": min(map(_strangers, repeats))})
    keys = set.intersection(*(set(result.more) for result in undisturbed))
    more = {key: statistics.median(result.more[key] for result in undisturbed) for key in sorted(keys)}
    us = [result.us for result in undisturbed if result.us is not None]
    if any(us):  # the upstreams alone have no proxy whose time could be measured
        more["spread"] = (max(us) - min(us)) / statistics.median(us)
    more["repeats"] = len(undisturbed)
    return Result(undisturbed[0].count, statistics.median(us) if us else None, more)


class _Runner:
    """Runs cases, and those again that a stranger on the proxy's core has spoilt, while there is time."""

    def __init__(self, report: Callable[[str], None], again_until_s: float) -> None:
        self._report = report
        self._deadline = time.monotonic() + again_until_s

    def over(self, proxies: Sequence[Proxy], case: Case) -> dict[str, Result]:
        """Run one case over these proxies."""
        return {proxy.name: self._least_disturbed(proxy, case) for proxy in proxies}

    def _least_disturbed(self, proxy: Proxy, case: Case) -> Result:
        results: list[Result] = []
        while not results or (_is_spoilt(results[-1]) and len(results) < TRIES and time.monotonic() < self._deadline):
            self._report(f"{case.title}: {proxy.name}{' again' if results else ''}")
            try:
                results.append(case.run(proxy))
            except (RuntimeError, OSError) as error:  # what a peer can't do leaves its cell empty
                self._report(f"{case.title}: {proxy.name}: {error}")
                return Result(0)
        return min(results, key=_strangers)


def _is_spoilt(result: Result) -> bool:
    return _strangers(result) > STRANGERS


def _strangers(result: Result) -> float:
    return result.more.get("strangers_busy", 0.0)


def titles(*, quick: bool) -> dict[str, tuple[str, str]]:
    """Return title and unit of every case that is measured in CPU time."""
    measured = {case.key: (case.title, case.per) for case in suite(Path(), quick=quick) if case.key != IDLE}
    return measured | {REFUSAL: ("refusal (429)", "request")}


def _idle(streams: int) -> Case:
    return Case(IDLE, f"{streams} idle streams", "stream", partial(cases.idle, streams=streams))


def _paced(streams: int, interval_ms: int, seconds: float) -> Case:
    title = f"{streams} streams, an event every {interval_ms} ms"
    load = partial(cases.paced, streams=streams, interval_ms=interval_ms, seconds=seconds)
    return Case(f"paced_{streams}", title, "event", load, direct=True)


def _alone(streams: int, seconds: float) -> Case:
    load = partial(cases.events_alone, streams=streams, seconds=seconds)
    return Case("event_alone", f"{streams} streams, in mid-stream", "event", load, direct=True)
