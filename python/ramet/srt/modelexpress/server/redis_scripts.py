"""Owns what runs inside Redis: the Lua scripts that list, change and remove records in one step each."""

# The live summary of a rank: its own field, or for records of the first reference servers, what the record says.
LIVE_SUMMARY = """
local function live_summary(key, rank)
  local text = redis.call('HGET', key, 'status:' .. rank)
  if text then return text end
  local record = cjson.decode(redis.call('HGET', key, rank))
  return cjson.encode({worker_rank = record.worker_rank, status = record.status or 0,
                       updated_at = record.updated_at or 0, accelerator = record.accelerator or ''})
end
local function ranks(key)
  local found = {}
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.sub(field, 1, 7) ~= 'status:' then found[#found + 1] = field end
  end
  return found
end
"""

# KEYS: source keys. Answers one text per source: a msgpack array of its attributes, and then worker id and summary, in
# turns, of every rank. Packed, a thousand rows cost Redis a quarter of the time that joining them by Lua's
# table.concat takes, and they are read much faster than a thousand texts. A worker with one rank, the usual case, costs
# no look into its record.
LIST = (
    LIVE_SUMMARY
    + """
local answer = {}
for _, source in ipairs(KEYS) do
  local fields, rows = redis.call('HGETALL', source), {''}
  local function add(worker_id, summary)
    rows[#rows + 1] = worker_id
    rows[#rows + 1] = summary
  end
  for i = 1, #fields, 2 do
    local worker_id, summary = fields[i], fields[i + 1]
    if worker_id == '__attributes__' then
      rows[1] = summary
    else
      local key = source .. ':' .. worker_id
      local size = redis.call('HLEN', key)
      if size > 0 and size <= 2 and string.sub(summary, 1, 1) == '{' then
        add(worker_id, summary)
      elseif size > 0 then
        for _, rank in ipairs(ranks(key)) do
          local is_readable, live = pcall(live_summary, key, rank)
          if is_readable then add(worker_id, live) end
        end
      end
    end
  end
  answer[#answer + 1] = cmsgpack.pack(rows)
end
return answer
"""
)

# KEYS: worker, source. ARGV: worker id, rank, new status, new time, new load or '', and, unless '', the status and time
# that the record must still have. Answers whether the record was there and changed.
UPDATE = (
    LIVE_SUMMARY
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then return 0 end
local summary = cjson.decode(live_summary(KEYS[1], ARGV[2]))
if ARGV[6] ~= '' and (summary.status ~= tonumber(ARGV[6]) or summary.updated_at ~= tonumber(ARGV[7])) then return 0 end
summary.status = tonumber(ARGV[3])
summary.updated_at = tonumber(ARGV[4])
summary.source_load = tonumber(ARGV[5])
local text = cjson.encode(summary)
redis.call('HSET', KEYS[1], 'status:' .. ARGV[2], text)
local shown = redis.call('HGET', KEYS[2], ARGV[1])
local shown_rank = nil
if shown then
  shown_rank = tonumber(shown)
  if string.sub(shown, 1, 1) == '{' then shown_rank = cjson.decode(shown).worker_rank end
end
if shown_rank == nil or shown_rank == tonumber(ARGV[2]) then redis.call('HSET', KEYS[2], ARGV[1], text) end
return 1
"""
)

# KEYS: worker, source. ARGV: worker id, rank, and the status and time that the record must still have.
REMOVE = (
    LIVE_SUMMARY
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then return 0 end
local summary = cjson.decode(live_summary(KEYS[1], ARGV[2]))
if summary.status ~= tonumber(ARGV[3]) or summary.updated_at ~= tonumber(ARGV[4]) then return 0 end
redis.call('HDEL', KEYS[1], ARGV[2], 'status:' .. ARGV[2])
local left = ranks(KEYS[1])
if #left > 0 then
  redis.call('HSET', KEYS[2], ARGV[1], live_summary(KEYS[1], left[1]))
else
  redis.call('DEL', KEYS[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
end
local size = redis.call('HLEN', KEYS[2])
local attributes = redis.call('HEXISTS', KEYS[2], '__attributes__')
if size <= attributes then redis.call('DEL', KEYS[2]) end
return 1
"""
)
