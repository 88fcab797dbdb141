-- A worker's sign of life, the renewal of what it holds, and what it should look after.
--
-- KEYS  workers, unacked_index
-- ARGV  owner, visibility timeout, grace of parked messages, age at which a worker counts as silent, most
--       overdue fields wanted, then the fields to renew
-- Reply {now, numbers of the fields that are gone, overdue fields (oldest first), silent workers with
--       their scores}; nil when this owner is not (or no longer) registered.
local owner, timeout, grace = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local silence, limit = tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local seen = redis.call('ZSCORE', KEYS[1], owner)
if not seen or tonumber(seen) < 0 then
  return false
end
-- A server at `maxmemory` refuses to begin a script's writing with ZADD, but not to go on with it, and a
-- worker that drains a full server must stay alive.
redis.call('ZREM', KEYS[1], '')
redis.call('ZADD', KEYS[1], now, owner)

local gone = {}
for from = 6, #ARGV, 1000 do
  local last = math.min(from + 999, #ARGV)
  local scores, renewed = redis.call('ZMSCORE', KEYS[2], unpack(ARGV, from, last)), {}
  for index = from, last do
    if scores[index - from + 1] then
      renewed[#renewed + 1] = now
      renewed[#renewed + 1] = ARGV[index]
    else
      gone[#gone + 1] = index - 5
    end
  end
  if #renewed > 0 then
    redis.call('ZADD', KEYS[2], unpack(renewed))
  end
end

local ceiling = tonumber(now) - timeout
local overdue = {}
local listed = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ceiling, 'WITHSCORES', 'LIMIT', 0, limit)
for index = 1, #listed, 2 do
  -- Who parked a message fetches it when it is due; others wait a little before they do.
  local parked = string.find(listed[index], '~', 1, true)
  if not parked or tonumber(listed[index + 1]) <= ceiling - grace then
    overdue[#overdue + 1] = listed[index]
  end
end
local silent = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', tonumber(now) - silence, 'WITHSCORES')
return { now, gone, overdue, silent }
