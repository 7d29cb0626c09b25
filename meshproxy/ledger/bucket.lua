-- Token buckets. One is a field 'LEVEL AT' of a hash: AT in ms, LEVEL in sixty-thousandths, so that R a minute is R a
-- millisecond and no step ever rounds. A level below zero is a debt. A missing field is a full bucket. Needs clock.
local UNIT = 60000
local KEPT_MS = 120000
local NEVER = math.huge

-- The bucket refilled up to now_ms, never above its size of today; false if there is no limit (a negative rate).
local function refill(field, rate, size)
  if rate < 0 then return false end
  local full = size * UNIT
  local bucket = { rate = rate, full = full, level = full }
  if field then
    local level, at = string.match(field, '^(%-?%d+) (%d+)$')
    bucket.level = math.min(full, tonumber(level) + math.max(0, now_ms - tonumber(at)) * rate)
  end
  return bucket
end

local function ms_until(bucket, level)
  if bucket.rate == 0 then return 0 end
  return math.max(0, math.ceil((level - bucket.level) / bucket.rate))
end

-- How long until the bucket lets `count` through. More than it can hold gets through when it is full.
local function wait_ms(bucket, count)
  if not bucket then return 0 end
  if bucket.rate == 0 then return NEVER end
  return ms_until(bucket, math.min(count * UNIT, bucket.full))
end

local function take(bucket, count)
  if bucket then bucket.level = math.min(bucket.full, bucket.level - count * UNIT) end
end

local function pack_bucket(bucket)
  return whole(bucket.level) .. ' ' .. whole(now_ms)
end

-- Writes a pair of buckets; their hash lasts until they are full again, two minutes at least.
local function save(key, requests, tokens)
  local kept_ms = KEPT_MS
  if requests then
    redis.call('HSET', key, 'requests', pack_bucket(requests))
    kept_ms = math.max(kept_ms, ms_until(requests, requests.full))
  end
  if tokens then
    redis.call('HSET', key, 'tokens', pack_bucket(tokens))
    kept_ms = math.max(kept_ms, ms_until(tokens, tokens.full))
  end
  if requests or tokens then redis.call('PEXPIRE', key, whole(kept_ms)) end
end

-- Takes `count` from a token bucket, gives back if negative: a bucket may go into debt, never above its size.
local function take_tokens(key, rate, count)
  if rate <= 0 or count == 0 then return end
  local bucket = refill(redis.call('HGET', key, 'tokens'), rate, rate)
  take(bucket, count)
  redis.call('HSET', key, 'tokens', pack_bucket(bucket))
  local kept_ms = math.max(KEPT_MS, ms_until(bucket, bucket.full))
  if redis.call('PTTL', key) < kept_ms then redis.call('PEXPIRE', key, whole(kept_ms)) end
end

-- Appends what is left and the ms until full; both -1 where there is no limit.
local function append_state(reply, bucket)
  reply[#reply + 1] = bucket and math.max(0, math.floor(bucket.level / UNIT)) or -1
  reply[#reply + 1] = bucket and ms_until(bucket, bucket.full) or -1
end
