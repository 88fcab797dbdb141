-- Marks a worker dead, so that none of its commands that are still on their way can take a message, or
-- removes it once all that it held is back.
--
-- KEYS  workers
-- ARGV  worker, the score it must have (or '': any), 1 to remove it, 0 to mark it
-- Reply its new score as text ('' when removed); nil when it was not as expected.
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not score or (ARGV[2] ~= '' and score ~= ARGV[2]) then
  return false
end
if ARGV[3] == '1' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  return ''
end
local time = redis.call('TIME')
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], string.format('-%d.%06d', time[1], time[2]), ARGV[1])
return redis.call('ZSCORE', KEYS[1], ARGV[1])
