"""`python -m simulation`: play histories by their seeds, and report those that break a rule.

    python -m simulation --seeds 1000 --from 1     # these seeds
    python -m simulation --minutes 30 --jobs 2     # seeds from --from on, for so long
    python -m simulation --replay 17               # the transcript of one, shrunk if it fails

The exit code is 1 if a history fails, 2 for options that can't be meant, 130 after Ctrl-C.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from simulation.bills import allowed_charges, text_of
from simulation.client import Sight
from simulation.history import describe, draw
from simulation.provider import Call
from simulation.record import Finding, Record, View
from simulation.run import Line
from simulation.shrink import shrunk
from simulation.story import Played, played

CHUNK: Final = 10  # seeds that a job takes at once
CHUNKS_OF_A_JOB: Final = 100  # before another process takes its place
WAITING_CHUNKS: Final = 3  # for each job: so that none waits for another's long history
MOST_SCANNED: Final = 4_000  # objects that live on and are looked at after each history
MOST_SHOWN: Final = 20  # findings of one rule
MOST_TEXT: Final = 100  # characters of a body or an answer's text
SHOWN_HEADERS: Final = (
    "retry-after",
    "x-should-retry",
    "x-mesh-model",
    "x-mesh-cost",
    "x-mesh-attempts",
    "idempotent-replayed",
)
_PARTICULAR: Final = re.compile(r"""\[.*\]|\{.*\}|\(.*\)|'[^']*'|"[^"]*"|(?:\b(?:id-|mk)?[a-z]?|-)[0-9][0-9a-z._-]*""")
LOGGED_ELSEWHERE: Final = frozenset({"timestamp", "level", "event", "logger", "client", "key_id", "account"})


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


def replay(seed: int, *, whole: bool = False) -> int:
    """Print what a seed's history is and what came of it; of the smallest one that fails alike, if it fails.

    The transcript has what happened from the first step to the end of the last one; `whole`: set-up and reading too.
    """
    history = draw(seed)
    done = played(history)
    is_broken = bool(done.findings)
    if is_broken:
        kept = _gist(done.findings[0])
        smallest = shrunk(history, lambda smaller: kept in map(_gist, played(smaller).findings))
        print(f"shrunk from {len(history.steps)} steps to {len(smallest.steps)} that break {kept[0]} alike")
        done = played(smallest)
    print("\n".join(describe(done.history)))
    print("\nTranscript: seconds as in at_s, where, what\n")
    print("\n".join(_transcript(done, whole=whole)))
    if done.record is not None:
        print("\nCharges in nano-USD, beside what the providers' bills allow\n")
        print("\n".join(_charges(done.record)))
    print()
    for finding in done.findings:
        print(f"{finding.rule}: {finding.words}")
    if not done.findings:
        print("no rule is broken")
    return 1 if is_broken else 0


def _gist(finding: Finding) -> tuple[str, str]:
    """Return what a shrunk history must keep of a finding: the rule and its words, without numbers, names and quotations."""
    return finding.rule, re.sub("#(, #)+", "#", _PARTICULAR.sub("#", finding.words))


def _transcript(done: Played, *, whole: bool) -> list[str]:
    """Return the lines of a history in order of time, with what its clients sent and saw."""
    outcome = done.outcome
    first, last = outcome.marks.get("steps", 0.0), outcome.marks.get("books", float("inf"))
    if whole:
        first, last = 0.0, float("inf")
    lines = [_shorter(line) for line in outcome.lines]
    if done.record is not None:
        lines += [line for sight in done.record.sights for line in _of_client(sight)]
        lines += [line for call in done.record.calls for line in _of_provider(call)]
    return outcome.told(sorted((line for line in lines if first <= line[0] <= last), key=lambda line: line[0]))


def _shorter(line: Line) -> Line:
    """Leave out of a request's log line what is the same in all."""
    at, text, values = line
    if not (values and isinstance(values[-1], str) and values[-1].startswith("{")):
        return line
    logged = json.loads(values[-1])
    told = " ".join(f"{name}={json.dumps(value)}" for name, value in logged.items() if name not in LOGGED_ELSEWHERE)
    return at, text, (*values[:-1], f"log: {told}")


