"""The directory's Lua scripts: every change and every look-up of it is one of these, hence atomic.

Keys, all in one slot of a Redis Cluster, `base` being `{PREFIX}:directory:`
  base leases      sorted set: holder -> when its lease runs out, in Redis's milliseconds
  base holder:N    hash: worker, epoch, token, number (of the last sync that was applied)
  base workers     hash: worker -> holder
  base last        the holder drawn last
  base pins:N      stream: pins that holder N is to learn of
  base sweep       hash: at (the next bucket), left (how many are to be visited)
  base b:HHHH      hash, one of BUCKETS: names that start with these hex digits -> their holders

A *holder* is one life of a worker's cache, a small number drawn when it registers. A block's value is a string of
3 bytes for each holder: `holder * 4 + tier`. A holder without a living lease holds nothing, whatever the buckets say.

Small hashes are kept by Redis as flat lists, 23 bytes a block with one holder: as long as no hash has more than 512
entries (HASH_ENTRIES_MAX of Redis: so up to 33 million blocks) and no value more than 64 bytes: hence HOLDERS_MAX.
"""

from dataclasses import dataclass
from hashlib import sha1

NAMES_MAX = 512
"""In one call: about a millisecond of Redis's time."""
HOLDERS_MAX = 21
"""Of one block that are remembered; further ones are not, until one of these goes."""
BUCKET_DIGITS = 4
HOLDER_BYTES = 3
HOLDERS = 2 ** (8 * HOLDER_BYTES - 2)
"""Then the numbers begin anew, without those that are alive; by then the sweep has long cleaned up after the others."""
NO_NEWS = 255
"""Instead of a count of copies: this worker held the block before."""
PINS_WAITING_MAX = 256
"""Calls to pin that a holder has not learnt of; past it they are refused."""
PINS_TOLD_MAX = 64
"""In one answer; the others come with the next."""
SWEEP_BUCKETS_MAX = 256
"""In one call, whatever they hold."""

COMMON = """
local leases, base = KEYS[1], ARGV[1]
local function clock(given)
  if given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local now = clock(ARGV[2])
local living = {}
local function is_alive(holder)
  local known = living[holder]
  if known == nil then
    local until_ms = redis.call('ZSCORE', leases, string.format('%d', holder))
    known = until_ms and tonumber(until_ms) > now
    living[holder] = known
  end
  return known
end
local function renew(holder, until_ms)
  redis.call('ZADD', leases, string.format('%.0f', until_ms), holder)
end
local function bucket_of(name)
  local digits = string.format('%02x%02x%02x', string.byte(name, 1, 3))
  return base .. 'b:' .. string.sub(digits, 1, $DIGITS), string.sub(name, 1 + math.floor($DIGITS / 2))
end
local function coded(holder, tier)
  local code = holder * 4 + tier
  return string.char(math.floor(code / 65536), math.floor(code / 256) % 256, code % 256)
end
local function decoded(value, at)
  local high, middle, low = string.byte(value, at, at + 2)
  local code = high * 65536 + middle * 256 + low
  return math.floor(code / 4), code % 4
end
local function forget(holder)
  local worker = redis.call('HGET', base .. 'holder:' .. holder, 'worker')
  if worker and redis.call('HGET', base .. 'workers', worker) == holder then
    redis.call('HDEL', base .. 'workers', worker)
  end
  redis.call('DEL', base .. 'holder:' .. holder, base .. 'pins:' .. holder)
  redis.call('ZREM', leases, holder)
  redis.call('HSET', base .. 'sweep', 'left', $BUCKETS)
end
"""
"""ARGV: base, the time in ms (empty: Redis's own), then each script's."""

