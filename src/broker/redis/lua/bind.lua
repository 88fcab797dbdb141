-- Binds an expiring queue as kombu 5.7 does: the member, and a deadline that only moves forward.
--
-- KEYS  binding table, deadlines
-- ARGV  member, exchange, milliseconds
redis.call('SADD', KEYS[1], ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('ZADD', KEYS[2], 'GT', now + tonumber(ARGV[3]), ARGV[2])
return 1
