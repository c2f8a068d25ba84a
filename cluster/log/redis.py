"""Users' live state in Redis: the fold of the log up to one sequence number, shared by whoever holds the same log.

In:  events in order, after the number that the state holds up to.  Out: a user's state, and that number.
Knows nothing of threads or files, of what was before the log, or of what to do while Redis is away (shared.py).

    recloop:{LOG}:state        hash: the fill that counts, the number it holds up to
    recloop:{LOG}:FILL:USER    list: [item, kind, value, ts_us, seq] of each interaction, oldest first; the newest seq
    recloop:{LOG}:filling      lock of whoever writes the next fill

One script applies a batch: it leaves out what the state holds already and refuses what would leave a gap. So any number
of nodes may apply the same events, again and in any order of nodes, and each counts once. Redis runs, writes to its
file and replicates a script as a whole, so a Redis that lost its last seconds holds the fold up to an earlier number.
A fill writes lists of its own and then counts at once, so that a fill cut short or overtaken has touched nothing.
A user takes about 300 bytes and 60 for each interaction kept, given ids of 10 characters.
"""

import itertools
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import LockError, RedisError
from redis.retry import Retry

from cluster.errors import ConfigError, EngineError
from cluster.events import INTERACTION_KINDS
from cluster.log.records import Interaction, LoggedEvent
from cluster.log.state import LiveState

TIMEOUT_S = 0.5
LEASE_S = 10.0
"""How long a fill may go without a sign of life."""
USERS_AT_ONCE = 200
KEYS_AT_ONCE = 1_000
READ_ATTEMPTS = 3
"""Times to look again for a user whose fill has been replaced meanwhile."""

APPLY = """
local fill, applied = unpack(redis.call('HMGET', KEYS[1], 'fill', 'applied'))
if not fill then return false end
applied = tonumber(applied)
if applied < tonumber(ARGV[2]) or applied >= tonumber(ARGV[3]) then return applied end
redis.call('HSET', KEYS[1], 'applied', ARGV[3])  -- first: without memory it is refused, and nothing has been written
local keep = tonumber(ARGV[4])
for i = 5, #ARGV, 3 do
    if tonumber(ARGV[i]) > applied then
        local key = ARGV[1] .. fill .. ':' .. ARGV[i + 1]
        redis.call('RPOP', key)
        if ARGV[i + 2] ~= '' then redis.call('RPUSH', key, ARGV[i + 2]) end
        redis.call('RPUSH', key, ARGV[i])
        if keep > 0 then redis.call('LTRIM', key, -keep - 1, -1) end
    end
end
return tonumber(ARGV[3])
"""
COUNT_FILL = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
return redis.call('HSET', KEYS[1], 'fill', ARGV[1], 'applied', ARGV[2]) and 1
"""


class Shared(NamedTuple):
    """One user's live state."""

    applied_seq: int
    """Every event up to it is reflected."""
    seq: int
    """The user's newest event, of any kind; 0 where there is none."""
    history: list[Interaction]
    """Oldest first."""


