"""Play many seeds, in several processes where asked, and report which break a rule."""

import gc
import itertools
import multiprocessing
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from simulation.drawing import draw
from simulation.story import played

CHUNK: Final = 10  # seeds that a job takes at once
FIRST_CHUNKS: Final = 6  # of one seed each, for each job: an early Ctrl-C has something to count
CHUNKS_OF_A_JOB: Final = 100  # before another process takes its place
WAITING_CHUNKS: Final = 3  # for each job: so that none waits for another's long history
MOST_SCANNED: Final = 4_000  # objects that live on and are looked at after each history
MOST_SHOWN: Final = 20  # findings of one rule


class Result(NamedTuple):
    """What came of one seed."""

    seed: int
    profile: str
    requests: int
    findings: list[tuple[str, str]]


def play_seed(seed: int) -> Result:
    """Play a seed's history."""
    gc.disable()  # each automatic collection would look at what a run still needs
    done = played(draw(seed), is_traced=False)
    findings = [(found.rule, found.words) for found in done.findings]
    result = Result(seed, done.history.profile, len(done.history.requests), findings)
    del done
    gc.collect()  # at once: what is still in the processor's cache is cheap to look at
    if len(gc.get_objects()) > MOST_SCANNED:
        gc.freeze()  # what is left now is kept for all runs
    return result


def play(first: int, count: int | None, minutes: float | None, *, jobs: int, stops: bool) -> int:
    """Play so many seeds from a first one on, or as many as fit into a time (one at least), and return the exit code."""
    until = None if minutes is None else time.monotonic() + minutes * 60
    seeds = _seeds(first, count, until)
    return report(map(play_seed, seeds) if jobs == 1 else _parallel(seeds, jobs), stops=stops)


def _seeds(first: int, count: int | None, until: float | None) -> Iterator[int]:
    """Yield seeds, a bounded number of them or until a time."""
    for seed in itertools.count(first) if count is None else range(first, first + count):
        yield seed
        if until is not None and time.monotonic() > until:
            return


def report(results: Iterator[Result], *, stops: bool = False) -> int:
    """Count results as they come, print the findings and the sums, and return the exit code. `stops` at the first failure."""
    began = time.monotonic()
    histories = requests = 0
    profiles: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    failing = []
    is_interrupted = False
    try:
        for result in results:
            histories += 1
            requests += result.requests
            profiles[result.profile] += 1
            if result.findings:
                failing.append(result.seed)
            for rule, words in result.findings:
                rules[rule] += 1
                if rules[rule] <= MOST_SHOWN:
                    print(f"seed {result.seed}: {rule}: {words}", flush=True)
            if stops and failing:
                break
    except KeyboardInterrupt:
        is_interrupted = True
    took_s = time.monotonic() - began
    print(
        f"{histories} histories, {requests} requests in {took_s:.1f} s: {histories / max(took_s, 1e-9):.1f} histories/s"
    )
    print(f"profiles: {dict(sorted(profiles.items()))}")
    if failing:
        print(f"{len(failing)} fail: {dict(rules)}; seeds {failing[:100]}")
        print(f"python -m simulation --replay {failing[0]}")
    if is_interrupted:
        return 128 + signal.SIGINT
    return 1 if failing else 0


def _parallel(seeds: Iterator[int], jobs: int) -> Iterator[Result]:
    """Play seeds in several processes, and yield the results in order."""
    with multiprocessing.Pool(jobs, _ignore_interrupts, maxtasksperchild=CHUNKS_OF_A_JOB) as pool:
        waiting: deque[Any] = deque()
        sizes = itertools.chain([1] * FIRST_CHUNKS * jobs, itertools.repeat(CHUNK))
        try:
            for chunk in iter(lambda: list(itertools.islice(seeds, next(sizes))), []):
                waiting.append(pool.apply_async(_play_chunk, (chunk,)))
                if len(waiting) >= jobs * WAITING_CHUNKS:
                    yield from waiting[0].get()
                    waiting.popleft()
            while waiting:
                yield from waiting[0].get()
                waiting.popleft()
        except KeyboardInterrupt:
            for done in waiting:
                if done.ready():
                    yield from done.get()
            raise


def _play_chunk(seeds: list[int]) -> list[Result]:
    return [play_seed(seed) for seed in seeds]


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent, which ends its jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
