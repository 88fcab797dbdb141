-- Stores results and tells those who wait for them, as Celery does, but never over a stored SUCCESS: looking
-- and writing are one step, so that two workers cannot both write.
--
-- KEYS  keys of the results
-- ARGV  for each: document, seconds to live (0: for ever)
-- Reply for each 1 (stored), 0 (a SUCCESS is there) or the server's error.

-- Celery writes the status first. What is no JSON (pickle, yaml, msgpack) has the word within a few bytes.
local function succeeded(document)
  local status = string.match(document, '^%s*{%s*"status"%s*:%s*"([^"]*)"')
  if status then
    return status == 'SUCCESS'
  end
  local json, meta = pcall(cjson.decode, document)
  if json then
    return type(meta) == 'table' and meta.status == 'SUCCESS'
  end
  local at = string.find(document, 'status', 1, true)
  return at and string.find(string.sub(document, at, at + 24), 'SUCCESS', 1, true)
end

local reply = {}
for index, key in ipairs(KEYS) do
  local document, seconds = ARGV[2 * index - 1], ARGV[2 * index]
  local answer = redis.pcall('GET', key)
  if type(answer) ~= 'table' then
    if answer and succeeded(answer) then
      answer = 0
    else
      answer = seconds == '0' and redis.pcall('SET', key, document) or redis.pcall('SETEX', key, seconds, document)
      if not answer.err then
        answer = redis.pcall('PUBLISH', key, document)
      end
      if type(answer) ~= 'table' then
        answer = 1
      end
    end
  end
  reply[index] = type(answer) == 'table' and answer.err or answer
end
return reply
