-- Counts one member of a chord and says whether its sender is to send the body. With the keys and the meaning that
-- Celery 5.7 gives them, so that Python workers can share a chord; and two rules more. A member that was to send the
-- body and comes again, because its worker died before it did, may send it again at once. And only a message that was
-- delivered before is dropped as a copy when the chord is done: others belong to a frozen chord that is sent again
-- under its old ids, whose mark Celery keeps until its last member is sent.
--
-- KEYS  .j results, .t members added later, .s size, .d members counted, the saved group, .c who sends the body,
--       .o the member that was told to send it (ours)
-- ARGV  task id, encoded result, 1 when results are ordered, index, seconds to live (0: for ever), the same for the
--       saved group, seconds that a sender has, the sender's token, 1 when the message was delivered before
-- Reply results so far, members added, size, 1 when this sender is to send. The first is -1 when the body was sent.

local results, added, size, counted, group, sender, told = unpack(KEYS)
local id, value, ordered, index, seconds, group_seconds, patience, token, again = unpack(ARGV)
local state = redis.call('GET', sender)
if state == 'done' then
  if again == '1' then
    return {-1, 0, 0, 0}
  end
  redis.call('DEL', sender)
  state = false
end

-- A frozen signature that is used twice in a header has one id and two indices.
local member = id .. ':' .. index
if redis.call('SADD', counted, member) == 1 then
  if ordered == '1' then
    redis.call('ZADD', results, index, value)
  else
    redis.call('RPUSH', results, value)
  end
end
local ready = redis.call(ordered == '1' and 'ZCARD' or 'LLEN', results)
if tonumber(seconds) > 0 then
  for _, key in ipairs({results, added, size, counted}) do
    redis.call('EXPIRE', key, seconds)
  end
  if tonumber(group_seconds) > 0 then
    redis.call('EXPIRE', group, group_seconds)
  end
end

local total, more = redis.call('GET', size), redis.call('GET', added)
local sends = 0
if total and ready == tonumber(total) + tonumber(more or 0) then
  if not state or redis.call('GET', told) == member then
    redis.call('SET', sender, token, 'EX', patience)
    redis.call('SET', told, member, 'EX', tonumber(seconds) > 0 and seconds or 86400)
    sends = 1
  end
end
return {ready, more, total, sends}
