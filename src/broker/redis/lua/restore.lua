-- Puts unacknowledged messages back into their queues, each one only if its record is still there.
--
-- KEYS  workers, unacked, unacked_index, then the lists to push to, item after item
-- ARGV  LPUSH or RPUSH, highest score that may be restored (or ''), worker that must still count as dead (or
--       ''), its score, then for each item: field, envelope, number of lists (0: drop it)
-- Reply for each item 1 if it was put back or dropped.
local push, ceiling, worker, score = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local reply, list = {}, 4
if worker ~= '' and redis.call('ZSCORE', KEYS[1], worker) ~= score then
  return reply
end
for item = 5, #ARGV, 3 do
  local field, envelope, lists = ARGV[item], ARGV[item + 1], tonumber(ARGV[item + 2])
  local done = 0
  local due = true
  if ceiling then
    local at = redis.call('ZSCORE', KEYS[3], field)
    due = at and tonumber(at) <= ceiling
  end
  if due then
    local record = redis.call('HGET', KEYS[2], field)
    -- Deleting first also makes room: a server at `maxmemory` lets a script go on that began so.
    redis.call('HDEL', KEYS[2], field)
    if record then
      local pushed
      for index = list, list + lists - 1 do
        pushed = redis.pcall(push, KEYS[index], envelope)
        if type(pushed) == 'table' and pushed.err then
          redis.call('HSET', KEYS[2], field, record)
          return redis.error_reply(pushed.err)
        end
      end
      done = 1
    end
    redis.call('ZREM', KEYS[3], field)
  end
  list = list + lists
  reply[#reply + 1] = done
end
return reply
