-- Renames records: parks a message, fetches a parked one, or takes it over into another session.
--
-- KEYS  workers, unacked, unacked_index
-- ARGV  owner, 1 to have the records, then for each: old field, new field, score (or '': now)
-- Reply for each the record (or 1), false where it is gone; nil when this owner is not registered.
local seen = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not seen or tonumber(seen) < 0 then
  return false
end
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local reply = {}
for item = 3, #ARGV, 3 do
  local old, new, score = ARGV[item], ARGV[item + 1], ARGV[item + 2]
  local record = redis.call('HGET', KEYS[2], old)
  if record then
    redis.call('HDEL', KEYS[2], old)
    redis.call('ZREM', KEYS[3], old)
    redis.call('HSET', KEYS[2], new, record)
    redis.call('ZADD', KEYS[3], score ~= '' and score or now, new)
  end
  reply[#reply + 1] = record and (ARGV[2] == '1' and record or 1)
end
return reply
