-- Token buckets. Each bucket is a field 'LEVEL AT' of a hash. AT is the time of the last write, in ms. LEVEL is in
-- fractions of the counted unit, so that a limit of R per period refills exactly R fractions per millisecond and never
-- rounds: 1/60000 for limits per minute, 1/86400000 for limits per day. A negative level is a debt. A missing field is
-- a full bucket. The field `tokens_rate` holds the tokens per minute of the latest admission: a settlement corrects the
-- bucket at this rate, not at the rate of its hold. Needs clock.
local MS_A_MINUTE = 60000
local MS_A_DAY = 86400000
local KEPT_MS = 120000
local NEVER = math.huge

-- Returns the bucket stored as `value`, refilled up to now_ms and never above its current size; false if there is no
-- limit (a negative rate). A time in the future (Redis's clock was set back) is rewritten as now: otherwise reported
-- waits would be wrong until that time.
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

-- Returns three buckets of a hash: requests per minute, tokens per minute, requests per day. ARGV from `first` on:
-- requests per minute, burst, tokens per minute, requests per day (-1: no limit).
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

-- Returns the ms until the bucket admits `count`. A count above the bucket's size is admitted when the bucket is full.
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

-- Writes the buckets of a hash. The hash expires when all are full again, after two minutes at the earliest.
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

-- Returns the token bucket that a hold with `rate` was taken from, at its current rate; false if the hold took none.
local function token_bucket(key, rate)
  if rate <= 0 then return false end
  local fields = redis.call('HMGET', key, 'tokens', 'tokens_rate')
  local today = tonumber(fields[2] or rate)
  return refill(key, 'tokens', fields[1], today, today, MS_A_MINUTE)
end

-- Takes `count` from a token bucket, or gives back if `count` is negative. The level may become a debt, but never
-- exceeds the size. If the bucket was made smaller since the hold, nothing is given back: the hold was taken from the
-- larger bucket, so the smaller one lacks nothing.
local function take_tokens(key, rate, count)
  local bucket = count ~= 0 and token_bucket(key, rate)
  if not bucket or (count < 0 and bucket.rate < rate) then return end
  take(bucket, count)
  redis.call('HSET', key, 'tokens', pack_bucket(bucket))
  local kept_ms = math.max(KEPT_MS, ms_until(bucket, bucket.full))
  if redis.call('PTTL', key) < kept_ms then redis.call('PEXPIRE', key, whole(kept_ms)) end
end

-- Appends the remaining count and the ms until full to the reply; both are -1 where there is no limit.
local function append_state(reply, bucket)
  reply[#reply + 1] = bucket and math.max(0, math.floor(bucket.level / bucket.unit)) or -1
  reply[#reply + 1] = bucket and ms_until(bucket, bucket.full) or -1
end
