-- Returns the sizes of several hashes in one round trip.
--
-- KEYS   hashes
-- ARGV   none
-- reply  the number of fields of each hash, 0 if it doesn't exist

local sizes = {}
for index, key in ipairs(KEYS) do sizes[index] = redis.call('HLEN', key) end
return sizes