class RedisStore:
    """One log's state; every method may be called from any thread and raises `EngineError` where Redis is away."""

    def __init__(self, url: str, name: str, *, password: str | None = None, keep: int | None = None) -> None:
        """Keep the state of the log `name`, of each user the newest `keep` interactions.

        Raises `EngineError` where Redis does not answer, or would evict users.
        """
        try:
            self._redis = Redis.from_url(
                url,
                password=password,
                decode_responses=True,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(f"engine.redis_url={url}: {error}; try redis://127.0.0.1:6379/0") from error
        place = self._redis.connection_pool.connection_kwargs
        self.where = place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}"
        self.keep = keep
        self._prefix = f"recloop:{{{name}}}:"
        self._state, self._filling = f"{self._prefix}state", f"{self._prefix}filling"
        self._apply = self._redis.register_script(APPLY)
        self._count_fill = self._redis.register_script(COUNT_FILL)
        self._fill: str | None = None
        with self._engine_errors():
            policy = str(self._redis.info("memory").get("maxmemory_policy", ""))
        if policy.startswith("allkeys"):
            raise EngineError(f"Redis at {self.where}: evicts users (maxmemory-policy {policy}); set noeviction")

    def applied_seq(self) -> int | None:
        """Return the number that the state holds up to; none where there is no state."""
        with self._engine_errors():
            found = self._redis.hget(self._state, "applied")
        return None if found is None else int(str(found))

    def read(self, user_id: str, max_history: int | None) -> Shared | None:
        """Return a user's state with so many of their newest interactions, or all; none where there is no state."""
        for _ in range(READ_ATTEMPTS):
            fill = self._fill
            with self._engine_errors(), self._redis.pipeline() as both:  # at one moment
                both.hmget(self._state, ["fill", "applied"])
                both.lrange(f"{self._prefix}{fill}:{user_id}", 0 if max_history is None else -max_history - 1, -1)
                (self._fill, applied), entries = both.execute()
            if self._fill is None:
                return None
            if self._fill == fill:
                history = [Interaction(*json.loads(entry)) for entry in entries[:-1]]
                return Shared(int(applied), int(entries[-1]) if entries else 0, history)
        return None

    def apply(self, after_seq: int, events: Sequence[LoggedEvent]) -> int | None:
        """Apply the events that follow `after_seq`; return the number that the state holds up to now.

        That is less than `after_seq` where events before them are missing, and none where there is no state: then
        nothing was applied.
        """
        triples = ((logged.seq, logged.event.user_id, _entry(logged)) for logged in events)
        arguments = [self._prefix, after_seq, events[-1].seq, self.keep or 0, *itertools.chain.from_iterable(triples)]
        with self._engine_errors():
            return self._apply(keys=[self._state], args=arguments)

    def fill(
        self,
        is_needed: Callable[[int | None], bool],
        everyone: Callable[[], AbstractContextManager[tuple[int, Iterator[LiveState]]]],
    ) -> None:
        """Put a log's whole state in the place of what there is, where that is needed and nobody does so already."""
        token = secrets.token_hex(8)
        lock = self._redis.lock(self._filling, timeout=LEASE_S)
        with self._engine_errors():
            if not lock.acquire(blocking=False, token=token):
                return
            try:
                if is_needed(self.applied_seq()):
                    with everyone() as (head_seq, states):
                        while some := list(itertools.islice(states, USERS_AT_ONCE)):
                            self._write(token, some)
                            lock.reacquire()
                    if not self._count_fill(keys=[self._state, self._filling], args=[token, head_seq]):
                        raise EngineError(f"Redis at {self.where}: another process has taken over filling it")
                    self._sweep(token)
            finally:
                with suppress(LockError):  # expired, or lost with everything else
                    lock.release()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _write(self, fill: str, states: Sequence[LiveState]) -> None:
        with self._redis.pipeline(transaction=False) as writes:
            for user_id, seq, history in states:
                kept = history if self.keep is None else history[-self.keep :]
                writes.rpush(f"{self._prefix}{fill}:{user_id}", *map(json.dumps, kept), str(seq))
            writes.execute()

    def _sweep(self, fill: str) -> None:
        """Remove the lists of other fills."""
        ours = (self._state, self._filling)
        pattern = self._prefix.translate({ord(mark): f"\\{mark}" for mark in "*?[]\\"}) + "*"
        found = self._redis.scan_iter(match=pattern, count=KEYS_AT_ONCE)
        old = (key for key in found if key not in ours and not key.startswith(f"{self._prefix}{fill}:"))
        while some := list(itertools.islice(old, KEYS_AT_ONCE)):
            self._redis.unlink(*some)

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        try:
            yield
        except RedisError as error:
            raise EngineError(f"Redis at {self.where}: {error}") from error


def _entry(logged: LoggedEvent) -> str:
    event = logged.event
    if event.kind not in INTERACTION_KINDS:
        return ""
    return json.dumps(Interaction(event.item_id, event.kind, event.value, event.ts_us, logged.seq))
