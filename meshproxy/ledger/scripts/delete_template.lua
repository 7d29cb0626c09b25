-- Deletes a template and its name.
--
-- KEYS   1 the owner's names (hash: name to id), 2 the owner's templates (hash: id to record)
-- ARGV   1 id
-- reply  1, or 0 if there was none

local names = redis.call('HGETALL', KEYS[1])
for at = 1, #names, 2 do
  if names[at + 1] == ARGV[1] then redis.call('HDEL', KEYS[1], names[at]) end
end
return redis.call('HDEL', KEYS[2], ARGV[1])