def _of_client(sight: Sight) -> Iterator[Line]:
    """Tell when a client sent a request, and what it saw."""
    name = sight.request_id.removeprefix("id-")
    yield sight.began_at, "%s: the client sends it to gateway-%d: %s", (name, sight.worker, _cut(sight.body.decode()))
    if not sight.status:
        seen = "no answer"
    else:
        shown = [f"{header}: {sight.headers[header]}" for header in SHOWN_HEADERS if header in sight.headers]
        error = sight.error
        told = f"error {error.get('code')}: {error.get('message')}" if error else _text(sight)
        seen = "; ".join([f"status {sight.status}", "a stream" if sight.is_stream else "whole", *shown, told])
        if sight.is_stream:
            seen += "; [DONE]" if "[DONE]" in sight.data else "; no [DONE]"
    yield sight.ended_at, "%s: the client saw %s; the end: %s", (name, seen, sight.ended)


def _text(sight: Sight) -> str:
    """Return the beginning of an answer's text and its length."""
    lines = sight.data if sight.is_stream else [sight.payload.decode(errors="replace")]
    text = "".join(map(text_of, lines))
    return f"text {_cut(text)!r} ({len(text)} characters)"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _of_provider(call: Call) -> Iterator[Line]:
    """Tell what a provider was asked and what it did."""
    where = f"provider {call.upstream}, call {call.number} ({call.marker})"
    yield call.at, "%s: asked for %s", (where, {key: value for key, value in call.body.items() if key != "messages"})
    if call.ended_at:
        said = f"{call.shown_sent} of {call.shown} tokens of text{', a report' if call.reported else ''} sent"
        yield call.ended_at, "%s: the end: %s, %s", (where, call.ended, said)


def _charges(record: Record) -> Iterator[str]:
    """Set each request's charge beside what the model of the bill allows."""
    view = View(record)
    for sight in record.sights:
        allowed = sorted(
            {f"{low}" if low == high else f"{low} to {high}" for low, high in allowed_charges(view, sight)}
        )
        bills = [
            f"{call.upstream} bills {call.bill.prompt} + {call.bill.completion} tokens"
            + (f" at {call.bill.cost_nusd} nano-USD" if call.bill.cost_nusd is not None else "")
            + ("" if call.reported else ", unreported")
            for call in view.calls.get(sight.marker, ())
        ]
        name = sight.request_id.removeprefix("id-")
        right, billed = " or ".join(allowed) or "nothing", "; ".join(bills) or "no call"
        yield f"  {name}: charged {view.charge(sight)}, allowed {right} ({billed})"


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
        for chunk in iter(lambda: list(itertools.islice(seeds, CHUNK)), []):
            waiting.append(pool.apply_async(_play_chunk, (chunk,)))
            if len(waiting) >= jobs * WAITING_CHUNKS:
                yield from waiting.popleft().get()
        while waiting:
            yield from waiting.popleft().get()


def _play_chunk(seeds: list[int]) -> list[Result]:
    return [play_seed(seed) for seed in seeds]


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent, which ends its jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _count(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of at least 1")
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
    parser = argparse.ArgumentParser(prog="python -m simulation", description="Play histories by their seeds.")
    parser.add_argument("--seeds", type=_count, metavar="N", help="how many (100); with --minutes, at most so many")
    parser.add_argument("--from", dest="first", type=_seed, metavar="SEED", help="the first one (1)")
    parser.add_argument("--minutes", type=_minutes, metavar="M", help="as many as fit")
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes (1)")
    parser.add_argument("--stop", action="store_true", help="end at the first seed that breaks a rule")
    parser.add_argument("--replay", type=_seed, metavar="SEED", help="print the transcript of this one")
    parser.add_argument("--whole", action="store_true", help="with --replay: set-up and the reading of the books too")
    asked = parser.parse_args(words)
    if asked.replay is not None:
        others = [f"--{name}" for name in ("seeds", "minutes", "jobs") if getattr(asked, name) is not None]
        others += ["--from"] * (asked.first is not None) + ["--stop"] * asked.stop
        if others:
            parser.error(f"--replay plays one seed: {', '.join(others)} can't go with it")
        return replay(asked.replay, whole=asked.whole)
    if asked.whole:
        parser.error("--whole goes with --replay")
    until = None if asked.minutes is None else time.monotonic() + asked.minutes * 60
    count = asked.seeds if asked.seeds is not None or until is not None else 100
    seeds = _seeds(1 if asked.first is None else asked.first, count, until)
    jobs = asked.jobs or 1
    return report(map(play_seed, seeds) if jobs == 1 else _parallel(seeds, jobs), stops=asked.stop)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)
