"""When a balancer may send traffic, as the admin listener says."""

import asyncio

import pytest

from meshproxy.app.serve import WorkersState, summed_refusals
from meshproxy.app.worker_process import Report
from meshproxy.gateway.record import Refused
from meshproxy.telemetry.exposition import MergedMetrics, encode

DRAINING, NO_LEDGER = "draining", "the ledger can't be reached"


class Workers:
    def __init__(self, not_ready, *, up=True):
        self.metrics = MergedMetrics()
        self.up = asyncio.Event()
        if up:
            self.up.set()
        self._reports = {n: Report(encode([]), reasons, connected=True) for n, reasons in enumerate(not_ready)}

    async def reports(self):
        return self._reports


@pytest.mark.parametrize(
    "not_ready, expected",
    [
        ([[]], []),
        ([[NO_LEDGER]], [NO_LEDGER]),
        ([[NO_LEDGER], []], []),
        ([[NO_LEDGER, DRAINING], [DRAINING]], [DRAINING, NO_LEDGER]),
        ([], ["no worker is up"]),
    ],
)
async def test_one_worker_that_is_ready_is_enough(not_ready, expected):
    assert await WorkersState(Workers(not_ready), 2).ready() == expected


async def test_before_all_were_up_none_is():
    assert await WorkersState(Workers([[]], up=False), 2).ready() == ["starting"]


def test_refusals_of_all_workers_are_summed_and_the_latest_request_is_shown():
    first = Refused("acme", "key_requests", lately=3, request_id="a", at=1.0)
    second = Refused("acme", "key_requests", lately=4, request_id="b", at=2.0)
    third = Refused("other", "credit", lately=1, request_id="c", at=3.0)
    reports = [Report(b"", [], connected=True, refused=refused) for refused in ([third, second], [first])]
    assert [(each["lately"], each["account"], each["request_id"]) for each in summed_refusals(reports)] == [
        (7, "acme", "b"),
        (1, "other", "c"),
    ]
