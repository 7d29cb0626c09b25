-- now_ms: Redis's TIME in ms. The ledger uses no other clock.
--
-- whole(number): the number's decimal digits. Every number that is written goes through it, because Lua's own
-- conversion writes 1e+15 and -0.
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function whole(number)
  return string.format('%.0f', number + 0)
end
