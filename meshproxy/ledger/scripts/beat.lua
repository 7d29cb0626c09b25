-- Records that a worker runs and counts the workers that share this Redis. The clock is Redis's TIME, so the clocks of the
-- workers' hosts don't matter.
--
-- KEYS   1 workers (sorted set: worker id by its last report, Unix seconds)
-- ARGV   1 worker id, 2 how long a worker counts after its last report (ms)
-- reply  how many workers there are, including this one

-- include: clock

redis.call('ZADD', KEYS[1], whole(now_ms / 1000), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', whole((now_ms - tonumber(ARGV[2])) / 1000))
return redis.call('ZCARD', KEYS[1])
