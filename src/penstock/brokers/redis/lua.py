"""What happens in Redis, as scripts: each is carried out whole, with nothing in between. `pieces` tells the keys."""

from __future__ import annotations

from penstock.brokers.redis.pieces import ADD, ALWAYS, CONSUMERS, HEAD, IF_THERE_IS_ROOM, LENGTH, QUEUES, SWEEP
from penstock.redis.link import Script

DECLARE = Script(
    HEAD,
    ALWAYS,
    """
-- name, ordered, lane of, max length, whether only what was lost is to be made again, topics …; answers how it is
-- ordered if that is otherwise
local Q, ordered = ARGV[2], ARGV[3]
local found = call('HGET', P .. 'queue:' .. Q, 'ordered')
if found and found ~= ordered then return found end
if not found then
  local base = ARGV[4] ~= '' and call('EXISTS', P .. 'queue:' .. ARGV[4]) == 1 and ARGV[4] or Q
  call('HSET', P .. 'queue:' .. Q, 'ordered', ordered, 'base', base)
  if ARGV[5] ~= '' then call('HSET', P .. 'queue:' .. Q, 'max', ARGV[5]) end
  call('SADD', P .. 'queues', Q)
end
for i = 7, #ARGV do
  if ARGV[6] == '0' or call('SISMEMBER', P .. 'unbound:' .. Q, ARGV[i]) == 0 then
    call('SADD', P .. 'bound:' .. ARGV[i], Q)
    call('SADD', P .. 'topics:' .. Q, ARGV[i])
    call('SREM', P .. 'unbound:' .. Q, ARGV[i])
  end
end
return ''
""",
)

PUBLISH = Script(
    HEAD,
    IF_THERE_IS_ROOM,
    QUEUES,
    ADD,
    SWEEP,
    LENGTH,
    """
-- topic, rank, delay, expires at, key, meta, body …, or all of it packed; answers {index, full queue or '', its limit}
-- for each refused
local ARGV = #ARGV == 2 and cmsgpack.unpack(ARGV[2]) or ARGV
local T = clock()
local bound, room, woken, refused = {}, {}, {}, {}
for i = 2, #ARGV, 7 do
  local topic = ARGV[i]
  local targets = bound[topic]
  if not targets then
    targets = call('SMEMBERS', P .. 'bound:' .. topic)
    bound[topic] = targets
  end
  local full
  for _, Q in ipairs(targets) do
    local limit = queue(Q).max
    if limit and not room[Q] then
      sweep(Q, T)
      room[Q] = limit - length(Q)
    end
    if limit and room[Q] <= 0 then full = Q end
  end
  if #targets == 0 then
    refused[#refused + 1] = {(i - 2) / 7, '', 0}
  elseif full then
    refused[#refused + 1] = {(i - 2) / 7, full, queue(full).max}
  else
    local delay = tonumber(ARGV[i + 2])
    for _, Q in ipairs(targets) do
      local fields = entry(Q, ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], ARGV[i + 6])
      if room[Q] then room[Q] = room[Q] - 1 end
      enter(Q, ARGV[i + 1], fields, delay > 0 and T + delay)
      woken[Q] = true
    end
  end
end
for Q in pairs(woken) do wake(Q) end
return refused
""",
)

JOIN = Script(
    HEAD,
    ALWAYS,
    QUEUES,
    ADD,
    CONSUMERS,
    """
-- consumer, lease, queues …; answers a queue that there is not, or {seconds until somebody may be overdue}
local T = clock()
local consumer, lease = ARGV[2], tonumber(ARGV[3])
for i = 4, #ARGV do
  if not queue(ARGV[i]) then return ARGV[i] end
end
local pause = bury(T)
local said = {lease}
for i = 4, #ARGV do
  said[#said + 1] = ARGV[i]
  call('SADD', P .. 'consumers:' .. ARGV[i], consumer)
end
call('HSET', P .. 'consumers', consumer, cmsgpack.pack(said))
call('ZADD', P .. 'alive', T + lease, consumer)
return {pause}
""",
)

