-- The index of an account's hours: a hash with a field for each day that has hourly aggregates (`2026-11-24`), 24 digits of which
-- that of an hour with some is 1, and the fields `nusd`: the cost that the index covers, and `from`, if it was completed later: its
-- first hour. An index that covers all that the account ever settled is complete; older versions of the gateway settle without it.
local DAYS_INDEXED = 100 -- more than the days for which hours are kept
local NO_HOURS = string.rep('0', 24)

local function forget_first_days(index_key)
  local days = redis.call('HKEYS', index_key)
  if #days <= DAYS_INDEXED then return end
  table.sort(days)
  for position = 1, #days - DAYS_INDEXED do
    if days[position] ~= 'nusd' then redis.call('HDEL', index_key, days[position]) end
  end
end

-- Adds an hour of a day (`2026-11-24`, `09`) to the index.
local function index_hour(index_key, day_of_hour, hour)
  local position = tonumber(hour) + 1
  local hours = redis.call('HGET', index_key, day_of_hour) or NO_HOURS
  if string.sub(hours, position, position) == '1' then return end
  local marked = string.sub(hours, 1, position - 1) .. '1' .. string.sub(hours, position + 1)
  redis.call('HSET', index_key, day_of_hour, marked)
  if hours == NO_HOURS then forget_first_days(index_key) end
end
