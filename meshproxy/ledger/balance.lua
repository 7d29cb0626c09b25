-- An account's credit, and one key's spend and buckets, after expired holds are released.
--
-- KEYS   1 credit, 2 held, 3 holds, 4 deadlines, 5 abandoned, 6 usage, 7 account's bucket; with a key: 8 key's bucket,
--        9 key's spend
-- ARGV   1-3 account's requests a minute, burst, tokens a minute; 4-6 key's (-1: no limit)
-- reply  1 balance, 2 held, 3 granted, 4 settled, 5-7 key's spend: total, day, month (nano-USD, strings), 8-15 remaining
--        and ms until full of the key's requests and tokens, the account's requests and tokens (-1: no limit)

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket

release_expired()

local function read_buckets(key, first)
  local fields = key and redis.call('HMGET', key, 'requests', 'tokens') or { false, false }
  local requests, burst, tokens = tonumber(ARGV[first]), tonumber(ARGV[first + 1]), tonumber(ARGV[first + 2])
  return refill(fields[1], requests, burst), refill(fields[2], tokens, tokens)
end

local credit = redis.call('HMGET', KEYS[1], 'balance', 'held', 'granted', 'settled')
local spent = KEYS[9] and redis.call('HMGET', KEYS[9], 'total', 'day:' .. day, 'month:' .. month) or { false, false, false }
local reply = {}
for index = 1, 4 do reply[index] = credit[index] or '0' end
for index = 1, 3 do reply[4 + index] = spent[index] or '0' end
local key_requests, key_tokens = read_buckets(KEYS[8], 4)
local account_requests, account_tokens = read_buckets(KEYS[7], 1)
append_state(reply, key_requests)
append_state(reply, key_tokens)
append_state(reply, account_requests)
append_state(reply, account_tokens)
return reply
