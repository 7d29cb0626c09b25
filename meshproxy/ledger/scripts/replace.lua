-- Replaces a record only if it still equals what was read, so that no concurrent change is undone.
--
-- KEYS   1 record
-- ARGV   1 the record as it was read, 2 the new record
-- reply  1; or 0 with nothing written: the record was changed or deleted since

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
