-- Claims an Idempotency-Key for a request, or says what became of the request that has it. One that failed leaves the key
-- free again.
--
-- KEYS   1 record
-- ARGV   1 owner (a request's hold id), 2 digest of the body, 3 time to live (ms)
-- reply  1 state (0 claimed, 1 running, 2 finished, 3 finished and its answer not kept, 4 another body), 2 owner
--
-- A record is `charged` from its settlement (settle.lua) until its owner has said how far the answer is. Where it doesn't, its
-- worker died in between: the answer is lost, and was paid for.

-- include: clock

local STATES = { running = 1, finished = 2, lost = 3 }
local CHARGED_MS = 15000

local record = redis.call('HMGET', KEYS[1], 'body', 'owner', 'state', 'charged_ms')
local state = STATES[record[3]]
if record[3] == 'charged' then state = now_ms - tonumber(record[4]) < CHARGED_MS and 1 or 3 end
if state and record[1] and record[1] ~= ARGV[2] then return { 4, record[2] } end
if state then return { state, record[2] } end
redis.call('HSET', KEYS[1], 'body', ARGV[2], 'owner', ARGV[1], 'state', 'running')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return { 0, ARGV[1] }
