-- Keeps a key of the account's for so many ms more, or as long as it is kept already.
local function keep_for(key, ms)
  if redis.call('PTTL', key) < tonumber(ms) then redis.call('PEXPIRE', key, ms) end
end
