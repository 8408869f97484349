-- The journal: who may run which op, and what came of it. One call is one transition.
--
--   EVALSHA sha 1 <namespace> <verb> <retention_ms> [argument …]
--
-- One primary, no cluster: keys are built here. Time is the server's own. Needs Redis >= 6.2.
-- Every reply is an array; its first item is a word, "error" <JSON of errors.error_to_json> among them.
--
-- Keys, each after "<namespace>:"
--   worker:<wid>   string  JSON about the worker; its life is the lease                        PX lease
--   term:<wid>     string  which lease it is: another number after each lapse                  PX lease
--   workers        set     every wid ever seen whose rests are not yet cleaned up              -
--   sandbox:<sid>  hash    backend placement state owner epoch handle spec create_op queue
--                          created_ms expires_ms cause                         - ; retention once closed or lost
--   sandboxes      zset    sid -> expires_ms, of all that are neither closed nor lost          -
--   owned:<wid>    set     sids pinned to the worker                                           -
--   unowned        set     sids that an owner has left and nobody has taken yet                -
--   op:<oid>       hash    sid kind digest payload body state epoch attempt nonce deadline_ms run_ms created_ms
--                          started_ms finished_ms rung_ms rings bell cancel raw result error ended_by
--                                                                               - ; retention once final
--   open:<sid>     set     ops that are queued or running                                      -
--   live           zset    sid -> ms; a sandbox with open ops that was last looked at then     -
--   cancelling     set     running ops whose cancellation is wanted                            -
--   answers        zset    oid -> ms; ended ops of raw Celery tasks whose answer Celery may lack   -
--   born           hash    server's run id, and ms when it was first seen with this data        -
--   out:<oid>      stream  output "e i s o d", then one end entry "e end r b"   - ; retention once final
--   lock:sweep     string  one janitor at a time                                               PX 900
--   pace:<account> string  ms of the next turn to make a sandbox; in a namespace of its own        PX until then
--   <queue>        list    Celery's own; so are the three _kombu.binding sets touched by clean_worker   -
--   ctl:<wid>      channel op ids to cancel
--
-- Sandbox: creating -> ready -> closing -> closed | lost   (each may also end at once)
-- Op:      queued -> running -> done | failed | cancelled  (running -> running with a higher epoch: adopted)
-- A final op keeps its digest but loses payload and body: secrets must not linger. A closed sandbox loses its spec.
-- Epochs are milliseconds of the server's clock, or one more than the last: so they grow even when Redis forgets the last one,
-- and a runner that remembers it takes the next owner all the same.

local prefix = KEYS[1] .. ':'
local retention_ms = tonumber(ARGV[2])

local call = redis.call
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local FINAL = {done = true, failed = true, cancelled = true}
local GONE = {closed = true, lost = true}
local GRACE_MS = 15000 -- a running op past its deadline is given up this much later, if nobody owns its sandbox
local BEYOND_MS = 120000 -- an entry so long past its end, with no owner to see to it, is closed by whoever sweeps
local CALM_MS = 30000 -- a sandbox whose ops all run under a living owner is looked at this much less often
local ANSWER_MS = 1500 -- whoever waits for a raw task's op has had this long to give Celery its answer
local KOMBU_SEP = '\6\22'

local function key(kind, id)
  return prefix .. kind .. ':' .. id
end

-- The named fields of a hash; what is missing is ''.
local function load(hash, ...)
  local names, record = {...}, {}
  for i, value in ipairs(call('HMGET', hash, ...)) do
    record[names[i]] = value or ''
  end
  return record
end

local function load_op(oid)
  return load(key('op', oid), 'sid', 'kind', 'state', 'epoch', 'nonce', 'deadline_ms', 'rung_ms', 'rings', 'raw')
end

local function load_sandbox(sid)
  local sandbox = load(key('sandbox', sid), 'state', 'owner', 'epoch', 'queue', 'placement', 'cause', 'create_op')
  sandbox.sid = sid
  return sandbox
end

local function alive(wid)
  return wid ~= '' and call('EXISTS', key('worker', wid)) == 1
