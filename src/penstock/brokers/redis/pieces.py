"""What happens in Redis, as scripts: each is carried out whole, with nothing in between.

All keys of a namespace begin with its prefix P, a hash tag, so that they are on one node of a cluster:

    queues              set: names                     queue:Q     hash: ordered base max paused expired discarded
    bound:T             set: queues bound to topic T   topics:Q    set: topics that queue Q is bound to
    unbound:Q           set: topics that queue Q was unbound from: whoever declared them must declare them anew
    stream:R:Q          stream of rank R, group `penstock`; entries: m(eta) b(ody) [x expires at] [k key] [r lost]
    streams:Q           set: ranks that have a stream  ready:Q     zset: ranks that may have something to hand out
    parked:Q            hash: what waits outside the streams, by number: delayed, or behind another of its key
    later:Q             zset: its numbers, by the time they are due (inf: not before the one in front is done)
    expiring:Q          zset: what expires if nobody takes it, "R:id" or "p:number"
    busy:B              hash: keys of which something is on its way, for the ordered queue B and its lanes, and where
                        that is, "R:id:Q" or "p:number:Q"
    line:B:K            list: what waits behind it
    alive               zset: consumers by the time they count as dead     consumers   hash: what each one consumes
    consumers:Q         set: consumers of a queue      idle        hash: queues at which somebody waits
    recalled            hash: consumers that compared what they hold, to how often
    spared              hash: consumers that were not taken for dead once

A rank is twice the priority, and one more for what was given back: it goes before what is still new.
"""

from __future__ import annotations

HEAD = """
local P, C = KEYS[1], ARGV[1]
local G = 'penstock'
local call = redis.call
local function clock()
  local t = call('TIME')
  return t[1] + t[2] / 1000000
end
"""

# A first write that is allowed without memory left makes all further ones of the script allowed.
ALWAYS = "call('DEL', P .. 'nothing')\n"

# One that is not allowed then, and does nothing: a script that adds something is refused before it has begun.
IF_THERE_IS_ROOM = "call('SETRANGE', P .. 'nothing', 0, '')\n"

QUEUES = """
local known = {}
local function queue(Q)
  local found = known[Q]
  if found == nil then
    local said = call('HMGET', P .. 'queue:' .. Q, 'ordered', 'base', 'max')
    found = said[1] and {ordered = said[1] == '1', base = said[2], max = tonumber(said[3] or '')} or false
    known[Q] = found
  end
  return found
end
local function wake(Q)
  if call('HDEL', P .. 'idle', Q) == 1 then call('PUBLISH', C .. 'wake:' .. Q, '') end
end
local function field(fields, name)
  for i = 5, #fields, 2 do
    if fields[i] == name then return fields[i + 1], i end
  end
end
"""

ADD = """
-- What a message is in a queue, where only an ordered one has keys.
local function entry(Q, expires, key, meta, body)
  local fields = {'m', meta, 'b', body}
  if expires ~= '' then fields[5], fields[6] = 'x', expires end
  if key ~= '' and queue(Q).ordered then
    fields[#fields + 1] = 'k'
    fields[#fields + 1] = key
  end
  return fields
end
local ready = {}
local function hold(Q, key, place)
  local known = queue(Q)
  if known then call('HSET', P .. 'busy:' .. known.base, key, place .. ':' .. Q) end
end
local function add(Q, rank, fields)
  local key = P .. 'stream:' .. rank .. ':' .. Q
  if not ready[key] then
    ready[key] = true
    if call('SADD', P .. 'streams:' .. Q, rank) == 1 then
      redis.pcall('XGROUP', 'CREATE', key, G, '0', 'MKSTREAM')
    end
    call('ZADD', P .. 'ready:' .. Q, rank, rank)
  end
  local id = call('XADD', key, '*', unpack(fields))
  if #fields > 4 then
    local expires, key = field(fields, 'x'), field(fields, 'k')
    if expires then call('ZADD', P .. 'expiring:' .. Q, expires, rank .. ':' .. id) end
    if key then hold(Q, key, rank .. ':' .. id) end
  end
end
local function park(Q, rank, fields, due, behind)
  local number = string.format('%016d', call('INCR', P .. 'parkings'))
  call('HSET', P .. 'parked:' .. Q, number, cmsgpack.pack({rank, fields, due or 0}))
  call('ZADD', P .. 'later:' .. Q, behind and 'inf' or due, number)
  local expires = field(fields, 'x')
  if expires then call('ZADD', P .. 'expiring:' .. Q, expires, 'p:' .. number) end
  local key = not behind and field(fields, 'k')
  if key then hold(Q, key, 'p:' .. number) end
  return number
end
local function unpark(Q, number)
  local packed = call('HGET', P .. 'parked:' .. Q, number)
  if not packed then return end
  call('HDEL', P .. 'parked:' .. Q, number)
  call('ZREM', P .. 'later:' .. Q, number)
  call('ZREM', P .. 'expiring:' .. Q, 'p:' .. number)
  local said = cmsgpack.unpack(packed)
  return said[1], said[2], said[3]
end
local function expired(Q) call('HINCRBY', P .. 'queue:' .. Q, 'expired', 1) end
-- The one in front is done: the next of its key may go.
local function advance(base, key, T)
  local line = P .. 'line:' .. #base .. ':' .. base .. ':' .. key
  while true do
    local place = call('LPOP', line)
    if not place then
      call('HDEL', P .. 'busy:' .. base, key)
      return
    end
    local number, Q = place:sub(1, 16), place:sub(17)
    local rank, fields, due = unpark(Q, number)
    if rank then
      local expires = field(fields, 'x')
      if expires and tonumber(expires) <= T then
        expired(Q)
      else
        if due > T then park(Q, rank, fields, due) else add(Q, rank, fields) end
        wake(Q)
        return
      end
    end
  end
end
local function gone(Q, fields, T)
  local key = field(fields, 'k')
  if key then advance(queue(Q).base, key, T) end
end
-- Whether what holds a key has vanished: somebody deleted a stream, say.
local function vanished(held)
  local rank, id, Q = held:match('^(%w+):([%d-]+):(.*)$')
  if not rank then return false end
  if rank == 'p' then return call('HEXISTS', P .. 'parked:' .. Q, id) == 0 end
  return #call('XRANGE', P .. 'stream:' .. rank .. ':' .. Q, id, id) == 0
end
-- Let go on what waits behind something that has vanished, of some keys.
local function heal(base, some, T)
  local busy = call('HRANDFIELD', P .. 'busy:' .. base, some, 'WITHVALUES')
  for n = 1, #busy, 2 do
    if vanished(busy[n + 1]) then advance(base, busy[n], T) end
  end
end
-- Into a queue, where something of its key may have to be waited for. `stays`: it had its turn already.
local function enter(Q, rank, fields, due, stays)
  local key = field(fields, 'k')
  if key and not stays then
    local base = queue(Q).base
    local held = call('HGET', P .. 'busy:' .. base, key)
    if held then
      call('RPUSH', P .. 'line:' .. #base .. ':' .. base .. ':' .. key, park(Q, rank, fields, due, true) .. Q)
      if vanished(held) then advance(base, key, clock()) end
      return
    end
  end
  if due then park(Q, rank, fields, due) else add(Q, rank, fields) end
end
"""

