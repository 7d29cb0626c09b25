-- Stores a template's record and makes its name the only one that maps to its id.
--
-- KEYS   1 the owner's names (hash: name to id), 2 the owner's templates (hash: id to record)
-- ARGV   1 id, 2 name, 3 record, 4 most templates of an owner, 5 most bytes of all records of an owner, 6 the record as it was
--        read ('': don't compare)
-- reply  'stored'; or, with nothing written: 'taken' (another template has the name), 'full' (ARGV 4 or 5 is reached),
--        'changed' (the stored record isn't ARGV 6)

local id, name, record = ARGV[1], ARGV[2], ARGV[3]
if ARGV[6] ~= '' and redis.call('HGET', KEYS[2], id) ~= ARGV[6] then return 'changed' end

local holder = redis.call('HGET', KEYS[1], name)
if holder and holder ~= id then return 'taken' end

local names = redis.call('HGETALL', KEYS[1])
local count, bytes = 1, string.len(record)
for at = 1, #names, 2 do
  if names[at + 1] ~= id then
    count = count + 1
    bytes = bytes + redis.call('HSTRLEN', KEYS[2], names[at + 1])
  end
end
if count > tonumber(ARGV[4]) or bytes > tonumber(ARGV[5]) then return 'full' end

for at = 1, #names, 2 do
  if names[at + 1] == id then redis.call('HDEL', KEYS[1], names[at]) end
end
redis.call('HSET', KEYS[1], name, id)
redis.call('HSET', KEYS[2], id, record)
return 'stored'