BEAT = Script(
    HEAD,
    ALWAYS,
    QUEUES,
    ADD,
    CONSUMERS,
    """
-- consumer, lease; answers nothing if it was given up for dead, else seconds until somebody may be overdue
local T = clock()
if not call('ZSCORE', P .. 'alive', ARGV[2]) then return false end
call('ZADD', P .. 'alive', T + ARGV[3], ARGV[2])
call('HDEL', P .. 'spared', ARGV[2])
return bury(T)
""",
)

LEAVE = Script(HEAD, ALWAYS, QUEUES, ADD, CONSUMERS, "leave(ARGV[2], false, clock())\n")

CLAIM = Script(
    HEAD,
    ALWAYS,
    QUEUES,
    ADD,
    SWEEP,
    """
-- consumer, its last recall, how many, how many bytes, queues …; answers nothing if it was given up for dead, else
-- {seconds until a delay ends or '', {number of the queue, rank, entries} …}
local consumer, left, bytes = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
if not call('ZSCORE', P .. 'alive', consumer) then return false end
local T = clock()
local found = {''}
local budget = 1000  -- of what has expired, so that others are served in between
if tonumber(call('HGET', P .. 'recalled', consumer) or 0) > tonumber(ARGV[3]) then return found end  -- nobody hears it
local function read(key, count)
  local got = redis.pcall('XREADGROUP', 'GROUP', G, consumer, 'COUNT', count, 'STREAMS', key, '>')
  if got and got.err then
    if not got.err:find('NOGROUP') then return nil, got end
    call('XGROUP', 'CREATE', key, G, '0', 'MKSTREAM')
    got = call('XREADGROUP', 'GROUP', G, consumer, 'COUNT', count, 'STREAMS', key, '>')
  end
  return got and got[1][2] or {}
end
for i = 6, #ARGV do
  if left <= 0 or bytes <= 0 or budget <= 0 then break end
  local Q = ARGV[i]
  sweep(Q, T)
  if not call('HGET', P .. 'queue:' .. Q, 'paused') then
    for _, rank in ipairs(call('ZREVRANGE', P .. 'ready:' .. Q, 0, -1)) do
      local key = P .. 'stream:' .. rank .. ':' .. Q
      local step = 16
      while left > 0 and bytes > 0 and budget > 0 do
        local asked = math.min(step, left)
        local entries, failure = read(key, asked)
        if failure then return failure end
        local count = #entries
        local dry = count < asked
        if dry then
          call('ZREM', P .. 'ready:' .. Q, rank)
          ready[key] = nil
        end
        local kept = entries
        for n = 1, count do
          local fields = entries[n][2]
          local late = false
          if #fields > 4 then
            local expires = field(fields, 'x')
            if expires then
              call('ZREM', P .. 'expiring:' .. Q, rank .. ':' .. entries[n][1])
              late = tonumber(expires) <= T
            end
          end
          if late then
            if kept == entries then
              kept = {}
              for m = 1, n - 1 do kept[m] = entries[m] end
            end
            call('XACK', key, G, entries[n][1])
            call('XDEL', key, entries[n][1])
            expired(Q)
            gone(Q, fields, T)
            budget = budget - 1
          else
            if kept ~= entries then kept[#kept + 1] = entries[n] end
            bytes = bytes - #(fields[4] or '')
          end
        end
        if #kept > 0 then
          left = left - #kept
          found[#found + 1] = {i - 6, rank, kept}
        end
        if dry then break end
        step = step * 2
      end
      if left <= 0 or bytes <= 0 or budget <= 0 then break end
    end
  end
end
if #found == 1 then
  local soonest = budget <= 0 and T or nil
  for i = 6, #ARGV do
    local Q = ARGV[i]
    if (queue(Q) or {}).ordered then heal(queue(Q).base, 10, T) end
    call('HSET', P .. 'idle', Q, 1)
    if not call('HGET', P .. 'queue:' .. Q, 'paused') then
      local times = {call('ZRANGE', P .. 'later:' .. Q, 0, 0, 'WITHSCORES')}
      if (queue(Q) or {}).ordered then times[2] = call('ZRANGE', P .. 'expiring:' .. Q, 0, 0, 'WITHSCORES') end
      for _, first in ipairs(times) do
        local at = tonumber(first[2] or 'inf')
        if at and at < math.huge and (not soonest or at < soonest) then soonest = at end
      end
      if call('ZCARD', P .. 'ready:' .. Q) > 0 then soonest = T end  -- set free after we had looked there
    end
  end
  if soonest then found[1] = tostring(math.max(soonest - T, 0)) end
end
return found
""",
)