REGISTER = """
local worker, epoch, token, is_fresh, lease_ms = ARGV[3], ARGV[4], ARGV[5], ARGV[6] == '1', tonumber(ARGV[7])
local current = redis.call('HGET', base .. 'workers', worker)
if current then
  local other_life = redis.call('HGET', base .. 'holder:' .. current, 'epoch') ~= epoch
  if other_life and not is_fresh and is_alive(current) then return {'replaced', now} end
  forget(current)
end
local holder
repeat
  holder = string.format('%d', redis.call('INCR', base .. 'last') % $HOLDERS)
until not redis.call('ZSCORE', leases, holder)
renew(holder, now + lease_ms)
redis.call('HSET', base .. 'workers', worker, holder)
redis.call('HSET', base .. 'holder:' .. holder, 'worker', worker, 'epoch', epoch, 'token', token, 'number', 0)
return {'registered', now, tonumber(holder)}
"""
"""A worker's next life takes over from the one before; a life that was taken over from does not take it back."""

SYNC = """
local holder, token, number = ARGV[3], ARGV[4], tonumber(ARGV[5])
local as_of, lease_ms, seen, budget = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[9])
local own = tonumber(holder)
local known = redis.call('HMGET', base .. 'holder:' .. holder, 'token', 'number')
if known[1] ~= token or not is_alive(holder) then return {'unknown', now} end
local last = tonumber(known[2])
if number > last + 1 then return {'unknown', now} end
if number <= last then return {'again', now} end
local until_ms = math.min(now, as_of) + lease_ms
if until_ms <= now then return {'unknown', now} end
redis.call('HSET', base .. 'holder:' .. holder, 'number', ARGV[5])
renew(holder, until_ms)

local function others(value)
  local kept, mine = {}, false
  for at = 1, #value, 3 do
    local each = decoded(value, at)
    if each == own then mine = true elseif is_alive(each) then kept[#kept + 1] = string.sub(value, at, at + 2) end
  end
  return kept, mine
end
local counts = {}
local function assign(names, tier)
  local code = coded(own, tier)
  for at = 1, #names, 16 do
    local bucket, field = bucket_of(string.sub(names, at, at + 15))
    local value = redis.call('HGET', bucket, field)
    local kept, mine = {}, value == code
    if value and not mine then kept, mine = others(value) end -- most often there is nobody else
    counts[#counts + 1] = string.char(mine and $NO_NEWS or #kept)
    if #kept < $HOLDERS_MAX then kept[#kept + 1] = code end
    local made = table.concat(kept)
    if value ~= made then redis.call('HSET', bucket, field, made) end
  end
end
local function remove(names)
  for at = 1, #names, 16 do
    local bucket, field = bucket_of(string.sub(names, at, at + 15))
    local value = redis.call('HGET', bucket, field)
    if value then
      local made = table.concat((others(value)))
      if made == '' then redis.call('HDEL', bucket, field)
      elseif made ~= value then redis.call('HSET', bucket, field, made) end
    end
  end
end
for tier = 0, 2 do assign(ARGV[10 + tier], tier) end
remove(ARGV[13])

local function sweep_bucket(bucket)
  local entries = redis.call('HGETALL', bucket)
  for at = 1, #entries, 2 do
    local value, kept = entries[at + 1], {}
    for place = 1, #value, 3 do
      if is_alive((decoded(value, place))) then kept[#kept + 1] = string.sub(value, place, place + 2) end
    end
    local made = table.concat(kept)
    if made == '' then redis.call('HDEL', bucket, entries[at])
    elseif made ~= value then redis.call('HSET', bucket, entries[at], made) end
  end
  return #entries / 2
end
if budget > 0 then
  for _, dead in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', string.format('%.0f', now), 'LIMIT', 0, 8)) do
    forget(dead)
  end
  local state = redis.call('HMGET', base .. 'sweep', 'at', 'left')
  local at, left, visited = tonumber(state[1] or 0), tonumber(state[2] or 0), 0
  if left > 0 then
    while left > 0 and budget > 0 and visited < $SWEEP_BUCKETS_MAX do
      budget = budget - sweep_bucket(base .. 'b:' .. string.format('%0$DIGITSx', at))
      at, left, visited = (at + 1) % $BUCKETS, left - 1, visited + 1
    end
    redis.call('HSET', base .. 'sweep', 'at', at, 'left', left)
  end
end

local pins, waiting = {}, base .. 'pins:' .. holder
if seen ~= '' then
  for _, entry in ipairs(redis.call('XRANGE', waiting, '(' .. seen, '+', 'COUNT', $PINS_TOLD_MAX)) do
    pins[#pins + 1] = {entry[1], entry[2][2], entry[2][4]}
  end
  redis.call('XTRIM', waiting, 'MINID', seen)
end
return {'ok', now, table.concat(counts), pins}
"""
"""Everything that a living worker tells, and is told. Syncs are numbered from 1: one that is done again changes
nothing, and after one that Redis has lost (a failover to a replica that lagged) the holder counts as unknown.

The lease runs from `as_of`, when what the sync tells was true, so that a sync which was long on its way does not
lengthen the time for which the directory may be wrong.
"""

