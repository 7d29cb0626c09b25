-- Budgets and what counts against them. A spend hash has the fields total, day:DATE and month:MONTH, in nano-USD; days of
-- months gone by are dropped. Needs clock and calendar.
local NO_BUDGET = math.huge

-- The least room under the budgets ARGV[first] to ARGV[first + 2] (total, day, month; -1: none) given what was spent and
-- is held under `field`; and which of the three that is.
local function budget_room(spend_key, field, first)
  local budgets = { tonumber(ARGV[first]), tonumber(ARGV[first + 1]), tonumber(ARGV[first + 2]) }
  local room, which = NO_BUDGET, 0
  if math.max(budgets[1], budgets[2], budgets[3]) < 0 then return room, which end
  local spent = redis.call('HMGET', spend_key, 'total', 'day:' .. day, 'month:' .. month)
  local held = tonumber(redis.call('HGET', KEYS[2], field) or 0)
  for index = 1, 3 do
    local left = budgets[index] - tonumber(spent[index] or 0) - held
    if budgets[index] >= 0 and left < room then
      room, which = left, index
    end
  end
  return room, which
end

local function drop_past_days(spend_key)
  for _, field in ipairs(redis.call('HKEYS', spend_key)) do
    if string.sub(field, 1, 4) == 'day:' then redis.call('HDEL', spend_key, field) end
  end
end

local function charge(spend_key, cost)
  if redis.call('HEXISTS', spend_key, 'month:' .. month) == 0 then drop_past_days(spend_key) end
  redis.call('HINCRBY', spend_key, 'total', cost)
  redis.call('HINCRBY', spend_key, 'day:' .. day, cost)
  redis.call('HINCRBY', spend_key, 'month:' .. month, cost)
end

-- What an account has free, and the room for one hold in it: without strict credit, any while something is free.
local function credit_room(amount, strict)
  local credit = redis.call('HMGET', KEYS[1], 'balance', 'held')
  local available = tonumber(credit[1] or 0) - tonumber(credit[2] or 0)
  if not strict and available > 0 then return available, math.max(available, amount) end
  return available, available
end
