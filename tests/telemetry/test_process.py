import sys

import pytest

from meshproxy.telemetry import process
from meshproxy.telemetry.families import PROCESS


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reads_this_process():
    found = {family.name: family.series[0].value for family in process.read()}
    assert {definition.name for definition in PROCESS} == found.keys()
    assert all(value > 0 for value in found.values())