LEAVE = """
local holder, token = ARGV[3], ARGV[4]
if redis.call('HGET', base .. 'holder:' .. holder, 'token') == token then forget(holder) end
"""

LOOK_UP = """
local names, found, workers, seen = ARGV[3], {}, {}, {}
for at = 1, #names, 16 do
  local bucket, field = bucket_of(string.sub(names, at, at + 15))
  local value, kept = redis.call('HGET', bucket, field) or '', {}
  for place = 1, #value, 3 do
    local holder = decoded(value, place)
    if is_alive(holder) then
      kept[#kept + 1] = string.sub(value, place, place + 2)
      if not seen[holder] then
        seen[holder] = true
        workers[#workers + 1] = {holder, redis.call('HGET', base .. 'holder:' .. holder, 'worker')}
      end
    end
  end
  found[#found + 1] = string.char(#kept) .. table.concat(kept)
end
return {table.concat(found), workers}
"""
"""Changes nothing: what is dead is left to the syncs."""

PIN = """
local worker, ttl_ms, names = ARGV[3], tonumber(ARGV[4]), ARGV[5]
local holder = redis.call('HGET', base .. 'workers', worker)
if not holder or not is_alive(holder) then return '' end
local pins, own = base .. 'pins:' .. holder, tonumber(holder)
if redis.call('XLEN', pins) >= $PINS_WAITING_MAX then return '' end
local tiers, held = {}, {}
for at = 1, #names, 16 do
  local name = string.sub(names, at, at + 15)
  local bucket, field = bucket_of(name)
  local value, there = redis.call('HGET', bucket, field) or '', 0
  for place = 1, #value, 3 do
    local each, tier = decoded(value, place)
    if each == own then there = tier + 1 end
  end
  tiers[#tiers + 1] = string.char(there)
  if there > 0 then held[#held + 1] = name end
end
if #held > 0 then
  redis.call('XADD', pins, '*', 'until_ms', string.format('%.0f', now + ttl_ms), 'names', table.concat(held))
  redis.call('PEXPIRE', pins, ttl_ms + 60000)
end
return table.concat(tiers)
"""
"""In what tier each lies, as 1 to 3, 0: in none. Empty: the worker is not there, or has not learnt of many earlier
pins."""


@dataclass(frozen=True, slots=True)
class Script:
    source: str
    sha: str


@dataclass(frozen=True, slots=True)
class Scripts:
    register: Script
    sync: Script
    leave: Script
    look_up: Script
    pin: Script


def scripts(bucket_digits: int = BUCKET_DIGITS) -> Scripts:
    """For `16 ** bucket_digits` buckets, up to six digits. All who share a directory must agree on it."""
    return Scripts(*(_script(body, bucket_digits) for body in (REGISTER, SYNC, LEAVE, LOOK_UP, PIN)))


def _script(body: str, bucket_digits: int) -> Script:
    source = COMMON + body
    values = {
        "$DIGITS": bucket_digits,
        "$BUCKETS": 16**bucket_digits,
        "$NO_NEWS": NO_NEWS,
        "$HOLDERS_MAX": HOLDERS_MAX,
        "$HOLDERS": HOLDERS,
        "$SWEEP_BUCKETS_MAX": SWEEP_BUCKETS_MAX,
        "$PINS_TOLD_MAX": PINS_TOLD_MAX,
        "$PINS_WAITING_MAX": PINS_WAITING_MAX,
    }
    for name, value in values.items():
        source = source.replace(name, str(value))
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest())


SCRIPTS = scripts()
