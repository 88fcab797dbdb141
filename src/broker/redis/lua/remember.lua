-- Keeps texts for the workers to come, each until its time, and no more of them than were asked for.
--
-- KEYS  revoked
-- ARGV  most (0: no bound), then for each: text, seconds from now (or inf)
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
for item = 2, #ARGV, 2 do
  local keep = ARGV[item + 1]
  redis.call('ZADD', KEYS[1], 'GT', keep == 'inf' and '+inf' or now + keep, ARGV[item])
end
local most = tonumber(ARGV[1])
if most > 0 then
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -most - 1)
end
local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
if last == 'inf' then
  redis.call('PERSIST', KEYS[1])
elseif last then
  redis.call('EXPIREAT', KEYS[1], math.ceil(tonumber(last)))
end
