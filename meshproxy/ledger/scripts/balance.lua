-- Reads an account's credit and spend, and one key's spend and buckets. Releases expired holds first.
--
-- KEYS   1 credit, 2 held, 3 holds, 4 deadlines, 5 abandoned, 6 usage, 7 account's bucket, 8 account's spend; with a key:
--        9 key's bucket, 10 key's spend, 11 key's running
-- ARGV   1-5 account's requests per minute, burst, tokens per minute, requests per day, parallel requests; 6-10 key's
--        (-1: no limit)
-- reply  1 balance, 2 held, 3 granted, 4 settled, 5-6 account's spend: day, month, 7-9 key's: total, day, month (nano-USD,
--        strings), 10 time of the key's last settlement (Unix ms, 0: none), 11 key's and 12 account's running requests,
--        13-24 remaining count and ms until full of six buckets, as 9-20 of admit.lua (-1: no limit)

-- include: clock
-- include: calendar
-- include: hold
-- include: bucket

release_expired(function() return false end)

local credit = redis.call('HMGET', CREDIT, 'balance', 'held', 'granted', 'settled')
local account = redis.call('HMGET', ACCOUNT_SPEND, 'day:' .. day, 'month:' .. month)
local key = KEY_SPEND and redis.call('HMGET', KEY_SPEND, 'total', 'day:' .. day, 'month:' .. month, 'used_ms') or {}
local reply = {}
for index = 1, 4 do reply[index] = credit[index] or '0' end
for index = 1, 2 do reply[4 + index] = account[index] or '0' end
for index = 1, 4 do reply[6 + index] = key[index] or '0' end
reply[11] = KEY_RUNNING and redis.call('ZCOUNT', KEY_RUNNING, '(' .. whole(now_ms), '+inf') or 0
reply[12] = redis.call('HLEN', HOLDS)
local key_requests, key_tokens, key_daily = read_buckets(KEY_BUCKET, 6)
local account_requests, account_tokens, account_daily = read_buckets(ACCOUNT_BUCKET, 1)
append_state(reply, key_requests)
append_state(reply, key_tokens)
append_state(reply, account_requests)
append_state(reply, account_tokens)
append_state(reply, key_daily)
append_state(reply, account_daily)
return reply
