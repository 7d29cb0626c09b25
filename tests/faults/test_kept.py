"""A request that outlives its client, by its Idempotency-Key or its provider's on_disconnect = "drain": see table.py."""

import pytest

from tests.faults.conftest import Terms
from tests.faults.phases import IDLE
from tests.faults.play import FULL_NUSD, balanced, heard, model_of, struck, written
from tests.faults.table import KEPT, OUTCOMES, SHAPES, TABLE, word_of

CASES = [
    (leg, phase, shape) for leg, phase in TABLE for shape in SHAPES if leg in ("client", "upstream") and phase != IDLE
]


@pytest.fixture
def terms(kept_by):
    return Terms(wired={"on_disconnect": "drain"} if kept_by == "drain" else {})


@pytest.mark.parametrize("leg, phase, shape", CASES)
@pytest.mark.parametrize("kept_by", ["drain", "idempotency-key"])
async def test_a_reset_has_its_outcome_and_leaves_nothing(stage, kept_by, leg, phase, shape):
    """Asked again, a key gives the answer that was charged for, or the first one."""
    before = stage.held()
    stage.headers = {} if kept_by == "drain" else {kept_by: "once"}
    got = await struck(stage, leg, phase, "reset", stream=shape == "stream")
    await stage.mesh.quiet()
    outcome = OUTCOMES[word_of(KEPT.get((leg, phase), TABLE[leg, phase][0]), shape)]
    assert await written(stage, heard(got)) == outcome
    if kept_by != "drain":
        model = model_of(leg, phase, stream=shape == "stream")
        assert heard(await stage.ask(model, stream=shape == "stream")) == "200"
        paid_in_vain = (await balanced(stage)).settled_nusd - FULL_NUSD
        assert (outcome.charge == "a part") == (paid_in_vain > 0)
    await stage.nothing_left(before)


@pytest.mark.parametrize("kept_by", ["drain", "idempotency-key"])
async def test_a_provider_that_fails_is_no_bug_of_ours(stage, kept_by):
    before = stage.held()
    stage.headers = {kept_by: "once"}
    await struck(stage, "upstream", "before the answer", "reset", stream=False)
    await stage.nothing_left(before)
