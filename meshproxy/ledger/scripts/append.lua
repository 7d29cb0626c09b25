-- Appends parts of the answer to a request with an Idempotency-Key. Every write also sets the time to live. Nothing is
-- appended where parts before these are missing: they have expired while the worker had lost Redis.
--
-- KEYS   1 parts of the answer (list), 2 sizes of the account's answers (hash)
-- ARGV   1 time to live (ms), 2 owner (hold id), 3 number of parts before these, 4... parts
-- reply  how many parts there are now, -1: some before these are missing

-- include: keep

if redis.call('LLEN', KEYS[1]) ~= tonumber(ARGV[3]) then return -1 end
local count
local bytes = 0
for index = 4, #ARGV do
  count = redis.call('RPUSH', KEYS[1], ARGV[index])
  bytes = bytes + #ARGV[index]
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[2], ARGV[2], bytes)
redis.call('HINCRBY', KEYS[2], 'total', bytes)
keep_for(KEYS[2], ARGV[1])
return count
