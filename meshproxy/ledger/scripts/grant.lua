-- Grants credit, or takes credit back if the amount is negative. A `ref` is applied once. Appends to the history of grants and
-- to the usage stream.
--
-- KEYS   1 credit, 2 usage, 3 account's spend, 4 grants (stream: the history), 5 refs (hash: ref to its amount)
-- ARGV   1 amount (nano-USD), 2 note, 3 largest absolute balance allowed (nano-USD), 4 ref or '', 5 actor
-- reply  1 outcome (1 granted, 0 the balance would exceed ARGV 3, 2 this ref was granted before, 3 this ref was granted with
--        another amount), 2 balance (nano-USD)

-- include: clock

local amount, ref = ARGV[1], ARGV[4]
local balance = tonumber(redis.call('HGET', KEYS[1], 'balance') or 0)
local before = ref ~= '' and redis.call('HGET', KEYS[5], ref)
if before then return { before == amount and 2 or 3, balance } end
if math.abs(balance + tonumber(amount)) > tonumber(ARGV[3]) then return { 0, balance } end
balance = redis.call('HINCRBY', KEYS[1], 'balance', amount)
redis.call('HINCRBY', KEYS[1], 'granted', amount)
if tonumber(amount) > 0 then redis.call('HSET', KEYS[3], 'topped_nusd', whole(balance)) end
if ref ~= '' then redis.call('HSET', KEYS[5], ref, amount) end
local fields = { 'amount_nusd', amount, 'balance_nusd', whole(balance), 'note', ARGV[2], 'granted_ms', whole(now_ms),
  'ref', ref, 'actor', ARGV[5], 'v', '1' }
redis.call('XADD', KEYS[4], '*', unpack(fields))
redis.call('XADD', KEYS[2], '*', 'event', 'grant', unpack(fields))
return { 1, balance }