end

local function fault(class, message)
  return cjson.encode({error = class, args = {message, ''}})
end

local function refuse(class, message)
  return {'error', fault(class, message)}
end

-- Why a sandbox takes no op of this kind: class and message, or nothing if it does.
local function gone(sandbox, kind)
  local sid, cause = sandbox.sid, sandbox.cause
  if sandbox.state == '' then
    return 'SandboxNotFoundError', 'no sandbox ' .. sid .. ' is registered: it was never made, or torn down long ago, '
      .. 'or Redis has just lost its data (then its worker registers it again: ask again in a few seconds)'
  elseif sandbox.state == 'lost' then
    return 'SandboxLostError', 'sandbox ' .. sid .. ' is lost: ' .. cause
  elseif sandbox.state == 'closed' then
    return 'SandboxNotFoundError', 'sandbox ' .. sid .. ' was torn down: ' .. cause
  elseif sandbox.state == 'closing' and kind ~= 'destroy' then
    return 'SandboxNotFoundError', 'sandbox ' .. sid .. ' is being torn down'
  end
end

-- ---------------------------------------------------------------------------------------------- doorbells

-- The queue that reaches the sandbox, and its list's length if nobody has looked yet.
local function bell_queue(sandbox)
  if alive(sandbox.owner) then
    return sandbox.owner .. '.dq2'
  end
  return sandbox.queue
end

-- Ring for one op. The message says it came by the pool queue, so kombu gives it back there when a worker dies.
-- Each ring has a delivery tag of its own: kombu keeps what is delivered by tag.
local function ring(oid, sandbox, queue)
  local op = key('op', oid)
  local bell = call('HGET', op, 'bell')
  if not bell then
    return
  end
  local head, middle, tail = string.match(bell, '^(.-)\n(.-)\n(.*)$')
  local tag = oid .. '.' .. call('HINCRBY', op, 'rings', 1)
  call('HSET', op, 'rung_ms', now)
  call('LPUSH', prefix .. queue, head .. cjson.encode(sandbox.queue) .. middle .. cjson.encode(tag) .. tail)
end

local function ring_all(sandbox, queue, except)
  for _, oid in ipairs(call('SMEMBERS', key('open', sandbox.sid))) do
    if oid ~= except then
      ring(oid, sandbox, queue)
    end
  end
end

-- --------------------------------------------------------------------------------------------- transitions

-- End an op: the only place that makes a final state.
local function settle(oid, op, state, json, body, ended_by)
  local hash, out, open = key('op', oid), key('out', oid), key('open', op.sid)
  call('HSET', hash, 'state', state, 'finished_ms', now, 'ended_by', ended_by or '',
       state == 'failed' and 'error' or 'result', json)
  call('HDEL', hash, 'payload', 'body', 'bell', 'nonce')
  call('XADD', out, '*', 'e', op.epoch, 'end', state, 'r', json, 'b', body or '')
  call('PEXPIRE', hash, retention_ms)
  call('PEXPIRE', out, retention_ms)
  if op.raw ~= '' then
    call('ZADD', prefix .. 'answers', now, oid)
  end
  call('SREM', open, oid)
  call('SREM', prefix .. 'cancelling', oid)
  if call('SCARD', open) == 0 then
    call('ZREM', prefix .. 'live', op.sid)
  end
end

-- End an op whose sandbox is gone. A command that ran has a result even then.
local function settle_gone(oid, op, sandbox)
  if op.kind == 'destroy' and GONE[sandbox.state] then
    settle(oid, op, 'done', '{}')
  elseif op.state == 'running' and op.kind == 'start' then
    settle(oid, op, 'done', cjson.encode({records = {{status = 'sandbox_lost', cause = sandbox.cause}}}))
  elseif op.state == 'running' then
    settle(oid, op, 'failed', fault('SandboxLostError', 'sandbox ' .. sandbox.sid .. ' is lost: ' .. sandbox.cause))
  else
    settle(oid, op, 'failed', fault(gone(sandbox, op.kind)))
  end
