"""Two wires fail at once: see table.py."""

import asyncio
import itertools

import pytest

from tests.faults.conftest import MAX_HEAR_S, SHORT_S, Terms
from tests.faults.phases import PHASES, THEN
from tests.faults.play import heard, written
from tests.faults.table import OUTCOMES, PAIRS, SECURED, SHAPES, word_of

CASES = [(*pair, shape) for pair, shape in itertools.product(PAIRS, SHAPES) if word_of(PAIRS[pair], shape) != "-"]


@pytest.fixture
def terms(first, second, shape):
    """Redis alone comes down to its time-out: whoever else is silent is hung up on before."""
    redis_s = SHORT_S if "blackhole" in (first[2] + second[2]) and "Redis" in (first[0], second[0]) else MAX_HEAR_S
    abandoned = OUTCOMES[word_of(PAIRS[first, second], shape)].hold == "abandoned"
    return Terms(redis_s=redis_s, ttl_s=SHORT_S if abandoned else MAX_HEAR_S, secured=second[0] in SECURED)


@pytest.mark.parametrize("first, second, shape", CASES)
async def test_two_faults_have_their_outcome_and_leave_nothing(stage, first, second, shape):
    before = stage.held()
    for leg, phase, mode in (first, second):
        stage.wires[leg].fault = PHASES[leg][phase](mode) if phase != THEN else None
    is_slow = shape == "stream" and second[1] != "at the answer's end"  # else that comes while the first lasts
    asked = asyncio.create_task(stage.ask("slow" if is_slow else "", stream=shape == "stream"))
    for leg, phase, mode in (first, second):
        if phase == THEN:
            await stage.wires[leg].strike(mode, "target")
        await stage.mesh.until(lambda leg=leg: stage.wires[leg].struck)
    got = await asked
    await stage.nothing_left(before)
    assert await written(stage, heard(got)) == OUTCOMES[word_of(PAIRS[first, second], shape)]
