-- Records that a request with an Idempotency-Key has ended, and how, or that it still runs. Only the record's owner may do so.
-- An answer of which parts are missing, because a failover lost them, is lost and not finished.
--
-- KEYS   1 record, 2 parts of the answer, 3 the account's owners, 4 sizes of their answers
-- ARGV   1 owner, 2 state (running, finished, lost or failed), 3 time to live (ms), 4 how many parts there must be if it is finished
-- reply  1 recorded, 0 the record has another owner now

-- include: clock
-- include: keep

if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
local is_whole = ARGV[2] ~= 'finished' or redis.call('LLEN', KEYS[2]) == tonumber(ARGV[4])
redis.call('HSET', KEYS[1], 'state', is_whole and ARGV[2] or 'lost')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
if ARGV[2] == 'failed' then -- the record expires within seconds and no longer counts
  local size = redis.call('HGET', KEYS[4], ARGV[1])
  if size then
    redis.call('HINCRBY', KEYS[4], 'total', '-' .. size)
    redis.call('HDEL', KEYS[4], ARGV[1])
  end
  redis.call('ZREM', KEYS[3], ARGV[1])
  return 1
end
redis.call('ZADD', KEYS[3], whole(now_ms + tonumber(ARGV[3])), ARGV[1])
keep_for(KEYS[3], ARGV[3])
keep_for(KEYS[4], ARGV[3])
return 1
