"""The wire to Redis fails at each phase of a request: see table.py."""

import pytest

from tests.faults.play import played
from tests.faults.table import cases_of, expected_of


@pytest.mark.parametrize("case", cases_of("Redis"), ids=", ".join)
async def test_a_fault_has_its_outcome_and_leaves_nothing(stage, case):
    assert await played(stage, case) == expected_of(case)
