-- Adds parts of the answer to a request with an Idempotency-Key. They never lie there without an end of life.
--
-- KEYS   1 parts of the answer
-- ARGV   1 time to live (ms), 2... parts
-- reply  how many parts there are now

local count
for index = 2, #ARGV do count = redis.call('RPUSH', KEYS[1], ARGV[index]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return count
