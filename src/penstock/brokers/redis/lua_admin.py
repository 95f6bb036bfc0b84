"""What an operator does in Redis, as scripts. `pieces` tells the keys."""

from __future__ import annotations

from penstock.brokers.redis.pieces import ADD, ALWAYS, HEAD, LENGTH, QUEUES, SWEEP
from penstock.redis.link import Script

INSPECT = Script(
    HEAD,
    QUEUES,
    ADD,
    SWEEP,
    LENGTH,
    """
-- queues …; answers {name, ready, held, consumers, meta of the oldest, paused, expired, discarded, topics} for each
local T = clock()
local told = {}
for i = 2, #ARGV do
  local Q = ARGV[i]
  if queue(Q) then
    sweep(Q, T)
    local held, oldest = 0, ''
    for _, rank in ipairs(call('SMEMBERS', P .. 'streams:' .. Q)) do
      local key = P .. 'stream:' .. rank .. ':' .. Q
      local groups = redis.pcall('XINFO', 'GROUPS', key)
      if groups[1] then
        held = held + groups[1][6]
        local first = call('XRANGE', key, '(' .. groups[1][8], '+', 'COUNT', 1)[1]
        if first then
          local meta = first[2][2]
          local fine, said = pcall(cjson.decode, meta)
          fine = fine and type(said) == 'table' and tonumber(said[5])
          if fine and (oldest == '' or said[5] < cjson.decode(oldest)[5]) then oldest = meta end
        end
      end
    end
    local said = call('HMGET', P .. 'queue:' .. Q, 'paused', 'expired', 'discarded')
    told[#told + 1] = {
      Q, length(Q) - held, held, call('SCARD', P .. 'consumers:' .. Q), oldest,
      said[1] or '', tonumber(said[2] or 0), tonumber(said[3] or 0), call('SMEMBERS', P .. 'topics:' .. Q),
    }
  end
end
return told
""",
)

BROWSE = Script(
    HEAD,
    QUEUES,
    """
-- queue, how many, and where the last page ended: rank or 'p', entry or number; answers {{rank or 'p', id, fields} …}
local Q, left, rank_after, after = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if not queue(Q) then return false end
local found = {}
if rank_after ~= 'p' then
  local ranks = call('SMEMBERS', P .. 'streams:' .. Q)
  table.sort(ranks, function(a, b) return tonumber(a) > tonumber(b) end)
  for _, rank in ipairs(ranks) do
    if left > 0 and (rank_after == '' or tonumber(rank) <= tonumber(rank_after)) then
      local from = rank == rank_after and '(' .. after or '-'
      for _, entry in ipairs(call('XRANGE', P .. 'stream:' .. rank .. ':' .. Q, from, '+', 'COUNT', left)) do
        found[#found + 1] = {rank, entry[1], entry[2]}
        left = left - 1
      end
    end
  end
  after = ''
end
if left > 0 then
  local start = after == '' and 0 or (call('ZRANK', P .. 'later:' .. Q, after) or -1) + 1
  for _, number in ipairs(call('ZRANGE', P .. 'later:' .. Q, start, start + left - 1)) do
    local packed = call('HGET', P .. 'parked:' .. Q, number)
    if packed then found[#found + 1] = {'p', number, cmsgpack.unpack(packed)[2]} end
  end
end
return found
""",
)

PURGE = Script(
    HEAD,
    ALWAYS,
    QUEUES,
    ADD,
    """
-- queue, how many; answers how many were removed, of those that nobody holds, or nothing if there is no such queue
local Q, left = ARGV[2], tonumber(ARGV[3])
if not queue(Q) then return false end
local T = clock()
local count, freed = 0, {}
local behind = call('ZRANGEBYSCORE', P .. 'later:' .. Q, 'inf', 'inf', 'LIMIT', 0, left)
for _, number in ipairs(behind) do  -- first: what is removed in front of them must not set them free
  unpark(Q, number)
  count = count + 1
end
if #behind < left then
  for _, number in ipairs(call('ZRANGE', P .. 'later:' .. Q, 0, left - count - 1)) do
    local _, fields = unpark(Q, number)
    count = count + 1
    if fields then freed[#freed + 1] = fields end
  end
  for _, rank in ipairs(call('SMEMBERS', P .. 'streams:' .. Q)) do
    local key = P .. 'stream:' .. rank .. ':' .. Q
    local groups = redis.pcall('XINFO', 'GROUPS', key)
    if count < left and groups[1] then
      for _, entry in ipairs(call('XRANGE', key, '(' .. groups[1][8], '+', 'COUNT', left - count)) do
        call('XDEL', key, entry[1])
        call('ZREM', P .. 'expiring:' .. Q, rank .. ':' .. entry[1])
        count = count + 1
        freed[#freed + 1] = entry[2]
      end
    end
  end
end
for _, fields in ipairs(freed) do gone(Q, fields, T) end
if count < left and queue(Q).ordered then heal(queue(Q).base, 1000, T) end
call('HINCRBY', P .. 'queue:' .. Q, 'discarded', count)
return count
""",
)

UNBIND = Script(
    HEAD,
    ALWAYS,
    QUEUES,
    """
-- queue, topics …; answers nothing if there is no such queue
local Q = ARGV[2]
if not queue(Q) then return false end
for i = 3, #ARGV do
  call('SREM', P .. 'bound:' .. ARGV[i], Q)
  call('SREM', P .. 'topics:' .. Q, ARGV[i])
  call('SADD', P .. 'unbound:' .. Q, ARGV[i])
end
return 1
""",
)

PAUSE = Script(
    HEAD,
    ALWAYS,
    QUEUES,
    """
-- queue, whether; answers nothing if there is no such queue
if not queue(ARGV[2]) then return false end
if ARGV[3] == '1' then
  call('HSET', P .. 'queue:' .. ARGV[2], 'paused', 1)
else
  call('HDEL', P .. 'queue:' .. ARGV[2], 'paused')
  wake(ARGV[2])
end
return 1
""",
)
