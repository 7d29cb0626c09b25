-- Claims an Idempotency-Key for a request, or returns the state of the request that owns it. A failed request frees its key.
--
-- KEYS   1 record, 2 the account's owners (sorted set: hold id by when its record ends), 3 sizes of their answers (hash: hold
--        id to bytes, and `total`)
-- ARGV   1 owner (the request's hold id), 2 digest of the body, 3 time to live (ms), 4 most records of an account, 5 most bytes
-- reply  1 state (0 claimed, 1 running, 2 finished, 3 finished but its answer is not kept, 4 claimed with another body, 5 the
--        account has reached ARGV 4 or 5), 2 owner
--
-- settle.lua marks a record `charged`; its owner then writes how the answer ended. If the owner doesn't within CHARGED_MS, its
-- worker has died: the answer is lost although it was paid for.

-- include: clock
-- include: keep

local STATES = { running = 1, finished = 2, lost = 3 }
local CHARGED_MS = 15000
local FORGOTTEN_A_CALL = 100

local record = redis.call('HMGET', KEYS[1], 'body', 'owner', 'state', 'charged_ms')
local state = STATES[record[3]]
if record[3] == 'charged' then state = now_ms - tonumber(record[4]) < CHARGED_MS and 1 or 3 end
if state and record[1] and record[1] ~= ARGV[2] then return { 4, record[2] } end
if state then return { state, record[2] } end

for _, owner in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', whole(now_ms), 'LIMIT', 0, FORGOTTEN_A_CALL)) do
  local size = redis.call('HGET', KEYS[3], owner)
  if size then
    redis.call('HINCRBY', KEYS[3], 'total', '-' .. size)
    redis.call('HDEL', KEYS[3], owner)
  end
  redis.call('ZREM', KEYS[2], owner)
end
local bytes = tonumber(redis.call('HGET', KEYS[3], 'total') or 0)
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[4]) or bytes >= tonumber(ARGV[5]) then return { 5, '' } end
redis.call('HSET', KEYS[1], 'body', ARGV[2], 'owner', ARGV[1], 'state', 'running')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], whole(now_ms + tonumber(ARGV[3])), ARGV[1])
keep_for(KEYS[2], ARGV[3])
return { 0, ARGV[1] }