end

-- End a sandbox and all its open ops but one.
local function shut(sandbox, state, cause, keep_op)
  local sid = sandbox.sid
  local hash = key('sandbox', sid)
  sandbox.state, sandbox.cause = state, cause
  call('HSET', hash, 'state', state, 'cause', cause)
  call('HDEL', hash, 'spec')
  call('PEXPIRE', hash, retention_ms)
  call('ZREM', prefix .. 'sandboxes', sid)
  call('SREM', prefix .. 'unowned', sid)
  if sandbox.owner ~= '' then
    call('SREM', key('owned', sandbox.owner), sid)
  end
  for _, oid in ipairs(call('SMEMBERS', key('open', sid))) do
    if oid ~= keep_op then
      settle_gone(oid, load_op(oid), sandbox)
    end
  end
end

-- A create op that ended without success leaves no sandbox behind.
local function shut_unmade(oid, op, sandbox, cause)
  if op.kind == 'create' and sandbox.state == 'creating' then
    shut(sandbox, 'closed', cause, oid)
  end
end

-- Why nobody carried an op out in time, and what helps.
local function overdue_message(oid, op, sandbox)
  if sandbox.placement ~= '' and not alive(sandbox.owner) then
    local fate = op.state == 'queued' and 'was never started' or 'was running when its worker went, and may have ended since'
    return "no worker can reach placement '" .. sandbox.placement .. "', where sandbox " .. sandbox.sid .. ' lives: op ' .. oid .. ' '
      .. fate .. '. Start a worker there, for queue ' .. sandbox.queue
  elseif op.state == 'queued' then
    return 'no worker took op ' .. oid .. ' from queue ' .. sandbox.queue .. ' in time: start a worker for that queue, or give more time'
  end
  return 'the worker that ran op ' .. oid .. ' is gone and none took over in time: start a worker for queue ' .. sandbox.queue
end

local function expire(oid, op, sandbox)
  settle(oid, op, 'failed', fault('QueueUnavailableError', overdue_message(oid, op, sandbox)))
  shut_unmade(oid, op, sandbox, 'no worker made it in time')
end

-- Take a sandbox from its owner (alive or not). The epoch stays: the next owner raises it.
local function disown(sandbox)
  call('SREM', key('owned', sandbox.owner), sandbox.sid)
  call('SADD', prefix .. 'unowned', sandbox.sid)
  call('HSET', key('sandbox', sandbox.sid), 'owner', '')
  sandbox.owner = ''
  ring_all(sandbox, sandbox.queue)
  if call('EXISTS', key('open', sandbox.sid)) == 1 then
    call('ZADD', prefix .. 'live', 'LT', now, sandbox.sid)
  end
end

local function disown_all(wid, limit, kept)
  local count = 0
  for _, sid in ipairs(call('SRANDMEMBER', key('owned', wid), limit)) do
    local sandbox = load_sandbox(sid)
    if sandbox.owner ~= wid then
      call('SREM', key('owned', wid), sid)
    elseif not (kept and kept[sid]) then
      disown(sandbox)
      count = count + 1
    end
  end
  return count
end

-- Owner and epoch are those of the caller. The lease is not asked for: nobody else may have begun meanwhile.
local function holds_sandbox(sandbox, wid, epoch)
  return sandbox.state ~= '' and sandbox.owner == wid and sandbox.epoch == epoch
end

local function holds_op(op, wid, epoch)
  return op.state == 'running' and op.epoch == epoch and holds_sandbox(load_sandbox(op.sid), wid, epoch)
end

-- ------------------------------------------------------------------------------------------- verbs: clients

local verbs = {}

