-- Settles a hold once: releases it, charges the actual cost, corrects the token buckets, appends an event and adds to the
-- aggregates of the hour and of the month. The balance may become negative, because the work is done. A second settlement of the same id writes
-- nothing. An abandoned hold is settled late: the charge is the same, and there is nothing left to release.
--
-- The settlement of a request with an Idempotency-Key also updates the key's record: a completed request marks it charged. So
-- a repeat can't run and cost again even if the worker dies now. If another request owns the record by now, that request is
-- charged and this one is not.
--
-- KEYS   1 credit, 2 held, 3 holds, 4 deadlines, 5 abandoned, 6 usage, 7 account's bucket, 8 account's spend, 9 key's bucket,
--        10 key's spend, 11 key's running, 12 hour, 13 marker of a settlement without a hold, 14 requests of the day, 15 index of
--        hours, 16 month, then, if they exist: session's spend, record of the Idempotency-Key
-- ARGV   1 hold id, 2 unheld (1: admitted without Redis, so there may be no hold), 3 events kept in usage, 4 cost
--        (nano-USD), 5 request id, 6 key id, 7 account, 8 session or '', 9 model, 10 upstream, 11-17 tokens: prompt,
--        completion, cached, cache write, reasoning, audio prompt, audio completion, 18 usage source, 19 outcome,
--        20 price (JSON), 21 start time (Unix ms), 22 attempts, 23 cache-write tokens that are cached for an hour, 24 how long a
--        charged record is kept (ms; 0: no Idempotency-Key), 25-27 key's budgets: total, day, month, 28-30 account's (-1: none)
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
local BUDGETS = { 'total', 'daily', 'monthly' }

local id, unheld, cost = ARGV[1], ARGV[2] == '1', ARGV[4]
local session = ARGV[8]
if #session > MAX_FREE_SESSION_BYTES and cost == '0' and ARGV[11] == '0' and ARGV[12] == '0' then session = '~' end
local session_key = ARGV[8] ~= '' and KEYS[17]
local replay_key = ARGV[24] ~= '0' and KEYS[#KEYS]
local live = redis.call('HGET', KEYS[3], id)
local record = live or redis.call('HGET', KEYS[5], id)
if unheld then
  if not redis.call('SET', KEYS[13], '1', 'NX', 'EX', UNHELD_KEPT_S) then return 0 end
elseif not record then
  return 0
end

-- the hold: removals come first, because Redis accepts them even when its memory is full
local hold = record and parse_hold(record)
if hold then
  local used = tonumber(ARGV[11]) + tonumber(ARGV[12])
  redis.call('HDEL', live and KEYS[3] or KEYS[5], id)
  redis.call('ZREM', KEYS[4], id)
  redis.call('ZREM', KEYS[11], id)
  if live then hold_credit(hold, -hold.amount) end
  take_tokens(KEYS[9], hold.key_rate, used - hold.tokens)
  take_tokens(KEYS[7], hold.account_rate, used - hold.tokens)
end

-- the Idempotency-Key
local waived = '0'
if replay_key then
  local owner, state = unpack(redis.call('HMGET', replay_key, 'owner', 'state'))
  local taken = owner and owner ~= id and state and state ~= 'failed'
  if taken then
    cost, waived = '0', cost
  elseif ARGV[19] == 'completed' and (not owner or owner == id) and (not state or state == 'running') then
    redis.call('HSET', replay_key, 'owner', id, 'state', 'charged', 'charged_ms', whole(now_ms))
    redis.call('PEXPIRE', replay_key, ARGV[24])
  end
end

-- the charge
redis.call('HSET', KEYS[10], 'used_ms', whole(now_ms))
if cost ~= '0' then
  local nusd = tonumber(cost)
  local balance = redis.call('HINCRBY', KEYS[1], 'balance', '-' .. cost)
  local settled = redis.call('HINCRBY', KEYS[1], 'settled', cost)
  local of_account, of_key = charge(KEYS[8], cost, settled), charge(KEYS[10], cost)
  if session_key and (not hold or hold.session_budget == '1') then
    charge(session_key, cost)
    redis.call('EXPIRE', session_key, SESSION_KEPT_S)
  end
  for index = 1, ARGV[25] and 3 or 0 do
    note_thresholds('key ' .. BUDGETS[index] .. ' budget', ARGV[6], tonumber(ARGV[24 + index]), of_key[index], nusd)
    note_thresholds('account ' .. BUDGETS[index] .. ' budget', '', tonumber(ARGV[27 + index]), of_account[index], nusd)
  end
  local topped = tonumber(redis.call('HGET', KEYS[8], 'topped_nusd') or 0)
  note_thresholds('credit', '', topped, topped - balance, nusd)
end

-- the event
local event = redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[3], '*', 'event', 'settled', 'hold_id', id,
  'request_id', ARGV[5], 'key', ARGV[6], 'account', ARGV[7], 'session', session, 'model', ARGV[9], 'upstream', ARGV[10],
  'prompt_tokens', ARGV[11], 'completion_tokens', ARGV[12], 'cached_tokens', ARGV[13], 'cache_write_tokens', ARGV[14],
  'reasoning_tokens', ARGV[15], 'audio_prompt_tokens', ARGV[16], 'audio_completion_tokens', ARGV[17],
  'cost_nusd', cost, 'held_nusd', whole(hold and hold.amount or 0), 'usage_source', ARGV[18], 'outcome', ARGV[19],
  'hold', live and 'live' or record and 'abandoned' or 'none', 'price', ARGV[20], 'started_ms', ARGV[21],
  'settled_ms', whole(now_ms), 'attempts', ARGV[22], 'cache_write_1h_tokens', ARGV[23], 'waived_nusd', waived, 'v', '1')
local requests = redis.call('HLEN', KEYS[14])
if requests < REQUESTS_A_DAY then redis.call('HSET', KEYS[14], ARGV[5], event) end
if requests == 0 then redis.call('EXPIRE', KEYS[14], REQUESTS_KEPT_S) end

-- the hour and the month
local function add(key, prefix)
  for index, metric in ipairs(METRICS) do
    local count = ARGV[10 + index]
    if count ~= '0' then redis.call('HINCRBY', key, prefix .. metric, count) end
  end
  if cost ~= '0' then redis.call('HINCRBY', key, prefix .. 'cost', cost) end
end

local fields = redis.call('HLEN', KEYS[12])
if fields >= HOUR_MAX_FIELDS then session = '~' end
local of_hour = ARGV[6] .. '\31' .. ARGV[9] .. '\31' .. session .. '\31'
if redis.call('HINCRBY', KEYS[12], of_hour .. 'requests', 1) == 1 then
  index_hour(KEYS[15], string.match(KEYS[12], '(%d+%-%d+%-%d+)T(%d+)$'))
end
add(KEYS[12], of_hour)
if fields == 0 then redis.call('EXPIRE', KEYS[12], HOUR_KEPT_S) end
if cost ~= '0' then redis.call('HINCRBY', KEYS[15], 'nusd', cost) end
local of_month = ARGV[6] .. '\31' .. ARGV[9] .. '\31~\31'
if redis.call('HINCRBY', KEYS[16], of_month .. 'requests', 1) == 1 and redis.call('HLEN', KEYS[16]) > MONTH_MAX_FIELDS then
  redis.call('HDEL', KEYS[16], of_month .. 'requests')
  of_month = '~\31' .. ARGV[9] .. '\31~\31'
  redis.call('HINCRBY', KEYS[16], of_month .. 'requests', 1)
end
add(KEYS[16], of_month)
return 1
