-- Settles a hold once: releases it, charges what the request really cost, puts the token buckets right, appends an event
-- and adds to the hour's aggregates. The balance may go below zero: the work is done. The second settlement of an id
-- writes nothing. A hold that was abandoned is settled late: charged alike, with nothing left to release.
--
-- KEYS   1 credit, 2 held, 3 holds, 4 deadlines, 5 abandoned, 6 usage, 7 account's bucket, 8 key's bucket, 9 key's spend,
--        10 hour, 11 marker of a settlement without a hold, 12 session's spend (only with a session)
-- ARGV   1 hold id, 2 unheld (1: admitted without Redis, so there may be no hold), 3 events kept in usage, 4 cost
--        (nano-USD), 5 request id, 6 key id, 7 account, 8 session or '', 9 model, 10 upstream, 11-17 tokens: prompt,
--        completion, cached, cache write, reasoning, audio prompt, audio completion, 18 usage source, 19 outcome,
--        20 price (JSON), 21 started (ms)
-- reply  1 settled, 0 settled before or never admitted

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket
-- include: spend

local UNHELD_KEPT_S = 7 * 86400
local SESSION_KEPT_S = 62 * 86400
local HOUR_KEPT_S = 90 * 86400
local HOUR_MAX_FIELDS = 50000
local METRICS = {
  'prompt', 'completion', 'cached', 'cache_write', 'reasoning', 'audio_prompt', 'audio_completion',
}

local id, unheld, cost = ARGV[1], ARGV[2] == '1', ARGV[4]
local live = redis.call('HGET', KEYS[3], id)
local record = live or redis.call('HGET', KEYS[5], id)
if unheld then
  if not redis.call('SET', KEYS[11], '1', 'NX', 'EX', UNHELD_KEPT_S) then return 0 end
elseif not record then
  return 0
end

-- the hold: removals go first, which Redis lets through even when its memory is full, and then what follows them
local hold = record and parse_hold(record)
if hold then
  local used = tonumber(ARGV[11]) + tonumber(ARGV[12])
  redis.call('HDEL', live and KEYS[3] or KEYS[5], id)
  redis.call('ZREM', KEYS[4], id)
  if live then hold_credit(hold, -hold.amount) end
  take_tokens(KEYS[8], hold.key_rate, used - hold.tokens)
  take_tokens(KEYS[7], hold.account_rate, used - hold.tokens)
end

-- the charge
if cost ~= '0' then
  redis.call('HINCRBY', KEYS[1], 'balance', '-' .. cost)
  redis.call('HINCRBY', KEYS[1], 'settled', cost)
  charge(KEYS[9], cost)
  if KEYS[12] and (not hold or hold.session_budget == '1') then
    charge(KEYS[12], cost)
    redis.call('EXPIRE', KEYS[12], SESSION_KEPT_S)
  end
end

-- the event
redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[3], '*', 'event', 'settled', 'hold_id', id, 'request_id', ARGV[5],
  'key', ARGV[6], 'account', ARGV[7], 'session', ARGV[8], 'model', ARGV[9], 'upstream', ARGV[10],
  'prompt_tokens', ARGV[11], 'completion_tokens', ARGV[12], 'cached_tokens', ARGV[13], 'cache_write_tokens', ARGV[14],
  'reasoning_tokens', ARGV[15], 'audio_prompt_tokens', ARGV[16], 'audio_completion_tokens', ARGV[17],
  'cost_nusd', cost, 'held_nusd', whole(hold and hold.amount or 0), 'usage_source', ARGV[18], 'outcome', ARGV[19],
  'hold', live and 'live' or record and 'abandoned' or 'none', 'price', ARGV[20], 'started_ms', ARGV[21],
  'settled_ms', whole(now_ms))

-- the hour
local fields = redis.call('HLEN', KEYS[10])
local session = fields >= HOUR_MAX_FIELDS and '~' or ARGV[8]
local prefix = ARGV[6] .. '\31' .. ARGV[9] .. '\31' .. session .. '\31'
redis.call('HINCRBY', KEYS[10], prefix .. 'requests', 1)
for index, metric in ipairs(METRICS) do
  local count = ARGV[10 + index]
  if count ~= '0' then redis.call('HINCRBY', KEYS[10], prefix .. metric, count) end
end
if cost ~= '0' then redis.call('HINCRBY', KEYS[10], prefix .. 'cost', cost) end
if fields == 0 then redis.call('EXPIRE', KEYS[10], HOUR_KEPT_S) end
return 1
