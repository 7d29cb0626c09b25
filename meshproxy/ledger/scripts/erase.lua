-- Deletes a batch of an account's keys of every kind. Call it again until the cursor is 0.
--
-- KEYS   1 any key of the account: routes the call to the Cluster node that has all of them
-- ARGV   1 cursor, 2 pattern of the account's keys, 3 how many keys of the store to scan
-- reply  1 next cursor, 2 how many keys were deleted

local found = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
for _, key in ipairs(found[2]) do redis.call('UNLINK', key) end
return { found[1], #found[2] }