function verbs.submit(oid, sid, kind, digest, payload, body, timeout_ms, run_ms, raw, bell, backend, queue, spec, lifetime_ms)
  local hash = key('op', oid)
  local known = call('HMGET', hash, 'state', 'digest')
  if known[1] then
    if known[2] ~= digest then
      return refuse('OperationConflictError', 'op id ' .. oid .. ' is known with another payload: choose a new op id')
    end
    return {'known', known[1]}
  end
  local sandbox = load_sandbox(sid)
  if kind == 'destroy' and sandbox.state == '' then
    -- Redis may have forgotten a sandbox that lives. Its owner must not register it again, but remove it.
    sandbox.state = 'closed'
    call('HSET', key('sandbox', sid), 'state', 'closed', 'cause', 'its user asked for that', 'created_ms', now, 'epoch', 0)
    call('PEXPIRE', key('sandbox', sid), retention_ms)
  end
  local ended = kind == 'destroy' and GONE[sandbox.state] and '{}'
  if kind == 'create' and sandbox.state == 'ready' and sandbox.create_op == '' then
    ended = call('HGET', key('sandbox', sid), 'handle') -- registered again: the op that made it was forgotten
  elseif kind == 'create' then
    if sandbox.state ~= '' then
      return refuse('OperationConflictError', 'sandbox id ' .. sid .. ' is already in use: choose a new sandbox id')
    end
    local expires_ms = now + lifetime_ms
    call('HSET', key('sandbox', sid), 'backend', backend, 'placement', '', 'state', 'creating', 'owner', '', 'epoch', 0,
         'spec', spec, 'create_op', oid, 'queue', queue, 'created_ms', now, 'expires_ms', expires_ms, 'cause', '')
    call('ZADD', prefix .. 'sandboxes', expires_ms, sid)
    sandbox.queue = queue
  elseif not ended then
    local class, message = gone(sandbox, kind)
    if class then
      return refuse(class, message)
    end
  end
  call('HSET', hash, 'sid', sid, 'kind', kind, 'digest', digest, 'payload', payload, 'body', body, 'state', 'queued', 'epoch', 0,
       'created_ms', now, 'deadline_ms', timeout_ms ~= '' and now + timeout_ms or '', 'run_ms', run_ms, 'bell', bell)
  if raw ~= '' then
    call('HSET', hash, 'raw', 1)
  end
  if ended then
    settle(oid, load_op(oid), 'done', ended)
    return {'created', 'done'}
  end
  call('SADD', key('open', sid), oid)
  call('ZADD', prefix .. 'live', 'LT', now, sid)
  ring(oid, sandbox, bell_queue(sandbox))
  return {'created', 'queued'}
end

function verbs.cancel(oid)
  local op = load_op(oid)
  if op.state == 'queued' then
    settle(oid, op, 'cancelled', '{}')
    shut_unmade(oid, op, load_sandbox(op.sid), 'its creation was cancelled')
    return {'ok', 'cancelled'}
  elseif op.state == 'running' then
    call('HSET', key('op', oid), 'cancel', 1)
    call('SADD', prefix .. 'cancelling', oid)
    call('PUBLISH', key('ctl', call('HGET', key('sandbox', op.sid), 'owner') or ''), oid)
  elseif op.state == '' then
    return refuse('InvalidRequestError', 'no op ' .. oid .. ' is known: it was never submitted, or it ended long ago')
  end
  return {'ok', op.state}
end

function verbs.collected(oid, collected_ms)
  local hash = key('op', oid)
  if FINAL[load_op(oid).state] and call('PTTL', hash) > tonumber(collected_ms) then
    call('PEXPIRE', hash, collected_ms)
    call('PEXPIRE', key('out', oid), collected_ms)
  end
  return {'ok'}
end

-- Ring again for an op that a worker will not take (it drains).
function verbs.ring(oid)
  local op = load_op(oid)
  if op.state == '' or FINAL[op.state] then
    return {'no'}
  end
  local sandbox = load_sandbox(op.sid)
  ring(oid, sandbox, bell_queue(sandbox))
  return {'ok'}
end

-- ------------------------------------------------------------------------------------------- verbs: workers

