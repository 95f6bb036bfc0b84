"""The ledger: what became of each task, on any store.

    task/<id>            what was sent (`Sent`)
    run/<id>/<queue>     how one run of it stands (`RunState`), from its first attempt on
    unique/<topic>/<key> the task that holds a unique key

Two may want to change a run: whoever runs it, and whoever cancels it or takes it over. Each change names
the version it is made to, so exactly one of them comes first and the other one sees it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

import msgspec

from penstock.clock import LONGEST, SYSTEM_CLOCK, Clock
from penstock.errors import NotUnique, UnknownTask
from penstock.stores import records
from penstock.stores.base import ABSENT, Change, Delete, Entry, Put, Store, Touch
from penstock.stores.following import Followers
from penstock.stores.gathered import Gathered
from penstock.stores.records import Body, RunState, Sent, Standing, State, TaskRecord
from penstock.stores.topics import TOPICS_KNOWN, Topics
from penstock.terms import Failure, Terms

RESULT_TTL = 86_400.0
"""Seconds that a task is remembered after it has ended, unless it says otherwise."""
LATE = 1.0
"""Seconds after its expiry from which a task that nobody has begun counts as expired: it may have been taken
at the last moment, and its run not be written yet."""
TOMBSTONE = 30 * 86_400.0
"""Seconds for which it is known at least that nobody shall begin a run, from when its message may be delivered."""
SPARE = 60.0  # seconds by which a run outlives its task's entry, so that no task is seen without its runs
MOST_BODY = 64 * 2**20  # bytes of a content or result that is shown
PAGE = 1000


class Held(msgspec.Struct, gc=False):
    """A run in the hands of who carries it out."""

    taskid: str
    queue: str
    version: int
    state: RunState
    delivery: int = 0
    """Which delivery of its message it is held by. The later one is heard, once it has begun."""
    attempt: int | None = None
    """The number of the attempt that is made of it here; None: none is under way."""

    @property
    def over(self) -> bool:
        """Whether there is nothing to do with this delivery: the run has ended, or goes on with a later one."""
        return self.state.ended or self.delivery < self.state.delivery


class Ledger:
    """Tasks on a store. For one event loop."""

    def __init__(self, store: Store, clock: Clock = SYSTEM_CLOCK, worker: str | None = None) -> None:
        self.store = store
        self.followers = Followers(store)
        self._clock = clock
        self._worker = worker or f"{socket.gethostname()}:{os.getpid()}"
        self._records = Gathered(store)
        self.topics = Topics(self._records, clock)

    async def close(self) -> None:
        """Idempotent; the store stays open."""
        await self.followers.close()

    # -- sending

    async def send(self, taskid: str, sent: Sent) -> bool:
        """Write down that a task is being sent; False: this id is known already."""
        ttl = self.until_taken(sent)
        if ttl is None and not sent.queues:
            ttl = self._ttl(sent.result_ttl)
        changes = await self._records.apply(Put(f"task/{taskid}", records.encode(sent), ttl, ABSENT))
        return changes[0] is not None

    async def unsend(self, taskid: str) -> None:
        """It was not published after all."""
        await self._records.apply(Delete(f"task/{taskid}"))

    async def reserve(self, key: str, taskid: str, ttl: float | None = None) -> None:
        """Take a unique key (`unique_key`) for a task, for at most `ttl` seconds. With its end the key is free again.

        :raises NotUnique: a task that has not ended has it.
        """
        expected = ABSENT
        while True:
            (version,) = await self._records.apply(Put(key, taskid.encode(), ttl, expected))
            if version is not None:
                return
            (entry,) = await self._records.get(key)
            if entry is None:
                expected = ABSENT
                continue
            holder = entry.value.decode()
            if holder == taskid:
                return
            try:
                if not (await self.record(holder)).ended:
                    raise NotUnique(key.partition(".")[2].partition("/")[2], holder)
            except UnknownTask:
                pass
            expected = entry.version

    async def free(self, key: str, taskid: str) -> None:
        """Give a unique key back, if this task has it still."""
        (entry,) = await self._records.get(key)
        if entry is not None and entry.value == taskid.encode():
            await self._records.apply(Delete(key, expect=entry.version))

    async def _holding(self, key: str | None, taskid: str) -> list[Change]:
        """What makes a unique key last until the end of its task; nothing if another one has it by now."""
        (entry,) = [None] if key is None else await self._records.get(key)
        if entry is None or entry.value != taskid.encode():
            return []
        return [Put(entry.key, entry.value, expect=entry.version)]

    def until_taken(self, sent: Sent) -> float | None:
        """Seconds to remember a task that was sent and nobody has taken. Taken, it is kept until it has ended."""
        if sent.expires_at is None:
            return None
        return max(sent.expires_at - self._clock.time(), 0.0) + self._ttl(sent.result_ttl) + SPARE

    # -- running

    async def begin(self, taskid: str, queue: str, asked: Terms, delivery: int = 1) -> Held:
        """Begin a run, or another attempt of it, with the first, second … delivery of its message. If that is
        `over`, nothing is begun.

        :raises NotUnique: it comes out of the dead letters, and another task has its unique key meanwhile.
        :raises BrokerUnavailable: the store is away.
        """
        await self.topics.assure(queue)
        key = f"run/{taskid}/{queue}"
        state, expected = RunState("queued"), ABSENT
        while True:
            held = Held(taskid, queue, expected, state, delivery)
            revived = asked.again is not None and asked.again > state.again and state.state != "succeeded"
            if held.over and not revived:
                if state.ended:
                    await self._see_off(taskid, asked)
                return held
            if state.cancel and not state.ended:
                state.end(None, "cancelled", self._clock.time(), None)
                if await self._end(held, asked) is not None:
                    return held
            else:
                if revived:
                    state.again = asked.again or 0.0
                    if asked.unique is not None:
                        await self.reserve(asked.unique, taskid)
                keeping: list[Change] = []
                if revived or asked.expiring:
                    keeping = [Touch(f"task/{taskid}", None), *await self._holding(asked.unique, taskid)]
                state.begin(self._worker, self._clock.time(), delivery)
                put = Put(key, records.encode(state), expect=expected)
                version = (await self._records.apply(put, *keeping))[0]
                if version is not None:
                    return Held(taskid, queue, version, state, delivery, state.started)
            state, expected = await self._run(key)

    async def at_hand(self, taskid: str, queue: str, asked: Terms, delivery: int = 1) -> Held:
        """A run as it stands, to be ended without beginning it, unless it is `over`."""
        state, version = await self._run(f"run/{taskid}/{queue}")
        if state.ended:
            await self._see_off(taskid, asked)
        return Held(taskid, queue, version, state, delivery, state.started if state.state == "running" else None)

    async def expire(self, taskid: str, queue: str, asked: Terms) -> None:
        """Nobody has begun a run in time, and nobody will."""
        expired = Held(taskid, queue, ABSENT, RunState("expired", ended_at=self._clock.time()))
        if await self._end(expired, asked) is None:
            await self._see_off(taskid, asked)

    async def requeue(self, held: Held, error: str) -> None:
        """An attempt has failed, and there will be another."""
        held.state.close("failed", self._clock.time(), error)
        held.state.state = "queued"
        await self._write(held)

    async def progress(self, held: Held, done: float, total: float) -> None:
        held.state.progress = (done, total)
        await self._write(held)

    async def finish(
        self,
        held: Held,
        state: State,
        asked: Terms,
        *,
        result: Body | None = None,
        error: Failure | None = None,
        line: str | None = None,
    ) -> RunState:
        """A run has ended; how it stands. It is refused, and goes on, if it was begun with a later delivery of its
        message. With one as late the first end counts: who has begun it meanwhile may not have a message.

        `line` is the error in one line.
        """
        run, version, now = held.state, held.version, self._clock.time()
        while True:
            run.end(held.attempt, state, now, line)
            run.result, run.error = result, error
            run.lasts = asked.result_ttl == LONGEST or (held.attempt is None and run.lasts)
            if await self._end(msgspec.structs.replace(held, version=version, state=run), asked) is not None:
                return run
            run, version = await self._run(f"run/{held.taskid}/{held.queue}")
            if run.ended:
                await self._see_off(held.taskid, asked)
            if run.ended or held.delivery < run.delivery:
                return run

    async def keep(self, held: Held) -> None:
        """A run that has ended, and its task with it, are remembered for long."""
        key = f"run/{held.taskid}/{held.queue}"
        while True:
            state, version = await self._run(key)
            if not state.ended:
                return
            if state.lasts:  # somebody was at it, and may not have come to its end
                await self._records.apply(Touch(key, LONGEST + SPARE), Touch(f"task/{held.taskid}", LONGEST))
                return
            state.lasts = True
            put = Put(key, records.encode(state), LONGEST + SPARE, version)
            if (await self._records.apply(put, Touch(f"task/{held.taskid}", LONGEST)))[0] is not None:
                return

    async def look_at(self, held: Held) -> RunState:
        """How a run stands now."""
        return (await self._run(f"run/{held.taskid}/{held.queue}"))[0]

    async def wants_cancel(self, held: Held) -> bool:
        """Whether somebody wants the run to end, or it has ended elsewhere, or goes on with a later delivery."""
        (entry,) = await self._records.get(f"run/{held.taskid}/{held.queue}")
        if entry is None or entry.version == held.version:
            return False
        run = records.decode_run(entry.value)
        return run.cancel or run.ended or held.delivery < run.delivery

    async def _end(self, held: Held, asked: Terms) -> int | None:
        """Write the end of a run; None: it is not as it was. With the last one of its task the time begins that
        it is remembered, and its unique key is free."""
        key, value = f"run/{held.taskid}/{held.queue}", records.encode(held.state)
        ttl = self._ttl(asked.result_ttl)
        put = Put(key, value, self._keep(held.state, ttl) if asked.runs == 1 else None, held.version, tell=True)
        if held.attempt is not None and asked.runs == 1 and asked.unique is None and ttl > SPARE:  # in one go
            version = (await self._records.apply(put, Touch(f"task/{held.taskid}", ttl)))[0]
            if version is None:  # it may not have ended
                await self._records.apply(Touch(f"task/{held.taskid}", None))
            return version
        (version,) = await self._records.apply(put)
        if version is not None:
            await self._see_off(held.taskid, asked)
        return version

    async def _see_off(self, taskid: str, asked: Terms) -> None:
        """Do what the end of a task's last run entails, for whoever has found or made it, and may be the first.

        Whoever wrote that end may have died over it: the message comes again, and finds the run ended.
        """
        entries = await self.store.scan(f"run/{taskid}/", limit=PAGE)
        runs = [records.decode_run(entry.value) for entry in entries]
        if len(runs) < asked.runs or not all(run.ended for run in runs):
            return
        if asked.unique is not None:
            await self.free(asked.unique, taskid)
        (task,) = await self._records.get(f"task/{taskid}")
        if any(entry is not None and entry.expires_at is None for entry in (task, *entries)):
            ttl = LONGEST if any(run.lasts for run in runs) else self._ttl(asked.result_ttl)
            kept = zip(entries, runs, strict=True)
            touches = [Touch(entry.key, self._keep(run, ttl)) for entry, run in kept if entry.expires_at is None]
            await self._records.apply(*touches, Touch(f"task/{taskid}", ttl))
            if ttl < LONGEST and any(run.trials and run.state != "succeeded" for run in runs):
                await self._keep_on(taskid)

    async def _keep_on(self, taskid: str) -> None:
        """Somebody may have found (`keep`), while a task was seen off, that it is to be remembered for long."""
        entries = await self.store.scan(f"run/{taskid}/", limit=PAGE)
        kept = [Touch(entry.key, LONGEST + SPARE) for entry in entries if records.decode_run(entry.value).lasts]
        if kept:
            await self._records.apply(*kept, Touch(f"task/{taskid}", LONGEST))

    def _keep(self, run: RunState, ttl: float) -> float:
        """Seconds to keep a run that has ended, of a task that is remembered for `ttl`: longer than that, and what
        was cancelled before it was begun until its message must have come by."""
        if run.lasts:
            ttl = LONGEST
        return max(ttl, TOMBSTONE if run.state == "cancelled" and not run.trials else 0.0) + SPARE

    async def _write(self, held: Held) -> None:
        """Change a run that goes on. If it is not ours any more, its end will show that."""
        key = f"run/{held.taskid}/{held.queue}"
        while True:
            (version,) = await self._records.apply(Put(key, records.encode(held.state), expect=held.version))
            if version is not None:
                held.version = version
                return
            if not await self._still_ours(held):
                return

    async def _still_ours(self, held: Held) -> bool:
        """After a change that came between: whether only a wish to cancel did. Then it is written down in `held`."""
        state, version = await self._run(f"run/{held.taskid}/{held.queue}")
        if state.started != held.state.started or state.ended or not state.trials:
            return False
        mine, theirs = held.state.trials[-1], state.trials[-1]
        if (mine.worker, mine.started_at) != (theirs.worker, theirs.started_at):
            return False
        held.version, held.state.cancel = version, state.cancel
        return True

    # -- looking

    async def look(self, taskid: str) -> Standing:
        """How a task stands now.

        :raises UnknownTask: nothing is known of it.
        """
        return await self._look(taskid, await self._places(await self._sent(taskid)))

    async def record(self, taskid: str) -> TaskRecord:
        """All that is known of a task.

        :raises UnknownTask: nothing.
        """
        return (await self.look(taskid)).as_record(MOST_BODY)

    async def page(self, limit: int, after: str | None = None) -> list[Standing]:
        """Tasks, the latest first; `after` is the last one's id of the page before."""
        beyond = None if after is None else f"task/{after}"
        entries = await self.store.scan("task/", after=beyond, limit=limit, newest_first=True)
        sent = [records.decode_sent(entry.value) for entry in entries]
        places = [(task.key, queue) for task, one in zip(entries, sent, strict=True) for queue in one.queues]
        found = await self.store.get([f"run/{task.removeprefix('task/')}/{queue}" for task, queue in places])
        runs: dict[str, dict[str, Entry | None]] = {}
        for (task, queue), entry in zip(places, found, strict=True):
            runs.setdefault(task, {})[queue] = entry
        tasks = zip(entries, sent, strict=True)
        return [await self._standing(task, one, runs.get(task.key, {})) for task, one in tasks]

    async def wait(self, taskid: str) -> Standing:
        """How a task stands once all of its runs have ended.

        :raises UnknownTask: nothing is known of it.
        """
        sent = await self._sent(taskid)
        queues = await self._places(sent)
        if (task := await self._look(taskid, queues)).ended:  # many ask when all is over
            return task
        if not sent.queues:
            return await self._wait_unheard(taskid, sent)
        async with self.followers.follow([f"run/{taskid}/{queue}" for queue in queues]) as bell:
            while not (task := await self._look(taskid, queues)).ended:
                left = 0.0 if sent.expires_at is None else sent.expires_at + LATE - self._clock.time()
                await bell.wait(left + 0.01 if left > 0 else None)
            return task

    async def _wait_unheard(self, taskid: str, sent: Sent) -> Standing:
        """As `wait`, of a task whose sender knew of nobody on its topic. Who was new there may have it all the same."""
        async with self.followers.follow([f"task/{taskid}"]) as bell:
            while not (task := await self._look(taskid, await self._places(sent))).ended:
                await bell.wait(TOPICS_KNOWN)
            return task

    async def cancel(self, taskid: str) -> bool:
        """Have a task end: what nobody has begun never will be, what runs is stopped; False: it had ended.

        :raises UnknownTask: nothing is known of it.
        """
        sent = await self._sent(taskid)
        keys = {f"run/{taskid}/{queue}" for queue in sent.queues}
        keys |= {one.key for one in await self.store.scan(f"run/{taskid}/", limit=PAGE)}
        if not keys:
            return await self._cancel_unheard(taskid)
        return any([await self._cancel(taskid, key, sent) for key in sorted(keys)])

    async def _cancel_unheard(self, taskid: str) -> bool:
        """As `cancel`, of a task that has no runs: nobody was on its topic."""
        key = f"task/{taskid}"
        while True:
            (entry,) = await self._records.get(key)
            if entry is None:
                raise UnknownTask(taskid)
            sent, now = records.decode_sent(entry.value), self._clock.time()
            if records.state_of(sent, {}, now) in records.ENDED:
                return False
            value = records.encode(msgspec.structs.replace(sent, cancelled_at=now))
            put = Put(key, value, self._ttl(sent.result_ttl), entry.version, tell=True)
            if (await self._records.apply(put))[0] is not None:
                if sent.terms.unique is not None:
                    await self.free(sent.terms.unique, taskid)
                return True

    async def _cancel(self, taskid: str, key: str, sent: Sent) -> bool:
        while True:
            state, version = await self._run(key)
            if state.ended:
                return False
            if state.state == "running":
                state.cancel = True
                put = Put(key, records.encode(state), expect=version, tell=True)
                if (await self._records.apply(put))[0] is not None:
                    return True
                continue
            now = self._clock.time()
            state.state, state.ended_at = "cancelled", now
            held = Held(taskid, key.removeprefix(f"run/{taskid}/"), version, state)
            if await self._end(held, sent.terms) is not None:
                if sent.due_at is not None and sent.due_at > now:
                    await self._records.apply(Touch(key, sent.due_at - now + TOMBSTONE))
                return True

    async def revive(self, taskid: str) -> tuple[Sent, list[str]]:
        """Put the runs of a task that did not succeed back to `queued`; what was sent, and their queues. They
        are to be published again.

        :raises UnknownTask: nothing is known of it.
        :raises NotUnique: another task has its unique key meanwhile.
        """
        sent = await self._sent(taskid)
        if sent.terms.unique is not None:
            await self.reserve(sent.terms.unique, taskid)
        revived = []
        for queue in sent.queues:
            state, version = await self._run(f"run/{taskid}/{queue}")
            if state.state in ("failed", "cancelled", "expired"):
                state.state, state.ended_at, state.error, state.cancel = "queued", None, None, False
                state.delivery = 0
                put = Put(f"run/{taskid}/{queue}", records.encode(state), None, version, tell=True)
                if (await self._records.apply(put, Touch(f"task/{taskid}", None)))[0] is not None:
                    revived.append(queue)
        return sent, revived

    async def _sent(self, taskid: str) -> Sent:
        (entry,) = await self._records.get(f"task/{taskid}")
        if entry is None:
            raise UnknownTask(taskid)
        return records.decode_sent(entry.value)

    async def _places(self, sent: Sent) -> list[str]:
        """The queues in which a task may have runs: those its sender knew of, and who was new on its topic then."""
        return list(dict.fromkeys((*sent.queues, *await self.topics.queues(sent.topic))))

    async def _look(self, taskid: str, queues: Sequence[str]) -> Standing:
        task, *runs = await self._records.get(f"task/{taskid}", *[f"run/{taskid}/{queue}" for queue in queues])
        if task is None:
            raise UnknownTask(taskid)
        return await self._standing(task, records.decode_sent(task.value), dict(zip(queues, runs, strict=True)))

    async def _standing(self, task: Entry, sent: Sent, entries: Mapping[str, Entry | None]) -> Standing:
        taskid, now = task.key.removeprefix("task/"), self._clock.time()
        overdue = sent.expires_at is not None and now >= sent.expires_at + LATE
        for_ever = task.expires_at is None
        runs: dict[str, RunState] = {}
        for queue, entry in entries.items():
            if entry is not None:
                runs[queue] = records.decode_run(entry.value)
                for_ever = for_ever or entry.expires_at is None
            elif queue in sent.queues:
                runs[queue] = await self._expire(taskid, queue, sent) if overdue else RunState("queued")
        standing = Standing(taskid, sent, runs, records.state_of(sent, runs, now))
        if standing.ended and for_ever:
            await self._see_off(taskid, sent.terms)
        return standing

    async def _expire(self, taskid: str, queue: str, sent: Sent) -> RunState:
        """Decide that a run which nobody has begun never will be, unless somebody does at this very moment."""
        expired = RunState("expired", ended_at=sent.expires_at)
        if await self._end(Held(taskid, queue, ABSENT, expired), sent.terms) is not None:
            return expired
        return (await self._run(f"run/{taskid}/{queue}"))[0]

    # -- the store

    async def _run(self, key: str) -> tuple[RunState, int]:
        (entry,) = await self._records.get(key)
        return (RunState("queued"), ABSENT) if entry is None else (records.decode_run(entry.value), entry.version)

    @staticmethod
    def _ttl(given: float | None) -> float:
        return RESULT_TTL if given is None else given
