"""One SQLite file in this process: one connection in one thread, which commits in groups.

All that the process wants of the file goes through that thread. What waits when the thread comes
round is carried out in one transaction with one `fsync`, so the busier the process, the larger its
groups. No other connection of the process writes or checkpoints, and between processes a lock file
admits one at a time: waiting for it is the kernel's business, without SQLite's polling, and it
keeps clear of the WAL-reset fault that SQLite had before 3.51.3.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable
from penstock.sqlite import schema
from penstock.sqlite.wake import WakeUp, buckets

try:
    import fcntl
except ImportError:  # Windows: SQLite's own locks do, by polling
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

BUSY_TIMEOUT = 30.0  # seconds to wait for somebody else's lock on the file, a backup tool's say
LAST_WAIT = 5.0  # seconds for the last words of whoever stops, while another process, a stopped one say, has the lock
CHECKPOINT_PAGES = 4000
CACHE_KIB = 16 * 1024


class DiskFull(BrokerUnavailable):
    """There is no room to write; there may be later."""


class Transaction:
    """The connection inside a transaction, the queues in which it made something ready (`woken`), and the
    entries whose followers are to hear of a change (`told`)."""

    __slots__ = ("execute", "executemany", "told", "woken")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.execute = connection.execute
        self.executemany = connection.executemany
        self.woken: set[int] = set()
        self.told: set[str] = set()


class Work(NamedTuple, Generic[T]):
    """Something to be done in a transaction; it may be done again if its group fails."""

    run: Callable[[Transaction], T]
    needed: Callable[[Transaction], T | None] | None
    """Looks first, without a lock: its result other than None stands in for running."""
    done: asyncio.Future[T]


class Listener(Protocol):
    """Somebody in this process who waits for messages in some queues."""

    queue_ids: frozenset[int]

    def ring(self) -> None: ...


class Follower(Protocol):
    """Somebody in this process who follows entries. Called in threads of the file."""

    def hear(self, keys: set[str]) -> None:
        """These were changed by this process."""
        ...

    def hear_from_afar(self, ids: set[int] | None) -> None:
        """Another process changed some entries, which a datagram named so; None: or may have."""
        ...


class SqliteFile:
    """A file in use by this process. `lease()` and `drop()` count its users."""

    _open: ClassVar[dict[str, SqliteFile]] = {}
    _inherited: ClassVar[list[SqliteFile]] = []
    _guard = threading.Lock()

    def __init__(self, path: str) -> None:
        self.path = path
        self.orphaned = False
        """This process inherited it, without its thread, from the one that forked it."""
        self.listeners: set[Listener] = set()
        self.followers: set[Follower] = set()
        self.wake_up = WakeUp(self._heard)
        self._users = 0
        self._closed: asyncio.Future[None] | None = None
        self._work: queue.SimpleQueue[Work[Any] | None] = queue.SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._lock_file: int | None = None
        self._thread = threading.Thread(target=self._serve, name=f"penstock-sqlite:{path}", daemon=True)
        self._thread.start()

    @classmethod
    def lease(cls, path: str) -> SqliteFile:
        """The one object for this file in this process."""
        with cls._guard:
            real = os.path.realpath(path)
            file = cls._open.get(real)
            if file is None:
                file = cls._open[real] = cls(real)
            file._users += 1
            return file

    async def drop(self) -> None:
        """One user fewer; the last one out closes the file, and returns when it is closed."""
        with self._guard:
            self._users -= 1
            if self._users or self.orphaned:
                return
            del self._open[self.path]
            self._closed = asyncio.get_running_loop().create_future()
        self._work.put(None)
        with contextlib.suppress(BrokerUnavailable):
            await soon(self._closed)

    def submit(
        self, run: Callable[[Transaction], T], needed: Callable[[Transaction], T | None] | None = None
    ) -> asyncio.Future[T]:
        """Have `run` carried out in the next transaction; the future is of the running loop.

        Cancelling the future before the thread comes to it withdraws the work.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._closed is not None or self.orphaned:  # nobody would ever come to it
            done.set_exception(BrokerUnavailable(f"{self.path} is closed"))
        else:
            self._work.put(Work(run, needed, done))
        return done

    @classmethod
    def forked(cls) -> None:
        """In the child of a fork: open the files anew. SQLite forbids even closing an inherited connection."""
        cls._guard = threading.Lock()
        for file in cls._open.values():
            file.orphaned = True
            cls._inherited.append(file)
            file.wake_up.forked()
            if file._lock_file is not None:  # or it would stay locked by us, should the parent die holding it
                os.close(file._lock_file)
                file._lock_file = None
        cls._open = {}

    # -- in the thread

    def _serve(self) -> None:
        while True:
            works: list[Work[Any]] = []
            work = self._work.get()
            closing = work is None
            while work is not None:
                works.append(work)
                try:
                    work = self._work.get_nowait()
                except queue.Empty:
                    break
                closing = closing or work is None
            if works:
                self._deliver(self._outcomes([work for work in works if not work.done.cancelled()]))
            if closing:
                self._close()
                assert self._closed is not None
                self._deliver([(self._closed, None)])
                return

    def _outcomes(self, works: list[Work[Any]]) -> list[tuple[asyncio.Future[Any], Any]]:
        """The result or exception of each; a group that fails is done again one by one, so that each
        error reaches only the one who caused it."""
        try:
            return self._transact(works)
        except (sqlite3.Error, BrokerError, OSError) as error:
            if len(works) == 1:
                return [(works[0].done, self._translate(error))]
            return [outcome for work in works for outcome in self._outcomes([work])]
        except BaseException as error:
            if len(works) == 1:
                return [(works[0].done, error)]
            return [outcome for work in works for outcome in self._outcomes([work])]

    def _transact(self, works: list[Work[Any]]) -> list[tuple[asyncio.Future[Any], Any]]:
        connection = self._connected()
        tx = Transaction(connection)
        outcomes: list[tuple[asyncio.Future[Any], Any]] = []
        wanted: list[Work[Any]] = []
        for work in works:
            found = None if work.needed is None else work.needed(tx)
            if found is None:
                wanted.append(work)
            else:
                outcomes.append((work.done, found))
        if not wanted:
            return outcomes
        ports: list[int] = []
        with self._locked():
            connection.execute("BEGIN IMMEDIATE")
            try:
                outcomes += [(work.done, work.run(tx)) for work in wanted]
                if tx.told:
                    tx.woken.add(schema.WATCHES)
                if tx.woken:
                    listed = str(list(tx.woken))
                    ports = [row[0] for row in tx.execute(schema.PORTS, (listed, self.wake_up.port))]
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        self._wake(tx, ports)
        return outcomes

    def _wake(self, tx: Transaction, ports: list[int]) -> None:
        """Whoever waits for what has just been committed."""
        if tx.told:
            for follower in tuple(self.followers):
                follower.hear(tx.told)
        if tx.woken:
            self._wake_listeners(tx.woken)
            if ports:
                self.wake_up.send(ports, tx.woken | buckets(tx.told))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._lock_file is None:
            yield
            return
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    @staticmethod
    def _deliver(outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
        """Hand the results over, waking each event loop once."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = defaultdict(list)
        for done, outcome in outcomes:
            loops[done.get_loop()].append((done, outcome))
        for loop, mine in loops.items():
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
                loop.call_soon_threadsafe(_resolve, mine)

    def _heard(self, ids: set[int] | None) -> None:
        """What another process sent; None: anything may have happened."""
        self._wake_listeners(ids)
        if ids is None or schema.WATCHES in ids:
            for follower in tuple(self.followers):
                follower.hear_from_afar(ids)

    def _wake_listeners(self, queue_ids: set[int] | None) -> None:
        for listener in tuple(self.listeners):
            if queue_ids is None or not listener.queue_ids.isdisjoint(queue_ids):
                listener.ring()

    # -- the connection

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
            self._inode = self._inode_now()
            return self._connection
        if self._inode_now() != self._inode:
            # Writing on would go into a file that no longer has a name: lost at the next start.
            raise BrokerRefused(f"{self.path} was removed or replaced while in use")
        return self._connection

    def _inode_now(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return None
        return stat.st_dev, stat.st_ino

    def _connect(self) -> sqlite3.Connection:
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise BrokerRefused(f"cannot open {self.path}: there is no directory {folder}")
        if os.path.isdir(self.path):
            raise BrokerRefused(f"cannot open {self.path}: it is a directory")
        if fcntl is not None and self._lock_file is None:
            try:
                self._lock_file = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise BrokerRefused(f"cannot write beside {self.path}: {error.strerror}") from None
        if not os.path.exists(self.path):
            # The queue holds other people's data: not for everybody to read.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
        try:
            with self._locked():
                self._prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            raise self._refused(error) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """:raises BrokerRefused: a file that is not ours."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != schema.APPLICATION_ID:
            raise BrokerRefused(f"{self.path} is a database of something else; give Penstock a file of its own")
        if tables and version != schema.VERSION and version not in schema.MIGRATIONS:
            raise BrokerRefused(f"{self.path} has schema {version}; this Penstock knows schema {schema.VERSION}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        if not tables:
            connection.executescript(
                f"BEGIN IMMEDIATE; PRAGMA application_id = {schema.APPLICATION_ID}; "
                f"PRAGMA user_version = {schema.VERSION}; {schema.SCHEMA} COMMIT;"
            )
        elif version != schema.VERSION:
            steps = "".join(schema.MIGRATIONS[step] for step in range(version, schema.VERSION))
            connection.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {schema.VERSION}; COMMIT;")
        connection.execute("SELECT count(*) FROM queues").fetchone()

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error, OSError), self._locked():
                self._connection.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
        self.wake_up.close()

    def _translate(self, error: BaseException) -> BaseException:
        if isinstance(error, OSError) and not isinstance(error, BrokerError):
            return BrokerUnavailable(f"{self.path}: {error.strerror or error}")
        if not isinstance(error, sqlite3.Error):
            return error
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return DiskFull(f"{self.path}: the disk is full")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY):
            return self._refused(error)
        return BrokerUnavailable(f"{self.path}: {error}")

    def _refused(self, error: sqlite3.Error) -> BrokerError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return DiskFull(f"{self.path}: the disk is full")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR):
            return BrokerUnavailable(f"{self.path}: {error}")
        return BrokerRefused(f"cannot use {self.path}: {error}")


async def soon(done: asyncio.Future[T]) -> T:
    """The result of something that must not keep a process from ending; it stays under way.

    :raises BrokerUnavailable: not within `LAST_WAIT`.
    """
    done.add_done_callback(lambda done: done.cancelled() or done.exception())  # whether or not anybody waits
    await asyncio.wait((done,), timeout=LAST_WAIT)
    if not done.done():
        raise BrokerUnavailable(f"another process has kept the file locked for {LAST_WAIT:g} s")
    return done.result()


def _resolve(outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for done, outcome in outcomes:
        if done.cancelled():
            continue
        if isinstance(outcome, BaseException):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SqliteFile.forked)
