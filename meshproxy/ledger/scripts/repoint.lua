-- Sets the digest of a key in an index, only if the index has one of those that were read.
--
-- KEYS   1 hash of digests by key id
-- ARGV   1 key id, 2 the new digest, then the digests that it may replace
-- reply  1; or 0 with nothing written: the index already has a newer digest, or the key was deleted

local present = redis.call('HGET', KEYS[1], ARGV[1])
for index = 3, #ARGV do
  if ARGV[index] == present then
    redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
    return 1
  end
end
return 0
