-- Token buckets. One is a field 'LEVEL AT' of a hash: AT in ms, LEVEL in parts of which a limit of R a period refills R a
-- millisecond, so that no step ever rounds: sixty-thousandths for what is counted by the minute, MS_A_DAY-ths by the day. A level
-- below zero is a debt. A missing field is a full bucket. `tokens_rate` is the tokens a minute of the latest admission: what
-- settles is put right at the rate of today and not of its hold. Needs clock.
local MS_A_MINUTE = 60000
local MS_A_DAY = 86400000
local KEPT_MS = 120000
local NEVER = math.huge

-- The bucket of `key` whose field has `value`, refilled up to now_ms, never above its size of today; false if there is no limit
-- (a negative rate). A time in the future (Redis's clock was put back) is written anew as now, or waits would be untrue until then.
local function refill(key, name, value, rate, size, period_ms)
  if rate < 0 then return false end
  local full = size * period_ms
  local bucket = { name = name, rate = rate, full = full, level = full, unit = period_ms }
  if value then
    local level, at = string.match(value, '^(%-?%d+) (%d+)$')
    level, at = tonumber(level), tonumber(at)
    if at > now_ms then redis.call('HSET', key, name, whole(level) .. ' ' .. whole(now_ms)) end
    bucket.level = math.min(full, level + math.max(0, now_ms - at) * rate)
  end
  return bucket
end

-- The three buckets of a hash: requests and tokens a minute, requests a day. ARGV[first] on: requests a minute, burst, tokens
-- a minute, requests a day (-1: no limit).
local function read_buckets(key, first)
  local fields = key and redis.call('HMGET', key, 'requests', 'tokens', 'day') or { false, false, false }
  local requests, burst = tonumber(ARGV[first]), tonumber(ARGV[first + 1])
  local tokens, daily = tonumber(ARGV[first + 2]), tonumber(ARGV[first + 3])
  return refill(key, 'requests', fields[1], requests, burst, MS_A_MINUTE),
    refill(key, 'tokens', fields[2], tokens, tokens, MS_A_MINUTE),
    refill(key, 'day', fields[3], daily, daily, MS_A_DAY)
end

local function ms_until(bucket, level)
  if bucket.rate == 0 then return 0 end
  return math.max(0, math.ceil((level - bucket.level) / bucket.rate))
end

-- How long until the bucket lets `count` through. More than it can hold gets through when it is full.
local function wait_ms(bucket, count)
  if not bucket then return 0 end
  if bucket.rate == 0 then return NEVER end
  return ms_until(bucket, math.min(count * bucket.unit, bucket.full))
end

local function take(bucket, count)
  if bucket then bucket.level = math.min(bucket.full, bucket.level - count * bucket.unit) end
end

local function pack_bucket(bucket)
  return whole(bucket.level) .. ' ' .. whole(now_ms)
end

-- Writes the buckets of a hash, which lasts until they are full again, two minutes at least.
local function save(key, requests, tokens, daily)
  local kept_ms, fields = KEPT_MS, {}
  for _, bucket in pairs({ requests or nil, tokens or nil, daily or nil }) do
    fields[#fields + 1] = bucket.name
    fields[#fields + 1] = pack_bucket(bucket)
    kept_ms = math.max(kept_ms, ms_until(bucket, bucket.full))
  end
  if tokens then
    fields[#fields + 1] = 'tokens_rate'
    fields[#fields + 1] = whole(tokens.rate)
  end
  if #fields == 0 then return end
  redis.call('HSET', key, unpack(fields))
  redis.call('PEXPIRE', key, whole(kept_ms))
end

-- The token bucket that a hold of `rate` was taken from, at the rate of today; false if there was none.
local function token_bucket(key, rate)
  if rate <= 0 then return false end
  local fields = redis.call('HMGET', key, 'tokens', 'tokens_rate')
  local today = tonumber(fields[2] or rate)
  return refill(key, 'tokens', fields[1], today, today, MS_A_MINUTE)
end

-- Takes `count` from a token bucket, gives back if negative: it may go into debt, never above its size. Nothing is given back to
-- a bucket that was made smaller since: what was taken from the larger one isn't missing in it.
local function take_tokens(key, rate, count)
  local bucket = count ~= 0 and token_bucket(key, rate)
  if not bucket or (count < 0 and bucket.rate < rate) then return end
  take(bucket, count)
  redis.call('HSET', key, 'tokens', pack_bucket(bucket))
  local kept_ms = math.max(KEPT_MS, ms_until(bucket, bucket.full))
  if redis.call('PTTL', key) < kept_ms then redis.call('PEXPIRE', key, whole(kept_ms)) end
end

-- Appends what is left and the ms until full; both -1 where there is no limit.
local function append_state(reply, bucket)
  reply[#reply + 1] = bucket and math.max(0, math.floor(bucket.level / bucket.unit)) or -1
  reply[#reply + 1] = bucket and ms_until(bucket, bucket.full) or -1
end
