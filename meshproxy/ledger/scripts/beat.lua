-- Counts the workers that share this Redis, by their heartbeats. Redis's TIME is the clock, so no host's own matters.
--
-- KEYS   1 workers (sorted set: worker by its last heartbeat, Unix seconds)
-- ARGV   1 worker, 2 how long one counts after its last heartbeat (ms)
-- reply  how many workers there are, this one included

-- include: clock

redis.call('ZADD', KEYS[1], whole(now_ms / 1000), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', whole((now_ms - tonumber(ARGV[2])) / 1000))
return redis.call('ZCARD', KEYS[1])
