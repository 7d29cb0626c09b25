-- Replaces a record if it is still what was read, so that no concurrent change is undone.
--
-- KEYS   1 record
-- ARGV   1 the record as it was read, 2 the new one
-- reply  1, or 0 having written nothing: it was changed, or removed, meanwhile

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
