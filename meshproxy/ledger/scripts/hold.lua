-- A hold's record is 'AMOUNT TOKENS STARTED_MS KEY_RATE ACCOUNT_RATE BUDGETS KEY SESSION'. The rates are the tokens per minute
-- of the buckets that were debited (-1: none). BUDGETS is two digits: 1 if the key, then if the session, has a budget.
-- Needs clock.
-- The first keys of every script; a script without a key's books has only the first eight.
local CREDIT, HELD, HOLDS, DEADLINES, ABANDONED, USAGE, ACCOUNT_BUCKET, ACCOUNT_SPEND = unpack(KEYS, 1, 8)
local KEY_BUCKET, KEY_SPEND, KEY_RUNNING = unpack(KEYS, 9, 11)
local ABANDONED_KEPT_MS = 7 * 86400000
local RUNNING_KEPT_MS = 300000
local RELEASED_A_SWEEP = 100
local MAX_SWEEPS = 100

local function pack_hold(hold)
  return table.concat({
    whole(hold.amount), whole(hold.tokens), whole(hold.started_ms), whole(hold.key_rate), whole(hold.account_rate),
    hold.key_budget .. hold.session_budget, hold.key, hold.session,
  }, ' ')
end

local function parse_hold(record)
  local amount, tokens, started_ms, key_rate, account_rate, key_budget, session_budget, key, session =
    string.match(record, '^(%d+) (%d+) (%d+) (%-?%d+) (%-?%d+) (%d)(%d) (%S*) (.*)$')
  return {
    amount = tonumber(amount), tokens = tonumber(tokens), started_ms = tonumber(started_ms),
    key_rate = tonumber(key_rate), account_rate = tonumber(account_rate),
    key_budget = key_budget, session_budget = session_budget, key = key, session = session,
  }
end

local function add_held(field, amount)
  if redis.call('HINCRBY', HELD, field, whole(amount)) <= 0 then
    redis.call('HDEL', HELD, field)
  end
end

-- Adds `amount` (negative: subtracts) to what the account holds, and to what its key and session hold where they have
-- budgets.
local function hold_credit(hold, amount)
  if amount == 0 then return end
  redis.call('HINCRBY', CREDIT, 'held', whole(amount))
  if hold.key_budget == '1' then add_held('key:' .. hold.key, amount) end
  if hold.session_budget == '1' then add_held('session:' .. hold.session, amount) end
end

local function abandon(id, record)
  local hold = parse_hold(record)
  redis.call('HDEL', HOLDS, id)
  hold_credit(hold, -hold.amount)
  redis.call('HSET', ABANDONED, id, record)
  redis.call('ZADD', DEADLINES, whole(now_ms + ABANDONED_KEPT_MS), id)
  redis.call('XADD', USAGE, '*', 'event', 'abandoned', 'hold_id', id, 'key', hold.key, 'session', hold.session,
    'held_nusd', whole(hold.amount), 'tokens', whole(hold.tokens), 'started_ms', whole(hold.started_ms),
    'abandoned_ms', whole(now_ms), 'v', '1')
end

-- Releases the credit of holds whose deadline has passed; their tokens stay debited. The record is kept for a late
-- settlement until a second deadline, then deleted. Releases up to RELEASED_A_SWEEP holds a sweep. Ends when `enough`
-- returns true, when no expired hold is left, or after MAX_SWEEPS sweeps.
local function release_expired(enough)
  for _ = 1, MAX_SWEEPS do
    local due = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', whole(now_ms), 'LIMIT', 0, RELEASED_A_SWEEP)
    for _, id in ipairs(due) do
      local record = redis.call('HGET', HOLDS, id)
      if record then
        abandon(id, record)
      else
        redis.call('ZREM', DEADLINES, id)
        redis.call('HDEL', ABANDONED, id)
      end
    end
    if #due < RELEASED_A_SWEEP or enough() then return end
  end
end

-- Counts a hold as running for its key until a deadline. The key's set (hold ids by deadline) outlives its last hold by
-- RUNNING_KEPT_MS. Each time the set's expiry is extended, holds past their deadline are removed from it.
local function keep_running(key, id, deadline_ms)
  redis.call('ZADD', key, whole(deadline_ms), id)
  if redis.call('PTTL', key) < deadline_ms - now_ms then
    redis.call('PEXPIRE', key, whole(deadline_ms - now_ms + RUNNING_KEPT_MS))
    redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now_ms))
  end
end
