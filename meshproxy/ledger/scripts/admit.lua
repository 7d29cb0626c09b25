-- Admits a request: holds credit and debits the buckets, or denies it with a reason. The script reads everything and decides
-- before it writes. A denial writes nothing except what release_expired and refill write. Credit is checked first, then budgets,
-- then buckets and parallel requests, of which the longest wait is reported. A hold id that is held already is answered as
-- admitted, and nothing more is held.
--
-- KEYS   1 credit, 2 held, 3 holds, 4 deadlines, 5 abandoned, 6 usage, 7 account's bucket, 8 account's spend, 9 key's bucket,
--        10 key's spend, 11 key's running, 12 session's spend (only for a request with a session)
-- ARGV   1 hold id, 2 time to live (ms), 3 amount, 4 least amount (nano-USD), 5 strict (1 or 0), 6 tokens, 7 key id,
--        8 session or '', 9-13 key's requests per minute, burst, tokens per minute, requests per day, parallel requests,
--        14-18 account's, 19-21 key's budgets: total, day, month (nano-USD), 22-24 session's, 25-27 account's; -1: no limit;
--        28 share of the room (percent) that is held where the amount doesn't fit
-- reply  1 outcome (0 admitted, 1 insufficient credits, 2 spend limit, 3 rate limit), 2 amount held, 3 available
--        (nano-USD), 4 which budget (1-9: key's, session's, account's) or limit (1-6: buckets in the order of 9-20, 7 key's and
--        8 account's parallel requests), 5 retry after (ms; -1: never), 6 budget, 7 spent or held of it, 8 needed (nano-USD),
--        9-20 remaining count and ms until full of six buckets: key's requests, key's tokens, account's requests, account's
--        tokens (per minute), key's requests, account's requests (per day); -1: no limit

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket
-- include: spend

local PARALLEL_RETRY_MS = 1000

local id, ttl_ms, _, _, strict, _, key_id, session_id = unpack(ARGV, 1, 8)
local amount, least, tokens = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])
local KEY_MAX_PARALLEL, ACCOUNT_MAX_PARALLEL, SHARE_PERCENT = tonumber(ARGV[13]), tonumber(ARGV[18]), tonumber(ARGV[28])
local SESSION_SPEND = KEYS[12]

local available, credit, short
local rooms = {}

-- Reads credit and budgets. Sets `short` to the first scope (1 key, 2 session, 3 account) with too little room.
local function read_money()
  local held, settled
  available, credit, held, settled = credit_room(amount, strict == '1')
  rooms = {
    { budget_room(KEY_SPEND, 'key:' .. key_id, 19) },
    { budget_room(SESSION_SPEND, 'session:' .. session_id, 22) },
    { budget_room(ACCOUNT_SPEND, held, 25, settled) },
  }
  short = nil
  for scope = 3, 1, -1 do
    if rooms[scope][1] < least then short = scope end
  end
end

local function account_is_full()
  return ACCOUNT_MAX_PARALLEL >= 0 and redis.call('HLEN', HOLDS) >= ACCOUNT_MAX_PARALLEL
end

release_expired(function()
  read_money()
  return credit >= least and not short and not account_is_full()
end)

-- read
local held_record = redis.call('HGET', HOLDS, id)
read_money()
local key_requests, key_tokens, key_daily = read_buckets(KEY_BUCKET, 9)
local account_requests, account_tokens, account_daily = read_buckets(ACCOUNT_BUCKET, 14)
local buckets = { key_requests, key_tokens, account_requests, account_tokens, key_daily, account_daily }
local counts = { 1, tokens, 1, tokens, 1, 1 }

local function reply(outcome, held, which, retry_ms, budget, used)
  local answer = { outcome, held, available, which, retry_ms, budget or 0, used or 0, least }
  for index = 1, 6 do append_state(answer, buckets[index]) end
  return answer
end

-- decide
if held_record then return reply(0, parse_hold(held_record).amount, 0, 0) end
if credit < least then return reply(1, 0, 0, 0) end
if short then
  local room = rooms[short]
  return reply(2, 0, 3 * (short - 1) + room[2], 0, room[3], room[4])
end
local longest_ms, slowest = 0, 0
for index = 1, 6 do
  local needed_ms = wait_ms(buckets[index], counts[index])
  if needed_ms > longest_ms then longest_ms, slowest = needed_ms, index end
end
if longest_ms < PARALLEL_RETRY_MS then
  local running = KEY_MAX_PARALLEL >= 0 and redis.call('ZCOUNT', KEY_RUNNING, '(' .. whole(now_ms), '+inf')
  if running and running >= KEY_MAX_PARALLEL then
    longest_ms, slowest = PARALLEL_RETRY_MS, 7
  elseif account_is_full() then
    longest_ms, slowest = PARALLEL_RETRY_MS, 8
  end
end
if slowest > 0 then return reply(3, 0, slowest, longest_ms == NEVER and -1 or longest_ms) end

-- write
local key_room, session_room, account_room = rooms[1][1], rooms[2][1], rooms[3][1]
local room = math.min(credit, key_room, session_room, account_room)
if room < amount then amount = math.max(least, math.floor(room * SHARE_PERCENT / 100)) end
local deadline_ms = now_ms + tonumber(ttl_ms)
local hold = {
  amount = amount, tokens = tokens, started_ms = now_ms,
  key_rate = tonumber(ARGV[11]), account_rate = tonumber(ARGV[16]), key = key_id, session = session_id,
  key_budget = key_room < NO_BUDGET and '1' or '0', session_budget = session_room < NO_BUDGET and '1' or '0',
}
hold_credit(hold, hold.amount)
redis.call('HSET', HOLDS, id, pack_hold(hold))
redis.call('HDEL', ABANDONED, id)
redis.call('ZADD', DEADLINES, whole(deadline_ms), id)
keep_running(KEY_RUNNING, id, deadline_ms)
for index = 1, 6 do take(buckets[index], counts[index]) end
save(KEY_BUCKET, key_requests, key_tokens, key_daily)
save(ACCOUNT_BUCKET, account_requests, account_tokens, account_daily)
available = available - hold.amount
return reply(0, hold.amount, 0, 0)
