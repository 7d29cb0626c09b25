-- Grants credit, or takes back a grant if the amount is negative, and appends an event.
--
-- KEYS   1 credit, 2 usage
-- ARGV   1 amount (nano-USD), 2 note, 3 the most a balance may be, up or down (nano-USD)
-- reply  1 done (1, or 0: the balance would be past the most), 2 balance (nano-USD)

-- include: clock

local balance = tonumber(redis.call('HGET', KEYS[1], 'balance') or 0)
if math.abs(balance + tonumber(ARGV[1])) > tonumber(ARGV[3]) then return { 0, balance } end
balance = redis.call('HINCRBY', KEYS[1], 'balance', ARGV[1])
redis.call('HINCRBY', KEYS[1], 'granted', ARGV[1])
redis.call('XADD', KEYS[2], '*', 'event', 'grant', 'amount_nusd', ARGV[1], 'balance_nusd', whole(balance),
  'note', ARGV[2], 'granted_ms', whole(now_ms))
return { 1, balance }
