-- Admits a request: holds credit and debits buckets, or says why not. Everything is read and decided before anything is
-- written; a denial writes nothing but what release_expired does. Credit comes first, then budgets, then buckets.
-- A hold id that is held already is answered as admitted again and holds nothing more.
--
-- KEYS   1 credit, 2 held, 3 holds, 4 deadlines, 5 abandoned, 6 usage, 7 account's bucket, 8 key's bucket, 9 key's spend,
--        10 session's spend (only where the session has budgets)
-- ARGV   1 hold id, 2 time to live (ms), 3 amount, 4 least amount (nano-USD), 5 strict (1 or 0), 6 tokens, 7 key id,
--        8 session or '', 9-11 key's requests a minute, burst, tokens a minute, 12-14 account's, 15-17 key's budgets:
--        total, day, month (nano-USD), 18-20 session's; -1: no limit
-- reply  1 outcome (0 admitted, 1 insufficient credits, 2 spend limit, 3 rate limit), 2 amount held, 3 available
--        (nano-USD), 4 which budget (1-6) or bucket (1-4), 5 retry after (ms; -1: never), 6-13 remaining and ms until
--        full of the key's requests and tokens, the account's requests and tokens (-1: no limit)

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket
-- include: spend

local id, amount, least, tokens = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])
release_expired()

-- read
local held_record = redis.call('HGET', KEYS[3], id)
local available, credit = credit_room(amount, ARGV[5] == '1')
local key_room, key_budget = budget_room(KEYS[9], 'key:' .. ARGV[7], 15)
local session_room, session_budget = budget_room(KEYS[10], 'session:' .. ARGV[8], 18)
local key_fields = redis.call('HMGET', KEYS[8], 'requests', 'tokens')
local account_fields = redis.call('HMGET', KEYS[7], 'requests', 'tokens')
local rates = {}
for index = 9, 14 do rates[index] = tonumber(ARGV[index]) end
local buckets = {
  refill(key_fields[1], rates[9], rates[10]), refill(key_fields[2], rates[11], rates[11]),
  refill(account_fields[1], rates[12], rates[13]), refill(account_fields[2], rates[14], rates[14]),
}
local counts = { 1, tokens, 1, tokens }

local function reply(outcome, held, which, retry_ms)
  local answer = { outcome, held, available, which, retry_ms }
  for index = 1, 4 do append_state(answer, buckets[index]) end
  return answer
end

-- decide
if held_record then return reply(0, parse_hold(held_record).amount, 0, 0) end
if credit < least then return reply(1, 0, 0, 0) end
if key_room < least then return reply(2, 0, key_budget, 0) end
if session_room < least then return reply(2, 0, 3 + session_budget, 0) end
local longest_ms, slowest = 0, 0
for index = 1, 4 do
  local needed_ms = wait_ms(buckets[index], counts[index])
  if needed_ms > longest_ms then longest_ms, slowest = needed_ms, index end
end
if slowest > 0 then return reply(3, 0, slowest, longest_ms == NEVER and -1 or longest_ms) end

-- write
local hold = {
  amount = math.min(amount, credit, key_room, session_room), tokens = tokens, started_ms = now_ms,
  key_rate = rates[11], account_rate = rates[14], key = ARGV[7], session = ARGV[8],
  key_budget = key_room < NO_BUDGET and '1' or '0', session_budget = session_room < NO_BUDGET and '1' or '0',
}
hold_credit(hold, hold.amount)
redis.call('HSET', KEYS[3], id, pack_hold(hold))
redis.call('HDEL', KEYS[5], id)
redis.call('ZADD', KEYS[4], whole(now_ms + tonumber(ARGV[2])), id)
for index = 1, 4 do take(buckets[index], counts[index]) end
save(KEYS[8], buckets[1], buckets[2])
save(KEYS[7], buckets[3], buckets[4])
available = available - hold.amount
return reply(0, hold.amount, 0, 0)
