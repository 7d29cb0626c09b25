"""Admit: from a plan to a lease or a denial, with the ledger or, where that is lost and the settings say so, without it."""

import asyncio

from meshproxy.gateway.admission import affordable, ask_for, clamps, first_slice
from meshproxy.gateway.deployment import Deployment
from meshproxy.gateway.exchange import Exchange
from meshproxy.gateway.lease import Credit, Lease
from meshproxy.gateway.resolve import Plan
from meshproxy.gateway.settlement import Settler
from meshproxy.ledger.ledger import Ledger
from meshproxy.ledger.local import LocalAdmission
from meshproxy.ledger.records import Denied
from meshproxy.ledger.store import Unavailable
from meshproxy.policy.principal import Principal
from meshproxy.telemetry.tasks import Tasks


class Admitter:
    """Admits the requests of one worker. `local` is None where Redis's absence denies."""

    def __init__(self, ledger: Ledger, local: LocalAdmission | None, settler: Settler, tasks: Tasks) -> None:
        self._ledger = ledger
        self._local = local
        self._settler = settler
        self._credit = {enforce: Credit(ledger, local, tasks, enforce_tokens=enforce) for enforce in (False, True)}

    async def admit(
        self, exchange: Exchange, plan: Plan, principal: Principal, deployment: Deployment
    ) -> Lease | Denied:
        """A lease on what the plan may cost, or why there is none. Unavailable where the ledger is lost and has no substitute."""
        settings = deployment.settings
        credit = settings.credits
        enforce = settings.limits.enforce_mid_stream and plan.request.stream
        covered = first_slice(plan, credit)
        ask = ask_for(plan, covered, principal, exchange.hold_id, credit, settings.defaults, enforce_mid_stream=enforce)
        is_local = False
        try:
            answer = await self._ledger.admit(ask)
        except Unavailable:
            if self._local is None or not self._local.has_room(ask):
                raise
            answer, is_local = self._local.admit(ask), True
        except BaseException as error:  # nobody waits for the answer any more
            is_hang_up = isinstance(error, asyncio.CancelledError)
            self._settler.withdraw(exchange, ask, outcome="client_disconnected" if is_hang_up else "failed")
            raise
        if isinstance(answer, Denied):
            return answer
        if self._local is not None and not is_local:
            self._local.written()
        if ask.amount_min_nusd is not None:
            plan = affordable(plan, answer, clamp=clamps(principal, credit))
            covered = first_slice(plan, credit)
        slice_tokens = credit.lease_output_tokens * plan.request.n
        return Lease(answer, plan, covered, slice_tokens, self._credit[enforce], is_local=is_local)
