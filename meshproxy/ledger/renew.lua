-- Renews a hold: raises it to a new total and sets a new deadline. The deadline of a live hold is set whatever is decided,
-- so that its owner can settle; else a denial writes nothing but what release_expired does. A hold that was abandoned
-- while its owner was stuck is taken back whole, if credit and budgets have room for it. A renewal never lowers a hold.
--
-- KEYS   as of admit
-- ARGV   1 hold id, 2 time to live (ms), 3 total amount (nano-USD), 4 total tokens, 5 strict (1 or 0), 6 enforce tokens
--        (1: deny what the token buckets don't have; 0: debit them into debt), 7-9 key's budgets, 10-12 session's
-- reply  1 outcome (as of admit; 4 gone: settled, or never here), 2 amount held, 3 available (nano-USD), 4 which budget
--        (1-6) or bucket (2, 4), 5 retry after (ms)

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket
-- include: spend

local id, deadline_ms = ARGV[1], now_ms + tonumber(ARGV[2])
local live = redis.call('HGET', KEYS[3], id)
if live then redis.call('ZADD', KEYS[4], whole(deadline_ms), id) end
release_expired()

-- read
local record = live or redis.call('HGET', KEYS[5], id)
if not record then return { 4, 0, 0, 0, 0 } end
local hold = parse_hold(record)
local covered = live and hold.amount or 0
local amount = math.max(hold.amount, tonumber(ARGV[3]))
local more, more_tokens = amount - covered, math.max(0, tonumber(ARGV[4]) - hold.tokens)
local available, credit = credit_room(more, ARGV[5] == '1')
local key_room, key_budget = budget_room(KEYS[9], 'key:' .. hold.key, 7)
local session_room, session_budget = budget_room(KEYS[10], 'session:' .. hold.session, 10)

local function deny(outcome, which, retry_ms)
  return { outcome, covered, available, which, retry_ms }
end

-- decide
if more > 0 then
  if credit < more then return deny(1, 0, 0) end
  if key_room < more then return deny(2, key_budget, 0) end
  if session_room < more then return deny(2, 3 + session_budget, 0) end
end
if ARGV[6] == '1' and more_tokens > 0 then
  local key_ms = wait_ms(refill(redis.call('HGET', KEYS[8], 'tokens'), hold.key_rate, hold.key_rate), more_tokens)
  local account_ms = wait_ms(
    refill(redis.call('HGET', KEYS[7], 'tokens'), hold.account_rate, hold.account_rate), more_tokens)
  if math.max(key_ms, account_ms) > 0 then
    return deny(3, account_ms > key_ms and 4 or 2, math.max(key_ms, account_ms))
  end
end

-- write
hold_credit(hold, more)
take_tokens(KEYS[8], hold.key_rate, more_tokens)
take_tokens(KEYS[7], hold.account_rate, more_tokens)
hold.amount, hold.tokens = amount, hold.tokens + more_tokens
redis.call('HSET', KEYS[3], id, pack_hold(hold))
if not live then
  redis.call('HDEL', KEYS[5], id)
  redis.call('ZADD', KEYS[4], whole(deadline_ms), id)
end
return { 0, amount, available - more, 0, 0 }