SWEEP = """
-- End the delays that are over and drop what has expired, some of each.
local function sweep(Q, T)
  for _, place in ipairs(call('ZRANGEBYSCORE', P .. 'expiring:' .. Q, '-inf', T, 'LIMIT', 0, 200)) do
    call('ZREM', P .. 'expiring:' .. Q, place)
    local rank, id = place:match('^(.-):(.*)$')
    if rank == 'p' then
      local due = call('ZSCORE', P .. 'later:' .. Q, id)
      local _, fields = unpark(Q, id)
      if fields then
        expired(Q)
        if due ~= 'inf' then gone(Q, fields, T) end
      end
    else
      local key = P .. 'stream:' .. rank .. ':' .. Q
      local found = call('XRANGE', key, id, id)
      if found[1] then
        call('XDEL', key, id)
        expired(Q)
        gone(Q, found[1][2], T)
      end
    end
  end
  for _, number in ipairs(call('ZRANGEBYSCORE', P .. 'later:' .. Q, '-inf', T, 'LIMIT', 0, 200)) do
    local rank, fields = unpark(Q, number)
    if rank then add(Q, rank, fields) end
  end
end
"""

LENGTH = """
local function length(Q)
  local count = call('HLEN', P .. 'parked:' .. Q)
  for _, rank in ipairs(call('SMEMBERS', P .. 'streams:' .. Q)) do
    count = count + call('XLEN', P .. 'stream:' .. rank .. ':' .. Q)
  end
  return count
end
"""

CONSUMERS = """
-- Give back what a consumer holds, and forget it.
local function leave(consumer, dead, T)
  local said = call('HGET', P .. 'consumers', consumer)
  local names = said and cmsgpack.unpack(said) or {}
  for i = 2, #names do
    local Q = names[i]
    call('SREM', P .. 'consumers:' .. Q, consumer)
    for _, rank in ipairs(call('SMEMBERS', P .. 'streams:' .. Q)) do
      local key = P .. 'stream:' .. rank .. ':' .. Q
      local back = rank - rank % 2 + 1
      local held = redis.pcall('XPENDING', key, G, '-', '+', 500, consumer)
      while #held > 0 do
        for _, one in ipairs(held) do
          local found = call('XRANGE', key, one[1], one[1])
          if found[1] then
            local fields = found[1][2]
            if dead and fields[3] == 'b' then
              -- Counted; and what was taken in time expires no more.
              local kept = {fields[1], fields[2], fields[3], fields[4], 'r', (field(fields, 'r') or 0) + 1}
              local mine = field(fields, 'k')
              if mine then kept[7], kept[8] = 'k', mine end
              fields = kept
            end
            add(Q, back, fields)
          end
          call('XACK', key, G, one[1])
          call('XDEL', key, one[1])
        end
        held = call('XPENDING', key, G, '-', '+', 500, consumer)
      end
      redis.pcall('XGROUP', 'DELCONSUMER', key, G, consumer)
    end
    wake(Q)
  end
  for _, all in ipairs({'consumers', 'recalled', 'spared'}) do call('HDEL', P .. all, consumer) end
  call('ZREM', P .. 'alive', consumer)
end
-- Take over from those who have been silent for their lease; seconds until the next one will have been.
local function bury(T)
  local last = tonumber(call('GET', P .. 'looked') or '0')
  call('SET', P .. 'looked', T)
  for _, consumer in ipairs(call('ZRANGEBYSCORE', P .. 'alive', '-inf', T)) do
    local said = call('HGET', P .. 'consumers', consumer)
    local lease = said and cmsgpack.unpack(said)[1] or 0
    if T - last > lease * 2 / 3 and call('HSETNX', P .. 'spared', consumer, T) == 1 then
      call('ZADD', P .. 'alive', T + lease, consumer)  -- nobody was heard: the server itself may have been away
    else
      -- What cannot be done, for somebody else's data under our keys say, must not keep the others from beating.
      if not pcall(leave, consumer, true, T) then call('ZADD', P .. 'alive', T + math.max(lease, 1), consumer) end
    end
  end
  local first = call('ZRANGE', P .. 'alive', 0, 0, 'WITHSCORES')
  return tostring(first[2] and first[2] - T or 3600)
end
"""
