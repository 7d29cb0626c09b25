import sys

import pytest
from prometheus_client import ProcessCollector

from meshproxy.telemetry import process


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reads_what_others_read():
    expected = {s.name: s.value for metric in ProcessCollector(registry=None).collect() for s in metric.samples}
    found = {family.name: family.series[0].value for family in process.read()}
    assert pytest.approx(expected, rel=0.1, abs=0.1) == found
    assert pytest.approx(expected["process_start_time_seconds"], abs=0.01) == found["process_start_time_seconds"]
