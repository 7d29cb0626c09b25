-- Appends parts of the answer to a request with an Idempotency-Key. Every write also sets the time to live.
--
-- KEYS   1 parts of the answer (list), 2 sizes of the account's answers (hash)
-- ARGV   1 time to live (ms), 2 owner (hold id), 3... parts
-- reply  how many parts there are now

-- include: keep

local count
local bytes = 0
for index = 3, #ARGV do
  count = redis.call('RPUSH', KEYS[1], ARGV[index])
  bytes = bytes + #ARGV[index]
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[2], ARGV[2], bytes)
redis.call('HINCRBY', KEYS[2], 'total', bytes)
keep_for(KEYS[2], ARGV[1])
return count