local function grant(oid, sid)
  local op = call('HMGET', key('op', oid), 'kind', 'payload', 'body', 'epoch', 'deadline_ms', 'attempt', 'cancel')
  local sandbox = call('HMGET', key('sandbox', sid), 'handle', 'spec', 'backend', 'state')
  local remaining_ms = op[5] ~= '' and math.max(0, op[5] - now) or ''
  return {'taken', sid, op[1], op[2], op[3], op[4], sandbox[1] or '', sandbox[2], sandbox[3], sandbox[4], remaining_ms, op[6], op[7] or ''}
end

local function own(sandbox, wid, oid)
  local sid, before = sandbox.sid, sandbox.owner
  sandbox.epoch = string.format('%.0f', math.max(now, tonumber(sandbox.epoch) + 1))
  sandbox.owner = wid
  call('HSET', key('sandbox', sid), 'owner', wid, 'epoch', sandbox.epoch)
  call('SADD', key('owned', wid), sid)
  call('SREM', prefix .. 'unowned', sid)
  if before ~= '' then -- of a dead one that no sweep has seen yet: its other ops come along
    call('SREM', key('owned', before), sid)
    ring_all(sandbox, wid .. '.dq2', oid)
  end
end

local function begin(oid, op, sandbox, nonce)
  local hash = key('op', oid)
  local attempt = call('HINCRBY', hash, 'attempt', 1)
  call('HSET', hash, 'state', 'running', 'epoch', sandbox.epoch, 'nonce', nonce)
  if attempt == 1 then
    call('HSET', hash, 'started_ms', now)
    local run_ms = call('HGET', hash, 'run_ms')
    if run_ms and run_ms ~= '' then -- it is not waiting any more: from here on it has its own time
      call('HSET', hash, 'deadline_ms', now + run_ms)
    end
  end
  if op.kind == 'destroy' then
    call('HSET', key('sandbox', sandbox.sid), 'state', 'closing')
  end
  return grant(oid, sandbox.sid)
end

-- The term is that of the lease under which the caller heard the doorbell. If it has lapsed since, the caller is about to drop all that
-- it has in progress: what it got now would run nowhere.
function verbs.take(wid, oid, nonce, term)
  local op = load_op(oid)
  if op.state == '' then
    return {'no', 'gone'}
  elseif op.state == 'cancelled' then
    return {'no', 'cancelled'}
  elseif FINAL[op.state] then
    return {'no', 'final'}
  elseif not alive(wid) or call('GET', key('term', wid)) ~= term then
    return {'no', 'fenced'}
  end
  local sandbox = load_sandbox(op.sid)
  local owned = alive(sandbox.owner)
  local mine = owned and sandbox.owner == wid
  if op.state == 'running' and owned and op.epoch == sandbox.epoch then
    if mine and op.nonce == nonce then
      return grant(oid, op.sid) -- the reply to the first take was lost
    end
    return {'no', 'running'}
  elseif sandbox.state == '' or GONE[sandbox.state] or (op.state == 'queued' and gone(sandbox, op.kind)) then
    settle_gone(oid, op, sandbox)
    return {'no', 'closed'}
  elseif op.state == 'queued' and op.deadline_ms ~= '' and tonumber(op.deadline_ms) < now then
    expire(oid, op, sandbox)
    return {'no', 'expired'}
  elseif owned and not mine then
    ring(oid, sandbox, sandbox.owner .. '.dq2')
    return {'no', 'forwarded'}
  elseif sandbox.state == 'creating' and op.kind ~= 'create' and call('SISMEMBER', key('open', op.sid), sandbox.create_op) == 1 then
    return {'no', 'creating'}
  end
  if not mine then
    own(sandbox, wid, oid)
  end
  return begin(oid, op, sandbox, nonce)
end

-- Output as "i s o d" for each chunk.
local function append(oid, epoch, chunks)
  local out = key('out', oid)
  for n = 1, #chunks, 4 do
    call('XADD', out, '*', 'e', epoch, 'i', chunks[n], 's', chunks[n + 1], 'o', chunks[n + 2], 'd', chunks[n + 3])
  end
end

function verbs.publish(wid, oid, epoch, ...)
  if not holds_op(load_op(oid), wid, epoch) then
    return {'fenced'}
  end
  append(oid, epoch, {...})
  return {'ok'}
