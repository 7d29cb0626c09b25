"""Every target with bytes that hypothesis makes up, and with its seeds cut about. `MESHPROXY_EXAMPLES` says how many."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

EXAMPLES = int(os.environ.get("MESHPROXY_EXAMPLES", "150"))
MAX_EDITS = 6


@pytest.mark.parametrize("name", TARGETS)
def test_its_seeds_hold(name):
    target = TARGETS[name]
    for seed in target.seeds:
        target.check(seed)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_the_bytes_it_holds(name, data):
    target = TARGETS[name]
    target.check(data.draw(st.binary(max_size=300) | _edited(target.seeds, target.words)))


def _edited(seeds, words):
    """Seeds with pieces taken out, put in or put elsewhere."""
    piece = st.sampled_from(words) | st.binary(max_size=8)
    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 40), piece)
    return st.builds(_edit, st.sampled_from(seeds), st.lists(edit, max_size=MAX_EDITS))


def _edit(seed, edits):
    for at, size, piece in edits:
        start = at % (len(seed) + 1)
        seed = seed[:start] + piece + seed[start + size :]
    return seed
