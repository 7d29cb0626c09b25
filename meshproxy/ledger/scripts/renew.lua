-- Renews a hold: raises it to a new total and sets a new deadline. A live hold gets the new deadline whatever is decided, so
-- that its owner can still settle it. Apart from that, a denial writes nothing except what release_expired and refill write. A
-- hold that was abandoned while its owner was stuck is held anew in full, if credit and budgets have room for it. A renewal
-- never lowers a hold.
--
-- KEYS   as in admit.lua
-- ARGV   1 hold id, 2 time to live (ms), 3 total amount (nano-USD), 4 total tokens, 5 strict (1 or 0), 6 enforce tokens
--        (1: deny what the token buckets don't have; 0: debit them into debt), 7-9 key's budgets, 10-12 session's,
--        13-15 account's
-- reply  1 outcome (as in admit.lua; 4 gone: settled, or never held here), 2 amount held, 3 available (nano-USD), 4 which
--        budget (1-9) or bucket (2, 4), 5 retry after (ms), 6 budget, 7 spent or held of it, 8 needed (nano-USD)

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket
-- include: spend

local id, ttl_ms, total, tokens, strict, enforce_tokens = unpack(ARGV, 1, 6)
local deadline_ms = now_ms + tonumber(ttl_ms)
local SESSION_SPEND = KEYS[12]
local live = redis.call('HGET', HOLDS, id)
local record = live or redis.call('HGET', ABANDONED, id)
local hold = record and parse_hold(record)
local covered = live and hold.amount or 0
local amount = hold and math.max(hold.amount, tonumber(total)) or 0
local more = amount - covered
local available, credit, short
local rooms = {}

local function read_money()
  local held, settled
  available, credit, held, settled = credit_room(more, strict == '1')
  rooms = {
    { budget_room(KEY_SPEND, 'key:' .. hold.key, 7) },
    { budget_room(SESSION_SPEND, 'session:' .. hold.session, 10) },
    { budget_room(ACCOUNT_SPEND, held, 13, settled) },
  }
  short = nil
  for scope = 3, 1, -1 do
    if rooms[scope][1] < more then short = scope end
  end
end

if live then
  redis.call('ZADD', DEADLINES, whole(deadline_ms), id)
  keep_running(KEY_RUNNING, id, deadline_ms)
end
release_expired(function()
  if not hold then return true end
  read_money()
  return credit >= more and not short
end)

-- read
if not hold or not (live or redis.call('HEXISTS', ABANDONED, id) == 1) then return { 4, 0, 0, 0, 0, 0, 0, 0 } end
read_money()
local more_tokens = math.max(0, tonumber(tokens) - hold.tokens)

local function deny(outcome, which, retry_ms, budget, used)
  return { outcome, covered, available, which, retry_ms, budget or 0, used or 0, more }
end

-- decide
if more > 0 then
  if credit < more then return deny(1, 0, 0) end
  if short then
    local room = rooms[short]
    return deny(2, 3 * (short - 1) + room[2], 0, room[3], room[4])
  end
end
if enforce_tokens == '1' and more_tokens > 0 then
  local key_ms = wait_ms(token_bucket(KEY_BUCKET, hold.key_rate), more_tokens)
  local account_ms = wait_ms(token_bucket(ACCOUNT_BUCKET, hold.account_rate), more_tokens)
  if math.max(key_ms, account_ms) > 0 then
    return deny(3, account_ms > key_ms and 4 or 2, math.max(key_ms, account_ms))
  end
end

-- write
hold_credit(hold, more)
take_tokens(KEY_BUCKET, hold.key_rate, more_tokens)
take_tokens(ACCOUNT_BUCKET, hold.account_rate, more_tokens)
hold.amount, hold.tokens = amount, hold.tokens + more_tokens
redis.call('HSET', HOLDS, id, pack_hold(hold))
if not live then
  redis.call('HDEL', ABANDONED, id)
  redis.call('ZADD', DEADLINES, whole(deadline_ms), id)
  keep_running(KEY_RUNNING, id, deadline_ms)
end
return { 0, amount, available - more, 0, 0, 0, 0, more }
