-- Budgets and the spend that counts against them. A spend hash has the fields total, day:DATE and month:MONTH, in
-- nano-USD. Days of earlier months are deleted. Needs clock, calendar and hold.
local NO_BUDGET = math.huge
local SHARES = { 50, 80, 100 }

-- Returns the smallest room under the budgets ARGV[first] to ARGV[first + 2] (total, day, month; -1: none), which of
-- the three has it (1 to 3), that budget, and how much of it is spent or held. `held` is an amount, or the name of a
-- field of HELD. `total` replaces the hash's own total where the hash may lack it.
local function budget_room(spend_key, held, first, total)
  local budgets = { tonumber(ARGV[first]), tonumber(ARGV[first + 1]), tonumber(ARGV[first + 2]) }
  local room, which, budget, used = NO_BUDGET, 0, 0, 0
  if math.max(budgets[1], budgets[2], budgets[3]) < 0 then return room, which, budget, used end
  local spent = redis.call('HMGET', spend_key, 'total', 'day:' .. day, 'month:' .. month)
  if total then spent[1] = total end
  if type(held) == 'string' then held = tonumber(redis.call('HGET', HELD, held) or 0) end
  for index = 1, 3 do
    local counted = tonumber(spent[index] or 0) + held
    if budgets[index] >= 0 and budgets[index] - counted < room then
      room, which, budget, used = budgets[index] - counted, index, budgets[index], counted
    end
  end
  return room, which, budget, used
end

local function drop_past_days(spend_key)
  for _, field in ipairs(redis.call('HKEYS', spend_key)) do
    if string.sub(field, 1, 4) == 'day:' then redis.call('HDEL', spend_key, field) end
  end
end

-- Adds a cost to a spend hash. Returns the new sums: total, day, month. `total` is the new total where the hash doesn't
-- keep it.
local function charge(spend_key, cost, total)
  local of_month = redis.call('HINCRBY', spend_key, 'month:' .. month, cost)
  if of_month == tonumber(cost) then drop_past_days(spend_key) end
  total = total or redis.call('HINCRBY', spend_key, 'total', cost)
  return { total, redis.call('HINCRBY', spend_key, 'day:' .. day, cost), of_month }
end

-- Appends an event for each share of `budget` that `cost` made the spend cross. Each share has one event, because spend
-- only grows.
local function note_thresholds(which, key, budget, spent, cost)
  for _, share in ipairs(SHARES) do
    local mark = math.ceil(budget * share / 100)
    if budget > 0 and spent >= mark and spent - cost < mark then
      redis.call('XADD', USAGE, '*', 'event', 'threshold', 'which', which, 'key', key, 'percent', whole(share),
        'budget_nusd', whole(budget), 'spent_nusd', whole(spent), 'reached_ms', whole(now_ms), 'v', '1')
    end
  end
end

-- Returns four amounts: what is available, the room for one hold, what is held, what was ever settled. Without strict
-- credit, any hold fits while something is available.
local function credit_room(amount, strict)
  local credit = redis.call('HMGET', CREDIT, 'balance', 'held', 'settled')
  local held = tonumber(credit[2] or 0)
  local available = tonumber(credit[1] or 0) - held
  local room = available
  if not strict and available > 0 then room = math.max(available, amount) end
  return available, room, held, tonumber(credit[3] or 0)
end
