-- now_ms: Redis's TIME, the only clock of the ledger.
-- whole(number): its digits, for every number that is written. Lua itself would say 1e+15, and -0.
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function whole(number)
  return string.format('%.0f', number + 0)
end
