-- How many fields hashes have, in one round trip.
--
-- KEYS   hashes
-- ARGV   none
-- reply  the size of each, 0 where there is none

local sizes = {}
for index, key in ipairs(KEYS) do sizes[index] = redis.call('HLEN', key) end
return sizes