RECALL = Script(
    HEAD,
    ALWAYS,
    """
-- consumer, its number of recalls, how many queues, queues …, what it knows that it holds, as "id rank:queue" …; all
-- else that it holds, as CLAIM answers it. A claim that was made before and is still on its way finds nothing any more.
local consumer, last = ARGV[2], 4 + ARGV[4]
if not call('ZSCORE', P .. 'alive', consumer) then return false end
if tonumber(call('HGET', P .. 'recalled', consumer) or 0) < tonumber(ARGV[3]) then
  call('HSET', P .. 'recalled', consumer, ARGV[3])
end
local known, found = {}, {''}
for i = last + 1, #ARGV do known[ARGV[i]] = true end
for i = 5, last do
  for _, rank in ipairs(call('SMEMBERS', P .. 'streams:' .. ARGV[i])) do
    local key, entries = P .. 'stream:' .. rank .. ':' .. ARGV[i], {}
    local held = redis.pcall('XPENDING', key, G, '-', '+', 500, consumer)
    while #held > 0 do
      for _, one in ipairs(held) do
        if not known[one[1] .. ' ' .. rank .. ':' .. ARGV[i]] then
          local there = call('XRANGE', key, one[1], one[1])[1]
          entries[#entries + 1] = {one[1], there and there[2] or false}
        end
      end
      held = call('XPENDING', key, G, '(' .. held[#held][1], '+', 500, consumer)
    end
    if #entries > 0 then found[#found + 1] = {i - 5, rank, entries} end
  end
end
return found
""",
)

ACK = Script(
    HEAD,
    """
-- consumer, {rank:queue, how many, ids …} …; answers how many were there, or nothing if it was given up for dead
if not call('ZSCORE', P .. 'alive', ARGV[2]) then return false end
local i, done = 3, 0
while i <= #ARGV do
  local key, last = P .. 'stream:' .. ARGV[i], i + 1 + ARGV[i + 1]
  i = i + 2
  while i <= last do
    local upto = math.min(i + 999, last)
    done = done + call('XACK', key, G, unpack(ARGV, i, upto))
    call('XDEL', key, unpack(ARGV, i, upto))
    i = upto + 1
  end
end
return done
""",
)

SETTLE = Script(
    HEAD,
    ALWAYS,
    QUEUES,
    ADD,
    """
-- consumer, {kind, queue, rank, id, delay, to, new rank, expires at, key, meta, body} …; answers nothing if it was
-- given up for dead, a queue that there is not (then nothing was done), or how many were there
if not call('ZSCORE', P .. 'alive', ARGV[2]) then return false end
for i = 3, #ARGV, 11 do
  if ARGV[i] == 'm' and not queue(ARGV[i + 5]) then return ARGV[i + 5] end
end
local T = clock()
local done, woken = 0, {}
for i = 3, #ARGV, 11 do
  local kind, Q, rank, id = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local delay, to = tonumber(ARGV[i + 4]), ARGV[i + 5]
  local key = P .. 'stream:' .. rank .. ':' .. Q
  local found = call('XRANGE', key, id, id)
  if call('XACK', key, G, id) == 1 then
    done = done + 1
    call('XDEL', key, id)
    local fields = found[1] and found[1][2] or {'m', '', 'b', ''}
    local due = delay > 0 and T + delay
    if kind == 'a' then
      gone(Q, fields, T)
    elseif kind == 'r' then
      if found[1] then enter(Q, due and rank or rank - rank % 2 + 1, fields, due, true) end
      woken[Q] = true
    else
      local moved = entry(to, ARGV[i + 7], ARGV[i + 8], ARGV[i + 9], ARGV[i + 10])
      local mine = field(fields, 'k')
      local stays = mine and mine == field(moved, 'k') and queue(Q).base == queue(to).base
      enter(to, ARGV[i + 6], moved, due, stays)
      if not stays then gone(Q, fields, T) end
      woken[to] = true
    end
  end
end
for Q in pairs(woken) do wake(Q) end
return done
""",
)
