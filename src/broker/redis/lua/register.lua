-- Registers a session of a worker: from here on it may take messages.
--
-- KEYS  workers
-- ARGV  owner
-- Reply the server's time.
local time = redis.call('TIME')
redis.call('ZREM', KEYS[1], ARGV[1])
local now = string.format('%d.%06d', time[1], time[2])
redis.call('ZADD', KEYS[1], now, ARGV[1])
return now
