-- One turn of a session: deletes what is settled, then takes messages and records them as
-- unacknowledged. Redis runs a script without interruption, so a message is never in neither place.
--
-- KEYS  workers, unacked, unacked_index, then the queues' lists, all of the first priority step first
-- ARGV  owner, first tag, messages wanted, 1 to take turns between queues, number of queues, number of
--       settled fields, then the queues' names as JSON, then the settled fields
-- Reply queue number and envelope of each message, tags counting up from the first one; nil when this
--       owner is not (or no longer) registered and may take nothing.
local owner, tag, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local fair, queues, settled = ARGV[4] == '1', tonumber(ARGV[5]), tonumber(ARGV[6])
local first_settled = 7 + queues

if settled > 0 then
  redis.call('HDEL', KEYS[2], unpack(ARGV, first_settled, first_settled + settled - 1))
  redis.call('ZREM', KEYS[3], unpack(ARGV, first_settled, first_settled + settled - 1))
end
if wanted == 0 then
  return {}
end
local seen = redis.call('ZSCORE', KEYS[1], owner)
if not seen or tonumber(seen) < 0 then
  return false
end

local reply, lists, numbers = {}, {}, {}
local steps = (#KEYS - 3) / queues
for step = 0, steps - 1 do
  local live = {}
  for queue = 1, queues do
    live[queue] = queue
  end
  while wanted > 0 and #live > 0 do
    local share = fair and math.max(1, math.floor(wanted / #live)) or wanted
    local taken, still = {}, {}
    for _, queue in ipairs(live) do
      local list, count = KEYS[3 + step * queues + queue], math.min(share, wanted)
      if count > 0 then
        -- A key of another type is skipped here; the session asks for its type and says so.
        local items = redis.pcall('RPOP', list, count)
        if type(items) == 'table' and not items.err and #items > 0 then
          wanted = wanted - #items
          taken[#taken + 1] = { queue, list, items }
          if #items == count then
            still[#still + 1] = queue
          end
        end
      end
    end
    -- In turns: one of each, then the next of each. Otherwise all of the first queue, then of the second.
    local deepest = 0
    for _, from in ipairs(taken) do
      deepest = math.max(deepest, #from[3])
    end
    for depth = 1, fair and deepest or 1 do
      for _, from in ipairs(taken) do
        for place = depth, fair and math.min(depth, #from[3]) or #from[3] do
          reply[#reply + 1] = from[1]
          reply[#reply + 1] = from[3][place]
          lists[#lists + 1] = from[2]
        end
      end
    end
    live = still
  end
end
if #reply == 0 then
  return reply
end

local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local records, scores = {}, {}
for index = 1, #lists do
  local queue, item, field = reply[2 * index - 1], reply[2 * index], owner .. ':' .. string.format('%d', tag)
  -- What is surely no JSON object is quoted, so that the record itself is always JSON for whoever reads it.
  local json = item
  if string.byte(item, 1) ~= 123 or string.byte(item, -1) ~= 125 then
    json = cjson.encode(item)
  end
  records[#records + 1] = field
  records[#records + 1] = '[' .. json .. ',"",' .. ARGV[6 + queue] .. ']'
  scores[#scores + 1] = now
  scores[#scores + 1] = field
  tag = tag + 1
end
local written = redis.pcall('HSET', KEYS[2], unpack(records))
if type(written) ~= 'table' or not written.err then
  written = redis.pcall('ZADD', KEYS[3], unpack(scores))
end
if type(written) == 'table' and written.err then
  -- A script is not rolled back: a wrong type or a missing permission must not cost the messages.
  for index = #lists, 1, -1 do
    redis.call('RPUSH', lists[index], reply[2 * index])
  end
  return redis.error_reply(written.err)
end
return reply
