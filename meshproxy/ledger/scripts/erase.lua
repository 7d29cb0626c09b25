-- Removes some of an account's keys, whatever they are; called until the cursor is 0 again.
--
-- KEYS   1 any of the account's keys, for the node that has them all
-- ARGV   1 cursor, 2 pattern of the account's keys, 3 how many keys of the store to look at
-- reply  1 next cursor, 2 how many were removed

local found = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
for _, key in ipairs(found[2]) do redis.call('UNLINK', key) end
return { found[1], #found[2] }
