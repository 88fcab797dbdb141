-- Registers a session of a worker: from here on it may take messages.
--
-- KEYS  workers
-- ARGV  owner
local time = redis.call('TIME')
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], string.format('%d.%06d', time[1], time[2]), ARGV[1])
return 1