end

function verbs.finish(wid, oid, epoch, state, json, body, ...)
  local op = load_op(oid)
  if FINAL[op.state] and call('HGET', key('op', oid), 'ended_by') == wid .. ' ' .. epoch then
    return {'ok'} -- the reply to the first finish was lost
  elseif not holds_op(op, wid, epoch) then
    return {'fenced'}
  end
  append(oid, epoch, {...})
  settle(oid, op, state, json, body, wid .. ' ' .. epoch)
  if state ~= 'done' then
    shut_unmade(oid, op, load_sandbox(op.sid), 'it could not be made')
  end
  return {'ok'}
end

function verbs.cancelled_ops(wid)
  local mine = {}
  for _, oid in ipairs(call('SMEMBERS', prefix .. 'cancelling')) do
    local op = load_op(oid)
    if op.state == 'running' and call('HGET', key('sandbox', op.sid), 'owner') == wid then
      mine[#mine + 1] = oid
    end
  end
  return mine
end

function verbs.ready(wid, sid, epoch, handle, placement, queue)
  local sandbox = load_sandbox(sid)
  if GONE[sandbox.state] or not holds_sandbox(sandbox, wid, epoch) then
    return {'fenced'}
  end
  local state = sandbox.state == 'creating' and 'ready' or sandbox.state
  call('HSET', key('sandbox', sid), 'state', state, 'handle', handle, 'placement', placement, 'queue', queue)
  sandbox.queue = queue
  for _, oid in ipairs(call('SMEMBERS', key('open', sid))) do
    if load_op(oid).state == 'queued' then
      ring(oid, sandbox, bell_queue(sandbox))
    end
  end
  return {'ok'}
end

function verbs.close(sid, state, cause, wid, epoch, keep_op)
  local sandbox = load_sandbox(sid)
  if sandbox.state == '' or (wid ~= '' and not holds_sandbox(sandbox, wid, epoch)) then
    return {'fenced'}
  end
  if not GONE[sandbox.state] then
    shut(sandbox, state, cause, keep_op)
  end
  return {'ok'}
end

function verbs.set_expiry(sid, expires_in_ms, wid, epoch)
  local sandbox = load_sandbox(sid)
  local class, message = gone(sandbox, '')
  if class then
    return refuse(class, message)
  elseif not holds_sandbox(sandbox, wid, epoch) then
    return {'fenced'}
  end
  call('HSET', key('sandbox', sid), 'expires_ms', now + expires_in_ms)
  call('ZADD', prefix .. 'sandboxes', 'XX', now + expires_in_ms, sid)
  return {'ok'}
end

-- Since when this server has had this data. Another run of it may have lost some: all of it, what it had not yet written, or what a
-- replica had not yet heard.
local function born()
  local run_id = string.match(call('INFO', 'server'), 'run_id:(%w+)') or ''
  local known = load(prefix .. 'born', 'run_id', 'ms')
  if known.run_id ~= run_id or known.ms == '' then
    call('HSET', prefix .. 'born', 'run_id', run_id, 'ms', now)
    return string.format('%.0f', now)
  end
  return known.ms
end

-- A lease that had lapsed never brings old ownership back: its holder stopped believing in it, others may have begun.
function verbs.renew(wid, ttl_ms, info)
  local term = call('GET', key('term', wid)) or now
  if not alive(wid) then
    disown_all(wid, 1000000)
    term = string.format('%.0f', math.max(now, term + 1))
  end
  call('SET', key('worker', wid), info, 'PX', ttl_ms)
  call('SET', key('term', wid), term, 'PX', ttl_ms)
  call('SADD', prefix .. 'workers', wid)
  return {'ok', term, born()}
end

-- What Celery keeps for a worker; its queue has nothing that the journal could not ring for again.
local function clean_worker(wid)
  local queue = wid .. '.dq2'
  local member = wid .. KOMBU_SEP .. KOMBU_SEP .. queue
  call('DEL', prefix .. queue)
  call('SREM', prefix .. '_kombu.binding.C.dq2', member)
  call('SREM', prefix .. '_kombu.binding_permanent.C.dq2', member)
  call('SREM', prefix .. '_kombu.binding.celery.pidbox', KOMBU_SEP .. KOMBU_SEP .. wid .. '.celery.pidbox')
  call('SREM', prefix .. 'workers', wid)
end

function verbs.release(wid)
  call('DEL', key('worker', wid), key('term', wid))
  local count = disown_all(wid, 1000000)
  clean_worker(wid)
  return {'ok', count}
end

-- A sandbox that its owner knows and the registry does not: Redis has lost data. What it ran goes on; who asks again attaches.
function verbs.restore(sid, backend, placement, queue, spec, handle, created_ms, expires_ms)
  if load_sandbox(sid).state ~= '' then
    return {'known'}
  elseif tonumber(expires_ms) <= now then
    return {'expired'}
  end
  call('HSET', key('sandbox', sid), 'backend', backend, 'placement', placement, 'state', 'ready', 'owner', '', 'epoch', 0, 'spec', spec,
       'handle', handle, 'create_op', '', 'queue', queue, 'created_ms', created_ms, 'expires_ms', expires_ms, 'cause', '')
  call('ZADD', prefix .. 'sandboxes', expires_ms, sid)
  call('SADD', prefix .. 'unowned', sid)
  return {'ok'}
end

-- How long this registry has been there: one that was just made (again) does not know what there is.
function verbs.age()
  return {'ok', now - born()}
end

-- Hand over all sandboxes of a worker but the named ones.
function verbs.leave(wid, ...)
  local kept = {}
  for _, sid in ipairs({...}) do
    kept[sid] = true
  end
  return {'ok', disown_all(wid, 1000000, kept)}
end

-- The ops that run under a worker, by the journal: oid, sid and epoch of each.
function verbs.running(wid)
  local found = {}
  for _, sid in ipairs(call('SMEMBERS', key('owned', wid))) do
    local epoch = call('HGET', key('sandbox', sid), 'epoch')
    for _, oid in ipairs(call('SMEMBERS', key('open', sid))) do
      local op = load_op(oid)
      if op.state == 'running' and op.epoch == epoch then
        found[#found + 1] = oid
        found[#found + 1] = sid
        found[#found + 1] = epoch
      end
    end
  end
  return found
end

function verbs.hand_over(wid, sid, epoch)
  local sandbox = load_sandbox(sid)
  if GONE[sandbox.state] or not holds_sandbox(sandbox, wid, epoch) then
    return {'fenced'}
  end
  disown(sandbox)
  return {'ok'}
end

-- ------------------------------------------------------------------------------------------ verbs: janitor

-- Doorbells that wait in a queue, without those that this call rings itself.
local waiting = {}
local function count_waiting(queue)
  waiting[queue] = waiting[queue] or call('LLEN', prefix .. queue)
  return waiting[queue]
end

-- A doorbell is surely lost if its list is empty. Else it may still wait there: ring more and more rarely.
local function overdue(op, queue, reping_ms)
  local patience = reping_ms
  if count_waiting(queue) > 0 then
    patience = patience * 2 ^ math.min(5, tonumber(op.rings) or 0)
  end
  return now - (tonumber(op.rung_ms) or 0) >= patience
end

-- What one open op needs: "rung", "expired", "waits" (all is done that can be) or "calm" (it runs under a living owner).
local function tend(oid, op, sandbox, reping_ms)
  local owned, queue = alive(sandbox.owner), bell_queue(sandbox)
  local late_ms = op.deadline_ms ~= '' and now - op.deadline_ms or -1
  if op.state == 'running' and owned and op.epoch == sandbox.epoch then
    return 'calm'
  elseif sandbox.state == '' or GONE[sandbox.state] then
    settle_gone(oid, op, sandbox)
    return 'expired'
  elseif (op.state == 'queued' and late_ms > 0) or (not owned and late_ms > GRACE_MS) then
    expire(oid, op, sandbox)
    return 'expired'
  elseif overdue(op, queue, reping_ms) then
    ring(oid, sandbox, queue)
    return 'rung'
  end
  return 'waits'
end

-- One op, by a client that waits for it: where no worker lives, nobody sweeps.
function verbs.tend(oid, reping_ms)
  local op = load_op(oid)
  if op.state == '' or FINAL[op.state] then
    return {'no'}
  end
  return {tend(oid, op, load_sandbox(op.sid), tonumber(reping_ms))}
end

local function tend_sandbox(sid, counts, reping_ms)
  local sandbox, calm = load_sandbox(sid), true
  for _, oid in ipairs(call('SMEMBERS', key('open', sid))) do
    local op = load_op(oid)
    if op.state == '' or FINAL[op.state] then
      call('SREM', key('open', sid), oid)
    else
      local verdict = tend(oid, op, sandbox, reping_ms)
      counts[verdict] = (counts[verdict] or 0) + 1
      calm = calm and verdict == 'calm'
    end
  end
  if call('EXISTS', key('open', sid)) == 1 then
    call('ZADD', prefix .. 'live', now + (calm and CALM_MS or 0), sid)
  else
    call('ZREM', prefix .. 'live', sid)
  end
end

-- Workers that the lease or one of Celery's tables still names. A worker that was cut off may bind its queues again after it was
-- cleaned up, and die before it renews.
local function named_workers()
  local found = {}
  for _, wid in ipairs(call('SMEMBERS', prefix .. 'workers')) do
    found[wid] = true
  end
  for table, suffix in pairs({['C.dq2'] = '%.dq2$', ['celery.pidbox'] = '%.celery%.pidbox$'}) do
    for _, member in ipairs(call('SMEMBERS', prefix .. '_kombu.binding.' .. table)) do
      local wid, matched = string.gsub(string.match(member, '[^\22]*$'), suffix, '')
      if matched == 1 then
        found[wid] = true
      end
    end
  end
  return found
end

function verbs.sweep(wid, limit, reping_ms)
  if not call('SET', prefix .. 'lock:sweep', wid, 'NX', 'PX', 900) then
    return {'locked', 0, 0, 0, {}}
  end
  local cleaned, counts = 0, {}
  for other in pairs(named_workers()) do
    if not alive(other) then
      disown_all(other, limit)
      if call('EXISTS', key('owned', other)) == 0 then
        clean_worker(other)
        cleaned = cleaned + 1
      end
    end
  end
  for _, sid in ipairs(call('ZRANGEBYSCORE', prefix .. 'live', '-inf', now - reping_ms, 'LIMIT', 0, limit)) do
    tend_sandbox(sid, counts, tonumber(reping_ms))
  end
  for _, sid in ipairs(call('ZRANGEBYSCORE', prefix .. 'sandboxes', '-inf', now - BEYOND_MS, 'LIMIT', 0, limit)) do
    local sandbox = load_sandbox(sid)
    if not alive(sandbox.owner) then
      shut(sandbox, 'lost', 'its lifetime ended, and no worker of its placement was there to see to it')
    end
  end
  local unanswered = call('ZRANGEBYSCORE', prefix .. 'answers', '-inf', now - ANSWER_MS, 'LIMIT', 0, limit)
  return {'ok', counts.rung or 0, counts.expired or 0, cleaned, unanswered}
end

-- Celery has the answer to a raw task.
function verbs.answered(oid)
  call('ZREM', prefix .. 'answers', oid)
  return {'ok'}
end

-- A turn to make a sandbox: how long until it comes, which takes it; or that it would come too late, which takes nothing.
function verbs.pace(account, interval_ms, most_ms)
  local turn = math.max(now, tonumber(call('GET', key('pace', account)) or 0))
  if turn - now > tonumber(most_ms) then
    return {'late', turn - now}
  end
  local following = turn + tonumber(interval_ms)
  call('SET', key('pace', account), string.format('%.0f', following), 'PX', following - now)
  return {'ok', turn - now}
end

return verbs[ARGV[1]](unpack(ARGV, 3))
