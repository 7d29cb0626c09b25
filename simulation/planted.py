"""Plant faults in the gateway, one at a time, and count the seeds until the judge finds each: proof that it sees.

    python -m simulation.planted                 # all of them, at most 2,000 seeds each
    python -m simulation.planted --seeds 10000 --only zeros

A fault is a change of text in a file of meshproxy, made in a copy of the tree.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from simulation.__main__ import at_least_one, processes

ROOT: Final = Path(__file__).parents[1]
TIMEOUT_S: Final = 3_600.0
SEEDS: Final = 2_000
MOST_SHOWN: Final = 160  # characters of a finding


class Planted(NamedTuple):
    """A fault: what it is, and the text of a file that is replaced by another."""

    name: str
    path: str
    old: str
    new: str


LUA: Final = "ledger/scripts/"
PLANTED: Final = [
    # The ledger's scripts.
    Planted(
        "a settlement leaves its hold's credit held",
        LUA + "settle.lua",
        "if live then hold_credit(hold, -hold.amount) end",
        "",
    ),
    Planted("a settlement leaves its slot taken", LUA + "settle.lua", "redis.call('ZREM', KEY_RUNNING, id)", ""),
    Planted(
        "a settlement doesn't correct the token bucket",
        LUA + "settle.lua",
        "take_tokens(KEY_BUCKET, hold.key_rate, used - hold.tokens)",
        "",
    ),
    Planted(
        "a settlement adds no cost to the hour",
        LUA + "settle.lua",
        "  if cost ~= '0' then redis.call('HINCRBY', key, prefix .. 'cost', cost) end",
        "",
    ),
    Planted(
        "a settlement is charged twice",
        LUA + "settle.lua",
        "redis.call('HINCRBY', CREDIT, 'balance', '-' .. cost)",
        "redis.call('HINCRBY', CREDIT, 'balance', -2 * tonumber(cost))",
    ),
    Planted(
        "an Idempotency-Key isn't marked as charged",
        LUA + "settle.lua",
        "redis.call('HSET', replay_key, 'owner', id, 'state', 'charged'",
        "redis.call('HSET', replay_key, 'owner', id, 'state', 'failed'",
    ),
    Planted(
        "an admission doesn't look at credit",
        LUA + "admit.lua",
        "if credit < least then return reply(1, 0, 0, 0) end",
        "",
    ),
    Planted("an admission doesn't look at budgets", LUA + "admit.lua", "\nif short then\n", "\nif false then\n"),
    Planted(
        "an admission doesn't look at buckets",
        LUA + "admit.lua",
        "if slowest > 0 then return",
        "if slowest > 6 then return",
    ),
    Planted(
        "one request too many runs in parallel",
        LUA + "admit.lua",
        "running >= KEY_MAX_PARALLEL",
        "running > KEY_MAX_PARALLEL",
    ),
    Planted(
        "the slot of a dead worker stays taken",
        LUA + "admit.lua",
        "redis.call('ZCOUNT', KEY_RUNNING, '(' .. whole(now_ms), '+inf')",
        "redis.call('ZCARD', KEY_RUNNING)",
    ),
    Planted(
        "a denied request takes from its bucket",
        LUA + "admit.lua",
        "if slowest > 0 then return",
        "if slowest > 0 then take(buckets[slowest], 1); save(KEY_BUCKET, key_requests, key_tokens, key_daily) return",
    ),
    Planted(
        "a renewal doesn't look at credit", LUA + "renew.lua", "if credit < more then return deny(1, 0, 0) end", ""
    ),
    Planted(
        "a renewal doesn't extend the deadline",
        LUA + "renew.lua",
        "\n  redis.call('ZADD', DEADLINES, whole(deadline_ms), id)\n  keep_running(KEY_RUNNING, id, deadline_ms)\nend\nrelease",
        "\nend\nrelease",
    ),
    Planted("holds past their deadline stay", LUA + "hold.lua", "for _ = 1, MAX_SWEEPS do", "for _ = 1, 0 do"),
    Planted(
        "a wait is too short by half",
        LUA + "bucket.lua",
        "math.ceil((level - bucket.level) / bucket.rate)",
        "math.ceil((level - bucket.level) / bucket.rate / 2)",
    ),
    Planted(
        "an overdrawn account is told that it has 0 USD",
        "gateway/exchange.py",
        "available = format_usd(denial.available_nusd)",
        "available = format_usd(max(denial.available_nusd, 0))",
    ),
    Planted(
        "a bucket refills ten times as fast",
        LUA + "bucket.lua",
        "math.max(0, now_ms - at) * rate",
        "math.max(0, now_ms - at) * rate * 10",
    ),
    Planted(
        "a grant counts again with the same ref",
        LUA + "grant.lua",
        "local before = ref ~= ''",
        "local before = ref == ''",
    ),
    Planted(
        "an Idempotency-Key is claimed by every request",
        LUA + "claim.lua",
        "if state then return { state, record[2] } end",
        "",
    ),
    Planted(
        "a settlement leaves its key's and its session's budgets held",
        LUA + "settle.lua",
        "if live then hold_credit(hold, -hold.amount) end",
        "if live then redis.call('HINCRBY', CREDIT, 'held', whole(-hold.amount)) end",
    ),
    # What a provider reports.
    Planted(
        "zeros replace a true report",
        "openai/usage.py",
        "            older.counts | self.counts,",
        "            self.counts,",
    ),
    Planted(
        "the remainder of a total isn't added",
        "openai/usage.py",
        "    if rest > 0 and prompt and",
        "    if rest > 0 and not prompt and",
    ),
    Planted(
        "a cache beside its prompt isn't added",
        "openai/usage.py",
        "or by_anthropic or cached + write > prompt):",
        "or by_anthropic):",
    ),
    Planted(
        "citations aren't added", "openai/usage.py", "more_prompt = citation + in_prompt", "more_prompt = in_prompt"
    ),
    Planted(
        "floats are no numbers",
        "openai/usage.py",
        "if type(value) not in {int, Decimal} or value < 0:",
        "if type(value) is not int or value < 0:",
    ),
    Planted(
        "strings are no numbers",
        "openai/usage.py",
        "return Decimal(value) if type(value) is str and",
        "return Decimal(value) if type(value) is bytes and",
    ),
    Planted("x_groq.usage isn't looked at", "openai/usage.py", 'if "x_groq" in members:', 'if "x_grok" in members:'),
    Planted(
        "choices[0].usage isn't looked at",
        "openai/usage.py",
        'if "choices" in members and',
        'if "choice" in members and',
    ),
    Planted("an absurd report is billed", "openai/usage.py", "if count <= bounds.get(kind, window):", "if count >= 0:"),
    Planted(
        "cached tokens are billed as input",
        "policy/pricing.py",
        "(usage.cached, price.cached),",
        "(usage.cached, price.input),",
    ),
    Planted(
        "the fee isn't charged",
        "policy/pricing.py",
        "fee = price.request if usage.prompt or usage.completion else 0",
        "fee = 0",
    ),
    Planted(
        "a report older than the text beats the text",
        "openai/event_stream.py",
        "return self.report is not None and self._reported_at !=",
        "return self.report is None and self._reported_at !=",
    ),
    Planted(
        "an unreported prompt isn't billed",
        "gateway/settle.py",
        "if usage.prompt == 0 and (usage.completion or",
        "if usage.prompt < 0 and (usage.completion or",
    ),
    Planted(
        "an assembled stream's report may be old",
        "gateway/pipeline.py",
        "(whole.report, whole.is_outdated)",
        "(whole.report, False)",
    ),
    Planted(
        "the provider's own figure isn't billed", "gateway/settle.py", "None if outdated else reported_usd", "None"
    ),
    # Streams.
    Planted(
        "a stream that broke off is a success",
        "gateway/relay.py",
        "elif self.scanner.done or (self.scanner.complete and self._all_ended()):",
        "elif True:",
    ),
    Planted(
        "a stream that fails ends without a word",
        "gateway/relay.py",
        "            self._downstream.write(event)\n        self._finish()",
        "        self._finish()",
    ),
    Planted(
        "no pings",
        "gateway/relay.py",
        "elif silent_s >= heartbeat_s and not",
        "elif silent_s >= 3 * heartbeat_s and not",
    ),
    Planted(
        "no pings before the answer",
        "gateway/attempts.py",
        "now - self.written_at < heartbeat_s or",
        "now - self.written_at < 3 * heartbeat_s or",
    ),
    Planted(
        "pings begin anew with the answer",
        "gateway/relay.py",
        "early_head.written_at if early_head is not None else clock()",
        "clock()",
    ),
    Planted(
        "a stream waits for a client that is gone",
        "server/fast_path.py",
        "        if room is not None and not room.done():\n            room.set_result(None)\n\n    def pause",
        "\n    def pause",
    ),
    Planted(
        "withheld output is sent",
        "gateway/relay.py",
        "            self._withhold(events)\n            return\n",
        "            self._withhold(b'')\n",
    ),
    Planted(
        "the usage chunk isn't held back",
        "gateway/pipeline.py",
        "hide_usage=not (plan.request.include_usage or exchange.call.sees_usage)",
        "hide_usage=False",
    ),
    Planted(
        "usage isn't asked for",
        "openai/request.py",
        "    elif request.stream and not request.include_usage:",
        "    elif request.stream and request.include_usage:",
    ),
    Planted(
        "a provider's comments are dropped",
        "openai/event_stream.py",
        "            return joined(parsed.comments)",
        '            return b""',
    ),
    Planted(
        "an event's name is dropped",
        "openai/events.py",
        "            name = value.strip()\n",
        "            name = value.strip()\n            continue\n",
    ),
    Planted(
        "an event's id is passed on",
        "openai/events.py",
        "            comments.append(line)\n        else:\n            continue\n",
        "            comments.append(line)\n        elif not line:\n            continue\n",
    ),
    # Requests.
    Planted(
        "a cap goes out under another name",
        "openai/request.py",
        "        body[cap_field] = cap",
        "        body['max_tokens'] = cap",
    ),
    Planted("a cap is lost", "openai/request.py", "cap = max_tokens or request.max_tokens", "cap = max_tokens"),
    Planted(
        "no other provider is asked after a 5xx",
        "policy/failover.py",
        "safe_to_repeat=self.try_next,",
        "safe_to_repeat=False,",
    ),
    Planted(
        "a request's time-out is ignored",
        "gateway/attempts.py",
        "left_s = exchange.deadline - exchange.sent_at",
        "left_s = math.inf",
    ),
    # Settlement, its journal, repeats.
    Planted(
        "what Redis didn't take is forgotten",
        "gateway/settle.py",
        "its marker counts it once\n            await self._journal.append(settlement)",
        "\n            pass",
    ),
    Planted(
        "a script that Redis forgot isn't sent again",
        "ledger/link.py",
        "            self.resend((future, op, queued_at, command.by_text()))\n            return",
        "            future.set_result(1) if op == 'settle' else self.resend((future, op, queued_at, command.by_text()))\n"
        "            return",
    ),
    Planted(
        "the journal is emptied without Redis",
        "ledger/journal.py",
        "            except Unavailable:\n                return count\n",
        "            except Unavailable:\n                pass\n",
    ),
    Planted("a hang-up charges nothing", "gateway/pipeline.py", "bill_prompt(exchange)", "None"),
    Planted(
        "a request with an Idempotency-Key ends with its client",
        "gateway/in_flight.py",
        "if self.closed or len(self._detached) >= MAX_DETACHED:",
        "if True:",
    ),
    Planted(
        "an Idempotency-Key takes another body",
        LUA + "claim.lua",
        "if state and record[1] and record[1] ~= ARGV[2] then return { 4, record[2] } end",
        "",
    ),
    Planted(
        "an answer that is too large is replayed cut",
        "gateway/idempotency.py",
        "        if self._size > self._settings.max_bytes:\n            self._mark_lost()\n",
        "        if self._size > self._settings.max_bytes:\n            pass\n",
    ),
    Planted(
        "an answer that is too large is replayed",
        "gateway/idempotency.py",
        "if self._size > self._settings.max_bytes:",
        "if False:",
    ),
    Planted(
        "an answer that is too large frees its Idempotency-Key",
        "gateway/idempotency.py",
        '            self._conclusion = "lost"',
        '            self._conclusion = "failed"',
    ),
    Planted(
        "a drain doesn't wait for what runs",
        "app/application.py",
        "await _wait_until(self._is_done, server.drain_s, interrupt)",
        "await _wait_until(self._is_done, 0.0, interrupt)",
    ),
    Planted(
        "a drain closes what runs",
        "app/application.py",
        "        await _wait_until(self._is_done, server.drain_s, interrupt)\n        await self._end()",
        "        await self.close()",
    ),
    Planted(
        "a drain lasts three times as long",
        "app/application.py",
        "await _wait_until(self._is_done, server.drain_s, interrupt)",
        "await _wait_until(self._is_done, 3 * server.drain_s, interrupt)",
    ),
    Planted(
        "a drain lasts half as long",
        "app/application.py",
        "await _wait_until(self._is_done, server.drain_s, interrupt)",
        "await _wait_until(self._is_done, server.drain_s / 2, interrupt)",
    ),
    Planted(
        "a request that isn't admitted is counted for ever",
        "gateway/pipeline.py",
        "        if exchange.reservation is not None:\n            exchange.reservation.release()\n",
        "",
    ),
    Planted(
        "a route's attempts are never over",
        "gateway/health.py",
        "        self._route.in_flight -= 1\n",
        "",
    ),
    Planted(
        "a stream that is lost before its head isn't asked for elsewhere",
        "gateway/attempts.py",
        "return error.safe_to_repeat or (streamed and error.upstream_status is None)",
        "return error.safe_to_repeat",
    ),
    Planted(
        "a stream that ends before its first event isn't asked for elsewhere",
        "gateway/attempts.py",
        "raise UpstreamError(error_response, safe_to_repeat=True, upstream_status=200)",
        "raise UpstreamError(error_response, safe_to_repeat=False, upstream_status=200)",
    ),
    Planted(
        "a whole answer that broke off is asked for elsewhere",
        "gateway/attempts.py",
        "return error.safe_to_repeat or (streamed and error.upstream_status is None)",
        "return error.safe_to_repeat or error.upstream_status is None",
    ),
    Planted(
        "a wait is ten times too long",
        LUA + "bucket.lua",
        "return ms_until(bucket, math.min(count * bucket.unit, bucket.full))",
        "return 10 * ms_until(bucket, math.min(count * bucket.unit, bucket.full))",
    ),
    Planted(
        "a wait is too long by half",
        LUA + "bucket.lua",
        "return ms_until(bucket, math.min(count * bucket.unit, bucket.full))",
        "return 1.5 * ms_until(bucket, math.min(count * bucket.unit, bucket.full))",
    ),
    Planted(
        "a 503 has no Retry-After",
        "openai/errors.py",
        "    if wait_s is not None and math.isfinite(wait_s):\n        headers",
        "    if wait_s is not None and response.status != 503:\n        headers",
    ),
    Planted(
        "a provider's wait isn't passed on",
        "policy/failover.py",
        "wait_s or DEFAULT_RETRY_AFTER_S)",
        "DEFAULT_RETRY_AFTER_S)",
    ),
    Planted(
        "an overloaded provider's wait isn't passed on",
        "policy/failover.py",
        '"The provider is overloaded.", retry_after_s=wait_s)',
        '"The provider is overloaded.")',
    ),
    Planted(
        "a repeat that may be paid twice is asked for",
        "openai/errors.py",
        "pays_twice = response.status >= 500 and response.may_have_run",
        "pays_twice = False",
    ),
    Planted(
        "x-mesh-attempts is always 1",
        "gateway/pipeline.py",
        "plan, model, attempts = exchange.plan, exchange.model, str(exchange.attempts)",
        "plan, model, attempts = exchange.plan, exchange.model, str(min(exchange.attempts, 1))",
    ),
    Planted(
        "x-mesh-routing-model names no model",
        "gateway/pipeline.py",
        '("x-mesh-routing-model", model)]',
        '("x-mesh-routing-model", attempts)]',
    ),
    Planted(
        "a cap that the gateway sets isn't told",
        "gateway/pipeline.py",
        'headers.append(("x-mesh-max-tokens", str(plan.imposed_cap)))',
        "pass",
    ),
    Planted(
        "an event is held for 3.8 seconds",
        "gateway/relay.py",
        "        self._unchecked_bytes += len(payload)\n",
        "        self._unchecked_bytes += len(payload)\n        self._response.pause()\n"
        "        asyncio.get_running_loop().call_later(3.8, self._resume)\n",
    ),
    Planted(
        "a stream's head is held though its first event has come",
        "gateway/attempts.py",
        "        if response.early and begins_plainly(response.early[0][0]):\n            return response\n",
        "        if response.early and begins_plainly(response.early[0][0]):\n            await asyncio.sleep(hold_s)\n"
        "            return response\n",
    ),
    Planted(
        "a drained stream is read for 8 KiB",
        "gateway/relay.py",
        "MAX_DRAINED_BYTES: Final = 8_388_608",
        "MAX_DRAINED_BYTES: Final = 8_192",
    ),
    Planted(
        "a repeat looks for news each five seconds",
        "gateway/idempotency.py",
        "POLL_S = 0.05",
        "POLL_S = 5.0",
    ),
    Planted(
        "a repeat gets no pings",
        "gateway/idempotency.py",
        "if part or self._clock() - written_at >= heartbeat_s:",
        "if part:",
    ),
    Planted(
        "a provider's secret is shown",
        "openai/provider_errors.py",
        "        text = _without_beginnings(text, secret)\n",
        "",
    ),
    Planted(
        "the beginning of a provider's secret is shown",
        "openai/provider_errors.py",
        "        text = text[:-shown] + REDACTED if shown else text\n",
        "",
    ),
    Planted("a revoked key is served for a minute", "ledger/directory.py", "\nTTL_S = ", "\nTTL_S = 60 + "),
    Planted("a reload keeps the old prices", "app/worker.py", "        self.gateway.active = new\n", ""),
    Planted("Retry-After is rounded down", "openai/errors.py", "max(1, math.ceil(", "max(1, math.floor("),
    Planted(
        "the cost that is told isn't the charge",
        "gateway/pipeline.py",
        '("x-mesh-cost", format_usd(exchange.cost_nusd))',
        '("x-mesh-cost", format_usd(exchange.cost_nusd + 1))',
    ),
    Planted(
        "an answer that repeats followed is kept",
        "gateway/idempotency.py",
        "            if self._followed.get(answer.record) is answer:\n                del self._followed[answer.record]\n",
        "",
    ),
    # Faults that were mended before.
    Planted(
        "an Idempotency-Key is charged twice behind a settlement",
        LUA + "settle.lua",
        "if paid and paid ~= '' and paid ~= id then",
        "if false then",
    ),
    Planted(
        "a settlement without a hold has no marker",
        LUA + "settle.lua",
        "'1', 'NX', 'EX', UNHELD_KEPT_S) then return 0 end",
        "'1', 'EX', UNHELD_KEPT_S) then return 0 end",
    ),
    Planted(
        "a renewal of an abandoned hold doesn't hold its amount anew",
        LUA + "renew.lua",
        "local covered = live and hold.amount or 0",
        "local covered = hold and hold.amount or 0",
    ),
    Planted(
        "a hold lost in mid-stream isn't admitted anew",
        "gateway/admit.py",
        'if isinstance(answer, Denial) and answer.which == "hold":',
        'if isinstance(answer, Denial) and answer.which == "nothing":',
    ),
    Planted(
        "a lost hold's settlement relies on it",
        "gateway/settle.py",
        "settlement = replace(settlement, unheld=True)\n                await",
        "return\n                await",
    ),
    Planted(
        "the local allowance is refilled before Redis has charged",
        "ledger/local.py",
        "amount = max(settlement.cost_nusd - held_by_redis_nusd, 0)",
        "amount = 0",
    ),
    Planted(
        "a stream goes on past its [DONE]",
        "gateway/relay.py",
        '        if refusal is not None and self.outcome != "completed":',
        "        if refusal is not None:",
    ),
    Planted(
        "an assembled stream has its last report alone",
        "openai/events.py",
        "report = found.over(report)",
        "report = found",
    ),
    Planted(
        "a client that half-closes is waited for",
        "server/fast_path.py",
        "    def pause_writing(self) -> None:",
        "    def eof_received(self) -> bool:\n        return True\n\n    def pause_writing(self) -> None:",
    ),
    Planted(
        "a hang-up lets the provider go on",
        "gateway/in_flight.py",
        "    return exchange.candidate is not None and exchange.candidate.upstream in draining",
        "    return True",
    ),
    Planted(
        "a refusal's body is awaited past the deadline",
        "gateway/attempts.py",
        "        if exchange.deadline == math.inf:\n            return await reading",
        "        if True:\n            return await reading",
    ),
    Planted(
        "the end of a body begins a head on aiohttp's server",
        "server/aiohttp_path.py",
        "            data = behind\n",
        "            pass\n",
    ),
    Planted(
        "a detached request ends at once",
        "gateway/in_flight.py",
        "MAX_DETACHED_S = 120.0",
        "MAX_DETACHED_S = 0.01",
    ),
    # Prices.
    Planted(
        "a tier of prices begins a token too early",
        "policy/pricing.py",
        "            if prompt_tokens > above:\n                found = price",
        "            if prompt_tokens >= above:\n                found = price",
    ),
    Planted(
        "a cache's tokens don't count towards the tier",
        "policy/pricing.py",
        "price = price.for_prompt_of(usage.prompt) if price.tiers else price",
        "price = price.for_prompt_of(usage.prompt - usage.cached) if price.tiers else price",
    ),
    Planted(
        "a hold doesn't know of tiers",
        "policy/pricing.py",
        "    for above, tier in price.tiers:\n        if prompt_tokens > above:\n            of_tier",
        "    for above, tier in ():\n        if prompt_tokens > above:\n            of_tier",
    ),
    Planted(
        "the requested service tier is billed, whatever served",
        "gateway/settle.py",
        "candidate.price_in(exchange.served_tier, requested_tier)",
        "candidate.price_in(requested_tier, exchange.served_tier)",
    ),
    Planted(
        "a stream that is cut is billed in the requested service tier",
        "gateway/relay.py",
        "served_tier=scanner.service_tier,",
        "served_tier=None,",
    ),
    Planted(
        "a service tier without a price is let through",
        "policy/catalog.py",
        "if tier is not None and not any(name == tier for name, _ in candidate.services):",
        "if tier is not None and candidate.services and not any(name for name, _ in candidate.services):",
    ),
    # Templates.
    Planted(
        "an edited template holds a minute later",
        "ledger/directory.py",
        "templates = Templates(store, clock, ttl_s=ttl_s",
        "templates = Templates(store, clock, ttl_s=60 * ttl_s",
    ),
    Planted(
        "a global template comes before the account's own",
        "ledger/templates.py",
        "owners = [AccountKeys(account), AccountKeys(GLOBAL)]",
        "owners = [AccountKeys(GLOBAL), AccountKeys(account)]",
    ),
    Planted(
        "a suspended account is served",
        "gateway/entry.py",
        'if principal.account.status != "active":',
        "if False:",
    ),
    Planted(
        "an expired key is served",
        "gateway/entry.py",
        "if key.expires_at is not None and key.expires_at <= self._wall_clock():",
        "if False:",
    ),
    Planted(
        "an expired key is served for two seconds",
        "gateway/entry.py",
        "key.expires_at <= self._wall_clock():",
        "key.expires_at + 2 <= self._wall_clock():",
    ),
    Planted(
        "a key may use every model as a fallback",
        "gateway/resolve.py",
        "for name in (model, *request.models) if key.models is not None else ():",
        "for name in (model,) if key.models is not None else ():",
    ),
    Planted(
        "a key may use every model",
        "policy/principal.py",
        "return self.key.models is None or model in self.key.models",
        "return True",
    ),
    Planted(
        "every account gets a0's template",
        "ledger/templates.py",
        "owners = [AccountKeys(account), AccountKeys(GLOBAL)]",
        "owners = [AccountKeys('a0'), AccountKeys(GLOBAL)]",
    ),
    Planted(
        "Idempotency-Keys are shared by all accounts",
        "ledger/replays.py",
        "record = names.replay(key_id, ",
        "record = AccountKeys('a0').replay('', ",
    ),
    Planted(
        "Idempotency-Keys are shared by an account's keys",
        "ledger/replays.py",
        "record = names.replay(key_id, ",
        "record = names.replay('', ",
    ),
    Planted(
        "a repeat reads along with another key's request of its Idempotency-Key and body",
        "gateway/idempotency.py",
        "return self._followed.get(record)",
        "return next((each for name, each in self._followed.items() if name[-64:] == record[-64:]), None)",
    ),
    Planted(
        "an account's keys share an Idempotency-Key with a body of the same size",
        "gateway/idempotency.py",
        "self._replays.claim_by(account, principal.key.id, name, owner)",
        "self._replays.claim_by(account, '', name if name[:2] == 'mk' else name + str(len(body)), owner)",
    ),
    Planted(
        "a template's slot isn't filled",
        "policy/template.py",
        "return _SLOT.sub(lambda slot: variables[slot[1]], text)",
        "return text",
    ),
    Planted(
        "a value is scanned for slots again",
        "policy/template.py",
        "return _SLOT.sub(lambda slot: variables[slot[1]], text)",
        "once = _SLOT.sub(lambda slot: variables[slot[1]], text)\n"
        "        return _SLOT.sub(lambda slot: variables[slot[1]], once)",
    ),
    # The journal and its disk.
    Planted(
        "a full journal doesn't deny",
        "ledger/local.py",
        "return self._reserved_bytes + _line_bytes(request) <= self._room_bytes()",
        "return True",
    ),
    Planted(
        "a disk that refuses writes has room",
        "ledger/journal.py",
        "return 0 if self._disk_failed else self._max_bytes - self._size",
        "return self._max_bytes - self._size",
    ),
    Planted(
        "a lost settlement isn't logged",
        "ledger/journal.py",
        '        _log.error("settlement_lost", settlement=msgspec.to_builtins(settlement))\n',
        "",
    ),
    Planted("a loss isn't told by the exit code", "app/worker.py", "        if lost:\n", "        if False:\n"),
    Planted(
        "what a full disk refused is forgotten",
        "ledger/journal.py",
        "                    self._disk_failed = True\n                    raise\n",
        "                    self._disk_failed = True\n                    self._pending.clear()\n                    raise\n",
    ),
    Planted(
        "a part of a line stays when a disk is full",
        "ledger/journal.py",
        "    except OSError:\n        os.ftruncate(file, size)\n        raise",
        "    except OSError:\n        raise",
    ),
    Planted(
        "a line that a crash cut short is kept",
        "ledger/journal.py",
        "    if len(whole) < len(data):\n        os.ftruncate(file, len(whole))\n",
        "",
    ),
    Planted(
        "a journal's line is lost in the middle of its replay",
        "ledger/journal.py",
        "                await settle(self._pending[0])\n            except Unavailable:\n                return count\n",
        "                await settle(self._pending[0])\n            except Unavailable:\n"
        "                self._pending.popleft()\n                return count\n",
    ),
    # What the API says.
    Planted(
        "/v1/key doesn't know what is held",
        LUA + "balance.lua",
        "redis.call('HMGET', CREDIT, 'balance', 'held', 'granted', 'settled')",
        "redis.call('HMGET', CREDIT, 'balance', 'hold', 'granted', 'settled')",
    ),
    Planted(
        "an event isn't found by its request",
        LUA + "settle.lua",
        "if requests < REQUESTS_A_DAY then",
        "if requests < 2 then",
    ),
    Planted(
        "an hour is missing in the index",
        LUA + "settle.lua",
        "  index_hour(HOURS, string.match(HOUR,",
        "  string.match(HOUR, 'x'); (type)(string.match(HOUR,",
    ),
    Planted(
        "a settlement's event names the model as its upstream",
        LUA + "settle.lua",
        "'model', model, 'upstream', upstream,",
        "'model', model, 'upstream', model,",
    ),
    Planted(
        "an hour has all keys' sums under one",
        LUA + "settle.lua",
        "local of_hour = key_id .. ",
        "local of_hour = account .. ",
    ),
    Planted(
        "a grant's event has the balance before it",
        LUA + "grant.lua",
        "whole(balance), 'note'",
        "whole(balance - amount), 'note'",
    ),
    Planted("a settlement counts one attempt", "gateway/settle.py", "attempts=exchange.attempts,", "attempts=1,"),
    Planted("a settlement has no error's code", "gateway/settle.py", "code=exchange.code,", 'code="",'),
    Planted(
        "a request begins when it is settled", "gateway/settle.py", "(self._wall_clock() - age_s)", "self._wall_clock()"
    ),
    Planted(
        "the API tells a request's beginning as its end",
        "server/api.py",
        'for name in ("started_ms", "settled_ms"))',
        'for name in ("settled_ms", "started_ms"))',
    ),
    Planted(
        "/v1/usage has all under one key",
        "ledger/usage_report.py",
        '            key if "key" in group_by else None,',
        '            "key" if "key" in group_by else None,',
    ),
    Planted(
        "the log has the wrong client",
        "gateway/record.py",
        '"client": exchange.call.client,',
        '"client": "127.0.0.1",',
    ),
    Planted(
        "the log has the account as the key's id",
        "gateway/record.py",
        '"key_id": key.id if',
        '"key_id": key.account if',
    ),
    Planted(
        "the log has no trace",
        "gateway/record.py",
        '"trace_id": exchange.call.trace_id,',
        '"trace_id": None,',
    ),
    Planted(
        "a stream's overhead includes its provider's time",
        "gateway/relay.py",
        "overhead_s += self._clock() - arrived_at",
        "overhead_s += self._clock() - self._exchange.sent_at",
    ),
    Planted(
        "a whole answer's overhead includes its provider's time",
        "gateway/pipeline.py",
        "overhead_s += self._clock() - read_at",
        "overhead_s += self._clock() - exchange.sent_at",
    ),
    Planted(
        "the log has a stream's end as its first event",
        "gateway/record.py",
        '"ttft_ms": round(first_token_s * 1_000_000)',
        '"ttft_ms": round((now - received_at) * 1_000_000)',
    ),
    Planted(
        "the log has the beginning of the messages",
        "gateway/record.py",
        '"request_id": exchange.call.request_id,\n            "client"',
        '"messages": str(exchange.plan and bytes(exchange.plan.prompt.messages[:400])),\n'
        '            "request_id": exchange.call.request_id,\n            "client"',
    ),
    Planted(
        "/v1/key doesn't know what its key has spent in all",
        LUA + "balance.lua",
        "redis.call('HMGET', KEY_SPEND, 'total',",
        "redis.call('HMGET', KEY_SPEND, 'sum',",
    ),
    Planted(
        "/v1/key has a slot fewer",
        "server/api.py",
        "remaining = max(0, most - running)",
        "remaining = max(0, most - running - 1)",
    ),
    Planted(
        "/v1/key has its account's budgets",
        "server/api.py",
        '"budgets": in_usd(asdict(key.budgets)),',
        '"budgets": in_usd(asdict(account.budgets)),',
    ),
    Planted(
        "/v1/key has its account's limits",
        "server/api.py",
        "key.id, key_limits=limits,",
        "key.id, key_limits=account.limits,",
    ),
    # Money, as strictly as docs/ledger.md and docs/api.md have it.
    Planted(
        "an estimate of output exceeds the cap",
        "gateway/settle.py",
        "seen = min(estimate_output(), plan.output_bound)",
        "seen = estimate_output()",
    ),
    Planted(
        "output beyond the last slice of credit is charged",
        "gateway/relay.py",
        "most = self._lease.bound if self.short_of_credit else None",
        "most = None",
    ),
    Planted(
        "an admission takes no tokens from its bucket",
        LUA + "admit.lua",
        "local counts = { 1, tokens, 1, tokens, 1, 1 }",
        "local counts = { 1, 0, 1, 0, 1, 1 }",
    ),
    Planted(
        "a settlement takes no tokens beyond the reserved ones",
        LUA + "settle.lua",
        "take_tokens(KEY_BUCKET, hold.key_rate, used - hold.tokens)",
        "take_tokens(KEY_BUCKET, hold.key_rate, math.min(0, used - hold.tokens))",
    ),
    Planted(
        "a settlement returns twice the tokens that were reserved too many",
        LUA + "settle.lua",
        "take_tokens(KEY_BUCKET, hold.key_rate, used - hold.tokens)",
        "take_tokens(KEY_BUCKET, hold.key_rate, 2 * (used - hold.tokens))",
    ),
    Planted(
        "a settlement forgets its session",
        LUA + "settle.lua",
        "if #session > MAX_FREE_SESSION_BYTES and cost",
        "if #session > 0 then session = '~' end\nif #session > MAX_FREE_SESSION_BYTES and cost",
    ),
    Planted(
        "a cap goes out as the model's largest",
        "openai/request.py",
        "cap = max_tokens or request.max_tokens",
        "cap = max_tokens or request.max_tokens and max(request.max_tokens, 400)",
    ),
    Planted(
        "an unreported prompt is billed as it was held",
        "gateway/settle.py",
        "usage = replace(usage, prompt=plan.likely_prompt_tokens())",
        "usage = replace(usage, prompt=plan.prompt_tokens)",
    ),
    Planted(
        "an estimate of output is a quarter too low",
        "gateway/relay.py",
        "lambda: scanner.tokens,",
        "lambda: scanner.tokens * 3 // 4,",
    ),
    Planted(
        "Redis is found again four seconds after it is back",
        "ledger/link.py",
        "BACKOFF_MIN_S = 0.05\nBACKOFF_MAX_S = 2.0",
        "BACKOFF_MIN_S = BACKOFF_MAX_S = 4.0",
    ),
    Planted(
        "a client that takes nothing is given up after twice the time",
        "server/listener.py",
        "if now - since >= self._limits.write_timeout_s():",
        "if now - since >= 2 * self._limits.write_timeout_s():",
    ),
    Planted(
        "a client that takes nothing is given up after half of the time",
        "server/listener.py",
        "if now - since >= self._limits.write_timeout_s():",
        "if now - since >= self._limits.write_timeout_s() / 2:",
    ),
    Planted(
        "each worker has the whole local allowance",
        "ledger/local.py",
        "return self._allowance_nusd // self._instances.count - self._used_nusd.get(account, 0)",
        "return self._allowance_nusd - self._used_nusd.get(account, 0)",
    ),
    Planted(
        "a reset without Redis has half of the time",
        "ledger/local.py",
        "reset_s = (self.size - self.level) / self.rate",
        "reset_s = (self.size - self.level) / self.rate / 2",
    ),
    Planted(
        "an estimated prompt is called reported",
        "gateway/settle.py",
        'usage = replace(usage, prompt=plan.likely_prompt_tokens())\n        exchange.usage_source = "estimated"',
        "usage = replace(usage, prompt=plan.likely_prompt_tokens())",
    ),
    Planted(
        "output that can't be true and isn't seen is called reported",
        "gateway/settle.py",
        "elif exchange.refused_numbers and not usage.completion:",
        "elif False:",
    ),
    Planted(
        "a report is called an estimate",
        "gateway/settle.py",
        'exchange.usage_source = "reported"',
        'exchange.usage_source = "estimated"',
    ),
    Planted(
        "a report after a hang-up isn't called drained",
        "gateway/in_flight.py",
        'exchange.usage_source = "drained"',
        'exchange.usage_source = "reported"',
    ),
    Planted(
        "x-ratelimit-remaining-requests has one too many",
        "gateway/admit.py",
        'str(bucket.remaining) if bucket.remaining > 0 else "0")',
        'str(bucket.remaining + (kind == "requests")) if bucket.remaining > 0 else "0")',
    ),
    Planted(
        "x-ratelimit-reset has half of the time",
        "gateway/admit.py",
        "format_reset(bucket.reset_s)",
        "format_reset(bucket.reset_s / 2)",
    ),
    # Sessions, months, reasoning, and holds that are renewed.
    Planted(
        "an admission doesn't look at a session's budget",
        LUA + "admit.lua",
        "    { budget_room(SESSION_SPEND, 'session:' .. session_id, 22) },\n",
        "    { NO_BUDGET, 0, 0, 0 },\n",
    ),
    Planted("a session's spend isn't added to", LUA + "settle.lua", "    charge(session_key, cost)\n", ""),
    Planted("a month isn't added to", LUA + "settle.lua", "add(MONTH, of_month)\n", ""),
    Planted(
        "the hours forget the session",
        LUA + "settle.lua",
        "local of_hour = key_id .. '\\31' .. model .. '\\31' .. session ..",
        "local of_hour = key_id .. '\\31' .. model .. '\\31' ..",
    ),
    Planted(
        "reasoning is billed as output",
        "policy/pricing.py",
        "(usage.reasoning, price.reasoning)",
        "(usage.reasoning, price.output)",
    ),
    Planted(
        "a settlement that was never sent relies on its hold",
        "gateway/settle.py",
        "            if isinstance(error, Unavailable) and not error.is_sent:\n",
        "            if False:\n",
    ),
    Planted(
        "the hold of a long whole answer isn't renewed",
        "gateway/admit.py",
        "        if not self.is_local:\n            denied = await self._renew(",
        "        if not self.is_local and not self.plan.holds_whole:\n            denied = await self._renew(",
    ),
    Planted(
        "a renewal may lower the hold",
        LUA + "renew.lua",
        "hold and math.max(hold.amount, tonumber(total)) or 0",
        "hold and tonumber(total) or 0",
    ),
    # What goes to a provider.
    Planted(
        "the last character of a prompt is lost",
        "openai/request.py",
        '"messages": Raw(messages), ',
        '"messages": Raw(messages[:-4] + messages[-3:]), ',
    ),
    Planted(
        "a client's messages are encoded anew",
        "openai/request.py",
        '"messages": Raw(messages), ',
        '"messages": msgspec.json.decode(messages), ',
    ),
    Planted(
        "a client's request id and Idempotency-Key go to the provider",
        "openai/headers.py",
        '"x-title", "traceparent", "tracestate"',
        '"x-title", "traceparent", "tracestate", "x-request-id", "idempotency-key"',
    ),
    # Breakers.
    Planted("a breaker never opens", "policy/route_health.py", "consecutive: int = 10", "consecutive: int = 10_000"),
    Planted(
        "a breaker stays open ten times as long",
        "policy/route_health.py",
        "open_s: float = 5.0",
        "open_s: float = 50.0",
    ),
    Planted(
        "a failed probe doesn't double the time", "policy/route_health.py", "min(2 * self._open_s,", "min(self._open_s,"
    ),
    Planted(
        "a breaker's wait is a second at most",
        "gateway/health.py",
        'provider_not_available("Every provider of this model is failing.", wait_s)',
        'provider_not_available("Every provider of this model is failing.", min(wait_s, 1.0))',
    ),
    Planted(
        "a half-open breaker lets all requests through",
        "policy/route_health.py",
        'if now < (self._until if self._state == "open" else self._probe_until):',
        'if now < (self._until if self._state == "open" else 0.0):',
    ),
    Planted(
        "one account opens the breaker for all",
        "gateway/health.py",
        "MAX_COUNTED_OF_ACCOUNT = 5",
        "MAX_COUNTED_OF_ACCOUNT = 50",
    ),
    Planted(
        "an account's failures open no breaker of its own",
        "gateway/health.py",
        "        own_failures.breaker.failed(now, draw)\n",
        "",
    ),
    Planted(
        "a probe's success doesn't close the breaker",
        "gateway/health.py",
        "            for breaker in probes:\n                breaker.succeeded(now)\n",
        "            for breaker in probes:\n                breaker.abandoned()\n",
    ),
    Planted(
        "a request during a probe is to wait for a minute",
        "policy/route_health.py",
        "min(self._probe_until - now, self._open_s)",
        "self._probe_until - now",
    ),
    Planted(
        "a refusal counts as a provider's failure",
        "policy/failover.py",
        "return error.upstream_status >= 500 or",
        "return error.upstream_status >= 400 or",
    ),
    Planted(
        "of two providers' waits the longer one is told",
        "policy/failover.py",
        "return 3, -(response.retry_after_s or 0.0), index",
        "return 3, response.retry_after_s or 0.0, index",
    ),
    # What requests have beside their text.
    Planted(
        "what frames messages is billed as text",
        "policy/tokens.py",
        '_text_words(_FRAMING.sub("", messages.decode(errors="ignore")))',
        '_text_words(messages.decode(errors="ignore"))',
    ),
    Planted(
        "escapes are billed as text",
        "policy/tokens.py",
        "text_tokens(_ESCAPE.sub(_unescaped, text) if",
        "text_tokens(text if",
    ),
    Planted(
        "tools aren't billed",
        "policy/tokens.py",
        "_message_words(messages) + sum(map(_json_words, others))",
        "_message_words(messages)",
    ),
    Planted(
        "a field that OpenAI doesn't have is dropped",
        "openai/request.py",
        "        elif len(name) <= MAX_CAP_NAME_CHARS and _is_cap(name):\n            caps.append(_COUNT(raw))\n",
        "        else:\n",
    ),
    Planted(
        "tools aren't reserved",
        "gateway/resolve.py",
        'tokens = prompt.tokens + (estimate_prompt(b"", others, 0) if others else 0)',
        "tokens = prompt.tokens",
    ),
    Planted(
        "a client's trace isn't passed on",
        "openai/headers.py",
        '"x-title", "traceparent", "tracestate"',
        '"x-title", "tracestate"',
    ),
    Planted(
        "what ended in its admission is settled as a hang-up",
        "gateway/settle.py",
        "settlement = self._settlement(exchange, exchange.unanswered, unheld=False)",
        "settlement = replace(self._settlement(exchange, exchange.unanswered, unheld=False), outcome='client_disconnected')",
    ),
    # Time-outs.
    Planted(
        "a provider that falls silent is waited for three times as long",
        "upstream/connection.py",
        "if state is State.WAITING else timeouts.idle_s\n",
        "if state is State.WAITING else timeouts.idle_s * 3\n",
    ),
    Planted(
        "a provider's first byte is waited for three times as long",
        "upstream/connection.py",
        "timeouts.first_byte_s if state is State.WAITING",
        "timeouts.first_byte_s * 3 if state is State.WAITING",
    ),
    Planted(
        "a provider's first byte is waited for for a second less",
        "upstream/connection.py",
        "timeouts.first_byte_s if state is State.WAITING",
        "timeouts.first_byte_s - 1 if state is State.WAITING",
    ),
    Planted(
        "a time-out cuts a stream that has begun",
        "gateway/in_flight.py",
        "if not task.done() and _stream_begins(exchange):",
        "if False:",
    ),
    # What clients are told of a provider's errors.
    Planted(
        "a refusal's status is told as 400",
        "policy/failover.py",
        "    response = ErrorResponse(\n        status,\n        code or",
        "    response = ErrorResponse(\n        400,\n        code or",
    ),
    Planted(
        "a refusal's code is lost",
        "policy/failover.py",
        'code or "provider_refused",',
        '"provider_refused",',
    ),
    Planted(
        "a provider's words to the operator are told",
        "policy/failover.py",
        "response = replace(upstream_error(_REFUSED_US[status_of_ours], may_have_run=False), provider_code=reported.code)",
        "response = _quoted(upstream_error(_REFUSED_US[status_of_ours], may_have_run=False), reported)",
    ),
    Planted(
        "a flagged request is taken for a refusal of the gateway",
        "policy/failover.py",
        "return None if _is_moderated(reported) else 403",
        "return 403",
    ),
    Planted(
        "a credit balance that is too low is told to the client",
        "policy/failover.py",
        "if code in _OUT_OF_QUOTA or _CREDIT_WORDS.search(message):",
        "if False:",
    ),
    Planted(
        "a provider's code isn't told",
        "openai/errors.py",
        "if response.provider_code is not None:",
        "if False:",
    ),
    Planted(
        "an answer has another x-request-id",
        "gateway/pipeline.py",
        '            ("x-request-id", exchange.call.request_id),\n',
        '            ("x-request-id", "req_" + exchange.call.request_id),\n',
    ),
    Planted(
        "an error event names another request",
        "gateway/relay.py",
        "event = error_event(self._exchange.mask_secrets(error_response), self._exchange.call.request_id)",
        'event = error_event(self._exchange.mask_secrets(error_response), "req_0")',
    ),
    Planted(
        "a repeat doesn't say that it is one",
        "gateway/idempotency.py",
        'if header[0] != "x-request-id"), REPLAYED]',
        'if header[0] != "x-request-id")]',
    ),
    Planted(
        "the log has the cost without its last digit",
        "gateway/record.py",
        '"cost_usd": format_usd(exchange.cost_nusd),',
        '"cost_usd": format_usd(exchange.cost_nusd // 10 * 10),',
    ),
    Planted(
        "the log names the model that was asked for",
        "gateway/record.py",
        '            "model": model or None,',
        '            "model": (exchange.plan.model if exchange.plan else model) or None,',
    ),
    Planted(
        "the log doesn't name the limit that refused",
        "gateway/record.py",
        '"refused_by": exchange.refused_by,',
        '"refused_by": None,',
    ),
    Planted(
        "a failed attempt is logged as the first one's model",
        "gateway/record.py",
        "            model=candidate.model,\n            attempt=exchange.attempts,",
        "            model=exchange.plan.model if exchange.plan else '',\n            attempt=exchange.attempts,",
    ),
    Planted("a 402 has the type of other refusals", "errors.py", '    402: "insufficient_quota",\n', ""),
    # Holds that are too large.
    Planted(
        "a hold is half as large again",
        "policy/pricing.py",
        "    return price.request - (-(prompt_tokens * prompt + output_tokens * output) // TOKENS_PER_PRICE)  # rounded up",
        "    return price.request - (-(prompt_tokens * prompt + output_tokens * output) * 3 // 2 // TOKENS_PER_PRICE)",
    ),
    Planted(
        "a stream asks for two slices",
        "gateway/admit.py",
        "covered = min(self._used + self._slice, self._cap)",
        "covered = min(self._used + 2 * self._slice, self._cap)",
    ),
    # Budgets and limits of an account, and of a day.
    Planted(
        "an admission doesn't look at an account's budgets",
        LUA + "admit.lua",
        "{ budget_room(ACCOUNT_SPEND, held, 25, settled) }",
        "{ NO_BUDGET, 0, 0, 0 }",
    ),
    Planted(
        "a day ends an hour after midnight",
        LUA + "calendar.lua",
        "civil(math.floor(now_ms / 86400000))",
        "civil(math.floor((now_ms - 3600000) / 86400000))",
    ),
    Planted(
        "a day's budget counts the month",
        LUA + "spend.lua",
        "'total', 'day:' .. day, 'month:' .. month)",
        "'total', 'month:' .. month, 'month:' .. month)",
    ),
    Planted(
        "an account's requests in parallel aren't counted",
        LUA + "admit.lua",
        "  return ACCOUNT_MAX_PARALLEL >= 0 and",
        "  return ACCOUNT_MAX_PARALLEL >= 99 and",
    ),
    Planted(
        "an account's buckets aren't debited",
        LUA + "admit.lua",
        "save(ACCOUNT_BUCKET, account_requests, account_tokens, account_daily)",
        "",
    ),
    Planted(
        "x-ratelimit is of the fuller of two buckets",
        "gateway/admit.py",
        "bucket.remaining < other.remaining",
        "bucket.remaining > other.remaining",
    ),
    Planted(
        "a settlement tells of a threshold again",
        LUA + "spend.lua",
        "spent >= mark and spent - cost < mark",
        "spent >= mark",
    ),
    Planted(
        "limits are checked before budgets",
        LUA + "admit.lua",
        "if short then\n  local room",
        "if short and wait_ms(key_requests, 1) == 0 and wait_ms(account_requests, 1) == 0 then\n  local room",
    ),
    Planted(
        "a day's budget counts no holds",
        LUA + "spend.lua",
        "local counted = tonumber(spent[index] or 0) + held",
        "local counted = tonumber(spent[index] or 0) + (index == 2 and 0 or held)",
    ),
    Planted(
        "a month's budget begins anew each day",
        LUA + "spend.lua",
        "'total', 'day:' .. day, 'month:' .. month)",
        "'total', 'day:' .. day, 'day:' .. day)",
    ),
    Planted(
        "an account's limits aren't enforced without Redis",
        "ledger/local.py",
        '            *self._debits_of("account", request.account, request.account_limits, request.tokens),\n',
        "",
    ),
    Planted(
        "an account's slots aren't enforced without Redis",
        "ledger/local.py",
        '            ("account", account, request.account_limits),\n',
        "",
    ),
    # Invalid requests.
    Planted("a temperature has no bound", "openai/request.py", "Annotated[float, Meta(ge=0, le=2)]", "float"),
    Planted(
        "an invalid request's error names no parameter",
        "openai/errors.py",
        "*details[:MAX_DETAILS], param=where or None",
        "*details[:MAX_DETAILS], param=None",
    ),
    Planted(
        "a body of text is read",
        "server/chat.py",
        'if content_type != "application/json" and not _is_json(content_type):',
        'if content_type == "application/xml":',
    ),
    Planted(
        "an invalid request ends its connection",
        "server/chat.py",
        "            keep_open = stream.keep_alive and not self.closes_idle\n",
        "            keep_open = stream.keep_alive = reply is None or reply.status < 413\n",
    ),
    # A provider's bytes.
    Planted(
        "a byte order mark is left in a stream",
        "openai/event_stream.py",
        "                event = event.removeprefix(BOM)\n",
        "                pass\n",
    ),
    Planted(
        "a CR alone ends no line",
        "openai/event_stream.py",
        'payload.replace(b"\\r\\n", b"\\n").replace(b"\\r", b"\\n") if',
        'payload.replace(b"\\r\\n", b"\\n") if',
    ),
    Planted(
        "a CRLF that is cut in two ends two lines",
        "openai/event_stream.py",
        'if self._cr and payload.startswith(b"\\n"):',
        'if self._cr and payload.startswith(b"\\n\\n"):',
    ),
    Planted(
        "the first byte after data: isn't read",
        "openai/events.py",
        'data.append(value.removeprefix(b" "))',
        "data.append(value[1:])",
    ),
    Planted(
        "the last data line of an event is read alone",
        "openai/events.py",
        'Event(b"\\n".join(data).strip(), name',
        'Event(b"".join(data[-1:]).strip(), name',
    ),
    Planted(
        "a wait that is a date isn't read",
        "policy/failover.py",
        "return parsedate_to_datetime(text).timestamp()",
        "return None",
    ),
    # Reloads that change upstreams.
    Planted(
        "an upstream keeps its address in a reload",
        "app/worker.py",
        "if old.settings.upstreams.get(name) == upstream and",
        "if name in old.providers and",
    ),
    Planted(
        "a reload ends the requests at upstreams that it changes",
        "upstream/provider.py",
        "        for connection in tuple(self._idle):\n            connection.abort()\n        self._idle.clear()\n\n    async",
        "        for connection in tuple(self._live):\n            connection.abort()\n        self._idle.clear()\n\n    async",
    ),
    Planted(
        "a request that runs asks new addresses in its next attempt",
        "app/worker.py",
        "        self.gateway.active = new\n",
        "        old.providers.update(new.providers)\n        self.gateway.active = new\n",
    ),
    # Groups of equals.
    Planted(
        "a session goes to any of its equals", "policy/route_health.py", "if session is not None:", 'if session == "?":'
    ),
    Planted(
        "a session goes to another of its equals in each worker",
        "policy/route_health.py",
        'name = f"{session}\\0{candidate.upstream}',
        "name = f\"{__import__('os').getpid()}{session}\\0{candidate.upstream}",
    ),
    Planted(
        "a session doesn't know of weights",
        "policy/route_health.py",
        "return -math.log(point) / candidate.share",
        "return -math.log(point)",
    ),
    # Without the store.
    Planted(
        "a worker enforces half of its share",
        "ledger/local.py",
        "max(size / workers, 1.0), max(limit / workers, 1.0)",
        "max(size / workers / 2, 1.0), max(limit / workers / 2, 1.0)",
    ),
    Planted(
        "a wait without the store is ten times as long",
        "ledger/local.py",
        "max(min(count, self.size) - self.level, 0.0) / self.rate",
        "max(min(count, self.size) - self.level, 0.0) / self.rate * 10",
    ),
    Planted(
        "a worker allows half of its share",
        "ledger/local.py",
        "return self._allowance_nusd // self._instances.count -",
        "return self._allowance_nusd // self._instances.count // 2 -",
    ),
    Planted(
        "limits are checked before credit",
        LUA + "admit.lua",
        "if credit < least then return",
        "if credit < least and wait_ms(key_requests, 1) == 0 and wait_ms(key_tokens, tokens) == 0 then return",
    ),
    Planted(
        "budgets are checked before credit",
        LUA + "admit.lua",
        "if credit < least then return",
        "if credit < least and not short then return",
    ),
    Planted(
        "a stream waits for half a second for Redis",
        "gateway/admit.py",
        "MAX_RENEW_RETRIES = 40",
        "MAX_RENEW_RETRIES = 2",
    ),
    Planted(
        "a key is known for three seconds without Redis",
        "app/worker.py",
        "STALE_S = 3600.0",
        "STALE_S = 3.0",
    ),
    Planted(
        "a bucket isn't enforced without Redis",
        "ledger/local.py",
        "if slowest is not None and wait_s > 0:",
        "if slowest is not None and wait_s == math.inf:",
    ),
    Planted(
        "a slot isn't given back without Redis",
        "ledger/local.py",
        "                self._parallel[owner] -= 1\n",
        "                self._parallel[owner] -= 0\n",
    ),
    Planted(
        "a restart forgets the allowance of its journal",
        "ledger/local.py",
        "            if settlement.unheld:\n",
        "            if False:\n",
    ),
    Planted(
        "slots aren't enforced without Redis",
        "ledger/local.py",
        "        if full := self._full(request):\n",
        "        if (full := self._full(request)) and not request:\n",
    ),
    Planted(
        "tokens aren't taken from a bucket without Redis",
        "ledger/local.py",
        '"tokens", tokens_limit, tokens_limit), tokens\n',
        '"tokens", tokens_limit, tokens_limit), 0\n',
    ),
    Planted(
        "an allowance that is short is told as a limit",
        "ledger/local.py",
        'Denial("insufficient_credits", "credit", available,',
        'Denial("rate_limit", "account tokens", available,',
    ),
    Planted(
        "the allowance isn't refilled when Redis has charged",
        "ledger/local.py",
        "            self._set_owed(hold_id, self._owed[hold_id][0], 0)\n",
        "            pass\n",
    ),
    Planted(
        "a stream is extended without Redis beyond the allowance",
        "ledger/local.py",
        "        if amount_nusd > self._available(request.account):\n",
        "        if amount_nusd < 0:\n",
    ),
    Planted(
        "what a stream was extended by without Redis isn't counted",
        "ledger/local.py",
        "self._owed.get(request.hold_id, (request.account, 0))[1] + amount_nusd\n",
        "self._owed.get(request.hold_id, (request.account, 0))[1]\n",
    ),
    Planted(
        "a bucket refills ten times as fast without Redis",
        "ledger/local.py",
        "old.level + (now - old.at) * rate)",
        "old.level + (now - old.at) * rate * 10)",
    ),
    Planted(
        "what is over counts against the allowance as it had been held",
        "ledger/local.py",
        "            amount = max(settlement.cost_nusd - held_by_redis_nusd, 0)\n",
        "            amount = max(self._owed.get(settlement.hold_id, ('', 0))[1], settlement.cost_nusd)\n",
    ),
    Planted(
        "a wait doesn't eject an upstream",
        "gateway/health.py",
        "        if wait_s:\n            route = self._route\n",
        "        if wait_s > 1e9:\n            route = self._route\n",
    ),
    Planted(
        "failures in a row don't eject an upstream",
        "gateway/health.py",
        "            if route.failures >= OUTLIER_FAILURES:\n",
        "            if route.failures >= OUTLIER_FAILURES * 100:\n",
    ),
    Planted(
        "an upstream is ejected for ten times its wait",
        "gateway/health.py",
        "route.ejected_until = max(route.ejected_until, self._health.clock() + wait_s)",
        "route.ejected_until = max(route.ejected_until, self._health.clock() + wait_s * 10)",
    ),
    Planted(
        "one failure ejects an upstream",
        "gateway/health.py",
        "            if route.failures >= OUTLIER_FAILURES:\n",
        "            if route.failures >= 1:\n",
    ),
    Planted(
        "the last upstream is asked first",
        "policy/route_health.py",
        "    return available + [candidate",
        "    return available[::-1] + [candidate",
    ),
    Planted(
        "an ejected upstream isn't asked at all",
        "policy/route_health.py",
        "    return available + [candidate for _, candidate in sorted(ejected, key=lambda pair: pair[0])]",
        "    return available or [candidate for _, candidate in sorted(ejected, key=lambda pair: pair[0])]",
    ),
    Planted(
        "a stream doesn't wait for its client",
        "gateway/relay.py",
        "            if self._downstream.congested():\n                self._wait()\n            return\n",
        "            return\n",
    ),
    Planted(
        "256 KiB may wait for a client",
        "server/chat.py",
        "MAX_BUFFERED_BYTES = 32_768",
        "MAX_BUFFERED_BYTES = 32_768 * 8",
    ),
    Planted(
        "a lower number of workers holds at once",
        "ledger/local.py",
        "max(count, self._told, self._at_least), count\n",
        "max(count, self._at_least), count\n",
    ),
    Planted(
        "a journal is replayed a settlement at a time",
        "ledger/journal.py",
        "            self._pending.popleft()\n            count += 1\n",
        "            self._pending.popleft()\n            return 1\n",
    ),
    Planted(
        "an account's keys share their slots without Redis",
        "ledger/local.py",
        'return request.account, f"{request.account} {request.key_id}"',
        'return request.account, f"{request.account} its keys"',
    ),
    Planted(
        "what went on without its client is told as completed",
        "gateway/in_flight.py",
        '                exchange.outcome = "client_disconnected"\n',
        '                exchange.outcome = "completed"\n',
    ),
    # Drains, and bodies that don't end.
    Planted(
        "a drain doesn't wait for what runs without its client",
        "app/application.py",
        "        return not self._worker.recorder.in_flight and not self._runner.busy()\n",
        "        return not self._runner.busy()\n",
    ),
    Planted(
        "what runs without its client isn't ended with a drain",
        "app/application.py",
        "        self._runner.interrupt()\n        self._worker.gateway.interrupt()\n",
        "        self._runner.interrupt()\n",
    ),
    Planted(
        "a whole answer in a drain lets its connection be kept",
        "server/chat.py",
        "        if reply.status == 408 or self._is_closing():",
        "        if reply.status == 408:",
    ),
    Planted(
        "a drain keeps connections without a request",
        "app/application.py",
        "        self._runner.close_idle()\n",
        "",
    ),
    Planted(
        "a drain keeps the connection of a stream that had begun",
        "server/chat.py",
        "            keep_open = stream.keep_alive and not self.closes_idle\n",
        "            keep_open = stream.keep_alive\n",
    ),
    Planted(
        "a stream's head in a drain lets its connection be kept",
        "server/chat.py",
        "        if self._is_closing():\n",
        "        if False:\n",
    ),
    Planted(
        "a body after [DONE] is awaited for 30 seconds",
        "upstream/response.py",
        "LAST_BYTE_S: Final = 2.0",
        "LAST_BYTE_S: Final = 30.0",
    ),
    Planted(
        "a stream whose body doesn't end has no [DONE]",
        "gateway/relay.py",
        "        if scanner.done:\n            self._complete()\n        elif scanner.error",
        "        if scanner.error",
    ),
    Planted(
        "a stream that is read whole is awaited to the end of its body",
        "upstream/response.py",
        "if self._timer is None and b",
        "if False and b",
    ),
]


def planted_tree(planted: Planted, home: Path) -> Path:
    """Copy meshproxy and simulation below `home`, with the fault. Raises ValueError if its text isn't there once."""
    for name in ("meshproxy", "simulation"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = home / "meshproxy" / planted.path
    text = path.read_text()
    if text.count(planted.old) != 1:
        raise ValueError(f"{planted.path} has {planted.old!r} {text.count(planted.old)} times")
    path.write_text(text.replace(planted.old, planted.new))
    return home


def seeds_until_found(planted: Planted, most: int) -> tuple[int | None, str]:
    """Play seeds until a rule is broken. Return how many it took (None: it wasn't found), and the finding."""
    with tempfile.TemporaryDirectory() as home:
        tree = planted_tree(planted, Path(home))
        command = [sys.executable, "-m", "simulation", "--seeds", str(most), "--stop"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    found = re.search(r"^(\d+) histories", run.stdout, re.MULTILINE)
    if run.returncode == 0 or found is None:
        return None, run.stderr[-300:]
    return int(found[1]), run.stdout.splitlines()[0]


def main(words: list[str]) -> int:
    """Plant each fault, and print a row of the table in docs/simulation.md for each, and a sum."""
    parser = argparse.ArgumentParser(prog="python -m simulation.planted")
    parser.add_argument(
        "--seeds", type=at_least_one, default=SEEDS, metavar="N", help=f"at most, for each fault ({SEEDS})"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name has these words")
    parser.add_argument("--jobs", type=processes, default=1, metavar="N", help="faults that are looked for at once (1)")
    asked = parser.parse_args(words)
    chosen = [planted for planted in PLANTED if asked.only in planted.name]
    if not chosen:
        parser.error(f"no fault's name has {asked.only!r}")
    found: list[int] = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        results = pool.map(lambda planted: seeds_until_found(planted, asked.seeds), chosen)
        for planted, (seeds, finding) in zip(chosen, results, strict=True):
            found += [] if seeds is None else [seeds]
            print(f"| {planted.name} | {seeds or 'not found'} |", flush=True)
            print(f"  {finding[:MOST_SHOWN]}", file=sys.stderr, flush=True)
    within = {most: sum(seeds <= most for seeds in found) for most in (20, 100, 1_000)}
    told = ", ".join(f"{count} within {most} seeds" for most, count in within.items())
    print(f"{len(found)} of {len(chosen)} found: {told}; the median is {statistics.median(found or [0]):g}")
    return 0 if len(found) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
