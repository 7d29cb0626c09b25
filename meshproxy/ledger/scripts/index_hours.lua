-- Completes the index of an account's hours from a first one on, from the hours that exist. If Redis takes no writes, nothing is
-- stored.
--
-- KEYS   1 index, 2 credit, then every hour that may exist, the first one first
-- ARGV   1 the first hour (`2026-11-24T09`)
-- reply  the names of those that exist

-- include: index

local AT_ONCE = 24 -- hours that one EXISTS looks for, because most accounts have few
local found = {}
for first = 3, #KEYS, AT_ONCE do
  local last = math.min(first + AT_ONCE - 1, #KEYS)
  if redis.call('EXISTS', unpack(KEYS, first, last)) > 0 then
    for position = first, last do
      if redis.call('EXISTS', KEYS[position]) == 1 then
        found[#found + 1] = string.match(KEYS[position], '%d+%-%d+%-%d+T%d+$')
      end
    end
  end
end
local settled = redis.call('HGET', KEYS[2], 'settled') or '0'
local stored = redis.pcall('HSET', KEYS[1], 'nusd', settled, 'from', ARGV[1])
if type(stored) ~= 'table' then
  for _, name in ipairs(found) do index_hour(KEYS[1], string.sub(name, 1, 10), string.sub(name, 12)) end
end
return found
