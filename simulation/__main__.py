"""`python -m simulation`: play histories by their seeds, and report those that break a rule.

    python -m simulation --seeds 1000 --from 1     # these seeds
    python -m simulation --minutes 30 --jobs 2     # seeds from --from on, for so long
    python -m simulation --replay 17               # the transcript of one, shrunk if it fails

The exit code is 1 if a history fails.
"""

import argparse
import gc
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from simulation.history import describe, draw
from simulation.shrink import shrunk
from simulation.story import played

CHUNK: Final = 10  # seeds that a job takes at once
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
    done = played(draw(seed))
    findings = [(found.rule, found.words) for found in done.findings]
    result = Result(seed, done.history.profile, len(done.history.requests), findings)
    del done
    gc.collect()  # at once: what is still in the processor's cache is cheap to look at
    if len(gc.get_objects()) > MOST_SCANNED:
        gc.freeze()  # what is left now is kept for all runs
    return result


def replay(seed: int) -> int:
    """Print the transcript of a seed's history; of the smallest one that fails alike, if it fails."""
    history = draw(seed)
    done = played(history)
    rules = {finding.rule for finding in done.findings}
    if rules:
        smallest = shrunk(history, lambda smaller: bool(rules & {each.rule for each in played(smaller).findings}))
        print(f"shrunk from {len(history.steps)} steps to {len(smallest.steps)}")
        done = played(smallest)
    print("\n".join(describe(done.history)))
    print("\n".join(done.outcome.transcript))
    for finding in done.findings:
        print(f"{finding.rule}: {finding.words}")
    return 1 if rules else 0


def _seeds(first: int, count: int | None, until: float | None) -> Iterator[int]:
    """Yield seeds, a bounded number of them or until a time."""
    for seed in itertools.count(first) if count is None else range(first, first + count):
        if until is not None and time.monotonic() > until:
            return
        yield seed


def report(results: Iterator[Result], *, stops: bool = False) -> int:
    """Count results as they come, print the findings and the sums, and return the exit code. `stops` at the first failure."""
    began = time.monotonic()
    histories = requests = 0
    profiles: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    failing = []
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
    took_s = time.monotonic() - began
    print(
        f"{histories} histories, {requests} requests in {took_s:.1f} s: {histories / max(took_s, 1e-9):.1f} histories/s"
    )
    print(f"profiles: {dict(sorted(profiles.items()))}")
    if failing:
        print(f"{len(failing)} fail: {dict(rules)}; seeds {failing[:100]}")
        print(f"python -m simulation --replay {failing[0]}")
    return 1 if failing else 0


def main(words: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description="Play histories by their seeds.")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many (100)")
    parser.add_argument("--from", dest="first", type=int, default=1, metavar="SEED", help="the first one (1)")
    parser.add_argument("--minutes", type=float, metavar="M", help="as many as fit")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--stop", action="store_true", help="at the first failing seed")
    parser.add_argument("--replay", type=int, metavar="SEED", help="print the transcript of this one")
    asked = parser.parse_args(words)
    if asked.replay is not None:
        return replay(asked.replay)
    until = None if asked.minutes is None else time.monotonic() + asked.minutes * 60
    count = asked.seeds if asked.seeds is not None or until is not None else 100
    seeds = _seeds(asked.first, count, until)
    if asked.jobs == 1:
        return report(map(play_seed, seeds), stops=asked.stop)
    with multiprocessing.Pool(asked.jobs, maxtasksperchild=100) as pool:
        chunks = iter(lambda: list(itertools.islice(seeds, CHUNK * asked.jobs)), [])
        results = (result for chunk in chunks for result in pool.map(play_seed, chunk, 1))
        return report(results, stops=asked.stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
