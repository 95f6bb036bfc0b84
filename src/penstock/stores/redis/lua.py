"""What happens in Redis, as scripts: each is carried out whole, with nothing in between.

    entries    hash: key to "version expires-at\\nvalue"     index      zset: the keys, all of one score, by their bytes
    version    the last version given                       expiring   zset: keys by when they expire

Versions are microseconds of the server's clock, or the last one and one more: one is given twice to no key even if
the database was emptied, or a replica took over that had not heard of the last ones.
"""

from __future__ import annotations

from penstock.redis.link import Script

_HEAD = """
local P = KEYS[1]
local call = redis.call
local t = call('TIME')
local T = t[1] + t[2] / 1000000
local function remove(key)
  call('HDEL', P .. 'entries', key)
  call('ZREM', P .. 'index', key)
  call('ZREM', P .. 'expiring', key)
end
"""

APPLY = Script(
    _HEAD,
    """
-- channels, {p(ut) d(elete) t(ouch), key, value, ttl, expected version, tell} …; answers a version for each, or nothing
for i = 2, #ARGV, 6 do
  if ARGV[i] == 'p' then
    call('SETRANGE', P .. 'nothing', 0, '')  -- without memory it is refused before anything is done
    break
  end
end
for _, key in ipairs(call('ZRANGEBYSCORE', P .. 'expiring', '-inf', T, 'LIMIT', 0, 100)) do remove(key) end
local last
local function next_version()
  last = math.max((last or tonumber(call('GET', P .. 'version') or '0')) + 1, math.floor(T * 1000000))
  return last
end
local function write(key, version, ttl, value)
  local expires = ''
  if ttl ~= '' then
    expires = string.format('%.6f', T + ttl)
    call('ZADD', P .. 'expiring', expires, key)
  else
    call('ZREM', P .. 'expiring', key)
  end
  call('HSET', P .. 'entries', key, version .. ' ' .. expires .. '\\n' .. value)
end
local told = {}
for i = 2, #ARGV, 6 do
  local kind, key, ttl, expected = ARGV[i], ARGV[i + 1], ARGV[i + 3], ARGV[i + 4]
  local known = '0'
  local packed = (kind ~= 'p' or expected ~= '') and call('HGET', P .. 'entries', key)
  if packed then
    local version, expires = packed:match('^(%d+) ([%d.]*)\\n')
    if expires == '' or tonumber(expires) > T then
      known = version
    else
      remove(key)
      packed = false
    end
  end
  local outcome = false
  if kind == 't' then
    if packed then
      write(key, known, ttl, packed:sub(packed:find('\\n', 1, true) + 1))
      outcome = known
    end
  elseif expected == '' or expected == known then
    if kind == 'p' then
      outcome = string.format('%.0f', next_version())
      write(key, outcome, ttl, ARGV[i + 2])
      call('ZADD', P .. 'index', 0, key)
    else
      outcome = '0'
      if packed then remove(key) end
    end
    if ARGV[i + 5] == '1' and (kind == 'p' or packed) then call('PUBLISH', ARGV[1] .. key, '') end
  end
  told[#told + 1] = outcome
end
if last then call('SET', P .. 'version', string.format('%.0f', last)) end
return told
""",
)

GET = Script(
    """
-- keys …; answers the time, then what is under each
local t = redis.call('TIME')
local found = redis.call('HMGET', KEYS[1] .. 'entries', unpack(ARGV))
return {t[1], t[2], found}
""",
)

SCAN = Script(
    _HEAD,
    """
-- from, to, how many, '1' for the other direction; answers {key, entry, key, entry …}
local from, to, left, backwards = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1'
local found = {}
while left > 0 do
  local keys
  if backwards then
    keys = call('ZREVRANGEBYLEX', P .. 'index', to, from, 'LIMIT', 0, math.min(left, 1000))
  else
    keys = call('ZRANGEBYLEX', P .. 'index', from, to, 'LIMIT', 0, math.min(left, 1000))
  end
  if #keys == 0 then break end
  for n, packed in ipairs(call('HMGET', P .. 'entries', unpack(keys))) do
    local expires = packed and packed:match('^%d+ ([%d.]*)\\n')
    if expires and (expires == '' or tonumber(expires) > T) then
      found[#found + 1] = keys[n]
      found[#found + 1] = packed
      left = left - 1
    end
  end
  if backwards then to = '(' .. keys[#keys] else from = '(' .. keys[#keys] end
end
return found
""",
)
