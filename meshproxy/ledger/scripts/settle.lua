-- Settles a hold once: releases it, charges the actual cost, corrects the token buckets, appends an event and adds to the
-- aggregates of the hour and of the month. The balance may become negative, because the work is done. A second settlement of
-- the same id writes nothing. An abandoned hold is settled late: the charge is the same, and there is nothing left to release.
--
-- The settlement of a request with an Idempotency-Key also updates the key's record: a complete answer marks it charged,
-- also one that went on without its client. So a repeat can't run and cost again even if the worker dies now. If a repeat ran
-- meanwhile, the first of the two that is settled and costs something is charged (the record's `paid`), and the other is not.
-- A repeat that has only claimed the record may still be refused: this request takes the record from it.
--
-- KEYS   1 credit, 2 held, 3 holds, 4 deadlines, 5 abandoned, 6 usage, 7 account's bucket, 8 account's spend, 9 key's bucket,
--        10 key's spend, 11 key's running, 12 hour, 13 requests of the day, 14 index of hours, 15 month, 16 marker of a
--        settlement without a hold, then, if they exist: session's spend, record of the Idempotency-Key
-- ARGV   1 hold id, 2 unheld (1: admitted without Redis, so there may be no hold), 3 events kept in usage, 4 cost
--        (nano-USD), 5 request id, 6 key id, 7 account, 8 session or '', 9 model, 10 upstream, 11-17 tokens: prompt,
--        completion, cached, cache write, reasoning, audio prompt, audio completion, 18 usage source, 19 outcome,
--        20 price (JSON), 21 start time (Unix ms), 22 attempts, 23 cache-write tokens that are cached for an hour, 24 how long a
--        charged record is kept (ms; -1: the answer isn't complete, 0: no Idempotency-Key), 25 error's code or '', 26 the upstream's HTTP status (0: none),
--        27-29 key's budgets: total, day, month, 30-32 account's (-1: none)
-- reply  1 settled, 0 settled before or never admitted

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket
-- include: spend
-- include: index

local UNHELD_KEPT_S = 7 * 86400
local SESSION_KEPT_S = 62 * 86400
local HOUR_KEPT_S = 90 * 86400
local HOUR_MAX_FIELDS = 50000
local MONTH_MAX_FIELDS = 20000
local REQUESTS_KEPT_S = 8 * 86400
local REQUESTS_A_DAY = 200000
local METRICS = {
  'prompt', 'completion', 'cached', 'cache_write', 'reasoning', 'audio_prompt', 'audio_completion',
}
-- Bound on the session's name in the event of a request that used nothing: free requests must not fill Redis with long
-- names. A longer name is stored as '~'.
local MAX_FREE_SESSION_BYTES = 64
-- Outcomes of a complete answer. Journals of older releases have lines of others with a time to live.
local COMPLETE = { completed = true, client_disconnected = true }
local BUDGETS = { 'total', 'daily', 'monthly' }

local id, unheld, events_kept, cost, request_id, key_id, account, session_id, model, upstream = unpack(ARGV, 1, 10)
local prompt, completion, cached, cache_write, reasoning, audio_prompt, audio_completion = unpack(ARGV, 11, 17)
local usage_source, outcome, price, started_ms, attempts, cache_write_1h, replay_ttl_ms = unpack(ARGV, 18, 24)
local code, upstream_status = unpack(ARGV, 25, 26)
local counts = { prompt, completion, cached, cache_write, reasoning, audio_prompt, audio_completion } -- as METRICS
local HOUR, REQUESTS, HOURS, MONTH, UNHELD = unpack(KEYS, 12, 16)
local session = session_id
if #session > MAX_FREE_SESSION_BYTES and cost == '0' and prompt == '0' and completion == '0' then session = '~' end
local session_key = session_id ~= '' and KEYS[17]
local replay_key = replay_ttl_ms ~= '0' and KEYS[#KEYS]
local live = redis.call('HGET', HOLDS, id)
local record = live or redis.call('HGET', ABANDONED, id)
if unheld == '1' then
  if not redis.call('SET', UNHELD, '1', 'NX', 'EX', UNHELD_KEPT_S) then return 0 end
elseif not record then
  return 0
end

-- the hold: removals come first, because Redis accepts them even when its memory is full
local hold = record and parse_hold(record)
if hold then
  local used = tonumber(prompt) + tonumber(completion)
  redis.call('HDEL', live and HOLDS or ABANDONED, id)
  redis.call('ZREM', DEADLINES, id)
  redis.call('ZREM', KEY_RUNNING, id)
  if live then hold_credit(hold, -hold.amount) end
  take_tokens(KEY_BUCKET, hold.key_rate, used - hold.tokens)
  take_tokens(ACCOUNT_BUCKET, hold.account_rate, used - hold.tokens)
end

-- the Idempotency-Key
local waived = '0'
if replay_key then
  local owner, state, paid = unpack(redis.call('HMGET', replay_key, 'owner', 'state', 'paid'))
  local complete = tonumber(replay_ttl_ms) > 0 and COMPLETE[outcome]
  local runs = not state or state == 'running'
  local is_other = owner and owner ~= id
  local claimed = is_other and runs and redis.call('HEXISTS', HOLDS, owner) + redis.call('HEXISTS', ABANDONED, owner) == 0
  if not paid and not runs and state ~= 'failed' then paid = owner end
  if complete and runs and (not is_other or claimed) then
    redis.call('HSET', replay_key, 'owner', id, 'state', 'charged', 'charged_ms', whole(now_ms), 'paid', paid or '')
    redis.call('PEXPIRE', replay_key, replay_ttl_ms)
  end
  if paid and paid ~= '' and paid ~= id then
    cost, waived = '0', cost
  elseif complete and cost ~= '0' then
    redis.call('HSET', replay_key, 'paid', id)
  end
end

-- the charge
redis.call('HSET', KEY_SPEND, 'used_ms', whole(now_ms))
if cost ~= '0' then
  local nusd = tonumber(cost)
  local balance = redis.call('HINCRBY', CREDIT, 'balance', '-' .. cost)
  local settled = redis.call('HINCRBY', CREDIT, 'settled', cost)
  local of_account, of_key = charge(ACCOUNT_SPEND, cost, settled), charge(KEY_SPEND, cost)
  if session_key and (not hold or hold.session_budget == '1') then
    charge(session_key, cost)
    redis.call('EXPIRE', session_key, SESSION_KEPT_S)
  end
  for index = 1, ARGV[27] and 3 or 0 do
    note_thresholds('key ' .. BUDGETS[index] .. ' budget', key_id, tonumber(ARGV[26 + index]), of_key[index], nusd)
    note_thresholds('account ' .. BUDGETS[index] .. ' budget', '', tonumber(ARGV[29 + index]), of_account[index], nusd)
  end
  local topped = tonumber(redis.call('HGET', ACCOUNT_SPEND, 'topped_nusd') or 0)
  note_thresholds('credit', '', topped, topped - balance, nusd)
end

-- the event
local cause = code ~= '' and { 'code', code, 'upstream_status', upstream_status } or {}
local event = redis.call('XADD', USAGE, 'MAXLEN', '~', events_kept, '*', 'event', 'settled', 'hold_id', id,
  'request_id', request_id, 'key', key_id, 'account', account, 'session', session, 'model', model, 'upstream', upstream,
  'prompt_tokens', prompt, 'completion_tokens', completion, 'cached_tokens', cached, 'cache_write_tokens', cache_write,
  'reasoning_tokens', reasoning, 'audio_prompt_tokens', audio_prompt, 'audio_completion_tokens', audio_completion,
  'cost_nusd', cost, 'held_nusd', whole(hold and hold.amount or 0), 'usage_source', usage_source, 'outcome', outcome,
  'hold', live and 'live' or record and 'abandoned' or 'none', 'price', price, 'started_ms', started_ms,
  'settled_ms', whole(now_ms), 'attempts', attempts, 'cache_write_1h_tokens', cache_write_1h, 'waived_nusd', waived, 'v', '1',
  unpack(cause))
local requests = redis.call('HLEN', REQUESTS)
if requests < REQUESTS_A_DAY then redis.call('HSET', REQUESTS, request_id, event) end
if requests == 0 then redis.call('EXPIRE', REQUESTS, REQUESTS_KEPT_S) end

-- the hour and the month
local function add(key, prefix)
  for index, metric in ipairs(METRICS) do
    local count = counts[index]
    if count ~= '0' then redis.call('HINCRBY', key, prefix .. metric, count) end
  end
  if cost ~= '0' then redis.call('HINCRBY', key, prefix .. 'cost', cost) end
end

local fields = redis.call('HLEN', HOUR)
if fields >= HOUR_MAX_FIELDS then session = '~' end
local of_hour = key_id .. '\31' .. model .. '\31' .. session .. '\31'
if redis.call('HINCRBY', HOUR, of_hour .. 'requests', 1) == 1 then
  index_hour(HOURS, string.match(HOUR, '(%d+%-%d+%-%d+)T(%d+)$'))
end
add(HOUR, of_hour)
if fields == 0 then redis.call('EXPIRE', HOUR, HOUR_KEPT_S) end
if cost ~= '0' then redis.call('HINCRBY', HOURS, 'nusd', cost) end
local of_month = key_id .. '\31' .. model .. '\31~\31'
if redis.call('HINCRBY', MONTH, of_month .. 'requests', 1) == 1 and redis.call('HLEN', MONTH) > MONTH_MAX_FIELDS then
  redis.call('HDEL', MONTH, of_month .. 'requests')
  of_month = '~\31' .. model .. '\31~\31'
  redis.call('HINCRBY', MONTH, of_month .. 'requests', 1)
end
add(MONTH, of_month)
return 1
