"""`App`: what a user declares, and its life from start to stop."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, overload

from penstock import config
from penstock.brokers.base import Broker, Queue
from penstock.brokers.pool import Pool
from penstock.client import Client, SyncClient
from penstock.client.parallel import Parallel
from penstock.client.publishing import check_text, resolve_broker, resolve_store
from penstock.clock import is_seconds
from penstock.codec import Decode
from penstock.context import Settings, importing
from penstock.delivery.arguments import bind, bind_data, function_of, name_of
from penstock.delivery.consumer import queues_of
from penstock.delivery.dead_letters import dead_queue
from penstock.delivery.route import Policy, Route, make_policy
from penstock.delivery.suspects import suspect_queue
from penstock.errors import (
    BrokerUnavailable,
    ConfigError,
    DeclarationError,
    DuplicateQueue,
    DuplicateTask,
    InvalidArguments,
    StoreRequired,
    TimeoutError,
)
from penstock.life import DEAD_LETTERS, Life
from penstock.options import Actions
from penstock.stores.keeper import Keeper
from penstock.tasks.definition import Isolation, TaskFunction
from penstock.tasks.definition import make_policy as make_task_policy
from penstock.tasks.signature import Signature

if TYPE_CHECKING:
    from penstock.control.transactions import Transactions
    from penstock.tasks.instants import Schedule
    from penstock.workers.definition import Mode, Worker

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H", bound=Callable[..., Any])


class _Unset:
    """A keyword that was not given."""

    def __repr__(self) -> str:
        return "…"


UNSET: Any = _Unset()

STORE_WITHIN = 30.0
"""Seconds to reach the store in, each time that a broker has been reached."""


def _through_client(
    verb: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[App, P], Coroutine[Any, Any, R]]:
    """A verb of `Client` as the app's own."""

    async def call(self: App, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await verb(self.client, *args, **kwargs)

    functools.update_wrapper(call, verb)
    return call


class App:
    """Handlers and the message systems they work on.

    `url`: given, else `$PENSTOCK_BROKER`, else `penstock.toml`, else `sqlite:///penstock.db` beside
    `penstock.toml` if there is one above, else here. `host`, `port`, `user` and `password` build an
    AMQP URL instead. `prefetch`: messages a route may hold unsettled, unless it says otherwise.
    `store`: the URL of results and schedules; given, else `$PENSTOCK_STORE`, else `penstock.toml`, else
    the broker's own where that can be a store too, else none. `dead_letters`: the URL of another broker
    for the dead letters. `brokers`: more message systems by name. `memory://` without a name is the
    app's own, and all its parts meet in it.
    `lease`: seconds of silence after which a consumer's messages go to others. `grace`: seconds that
    running handlers get at the stop. `max_body`: bytes of a body, after decompression.

    :raises ConfigError: a URL that no adapter serves, a number that cannot be.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        prefetch: int = 256,
        store: str | None = None,
        dead_letters: str | None = None,
        brokers: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        lease: float = 30,
        grace: float = 30,
        max_body: int = 8 * 2**20,
        host: str | None = None,
        port: int | None = None,
        user: str | None = None,
        password: str | None = None,
        prefetch_count: int | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        account = {"host": host, "port": port, "user": user, "password": password}
        given = {name: value for name, value in account.items() if value is not None}
        if given and url is not None:
            raise ConfigError(f"give a URL or {', '.join(given)}, not both")
        self._given_url = config.amqp_url(**given) if given else url  # type: ignore[arg-type]
        self.prefetch = prefetch if prefetch_count is None else prefetch_count
        for name, value in (("prefetch", self.prefetch), ("max_body", max_body)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number above 0, not {value!r}")
        for name, seconds in (("lease", lease), ("grace", grace)):
            if not is_seconds(seconds, above_zero=name == "lease"):
                raise ConfigError(f"{name} must be a number of seconds above 0, not {seconds!r}")
        self._given_store = store
        self._store: str | None = UNSET
        self.lease = float(lease)
        self.grace = float(grace)
        self.max_body = max_body
        self.settings = Settings(settings or {})
        self.log = logger or logging.getLogger("penstock.app")
        self.routes: list[Route] = []
        self.tasks: dict[str, TaskFunction[..., Any]] = {}
        self.schedules: list[Schedule] = []
        self.workers: dict[str, Worker] = {}
        self._name = uuid.uuid4().hex
        """Of what is in memory and has no name: all parts of this app mean the same, and nobody else does."""
        self._brokers = dict(brokers or {})
        self._dead_letters = dead_letters
        self._owners: dict[tuple[str | None, str | None, str], str] = {}
        self._listeners: list[tuple[str, Callable[..., Any], Decode]] = []
        self._startup: list[Callable[[], Any]] = []
        self._shutdown: list[Callable[[], Any]] = []
        self._client: Client | None = None
        self._sync: SyncClient | None = None
        self._life: Life | None = None
        self._url: str | None = None
        self._new_client()  # a URL that no adapter serves is told here

    # -- declaring

    def route(
        self,
        queues: str | Iterable[str],
        *,
        vhost: str | None = None,
        topics: Iterable[str] = (),
        broker: str | None = None,
        bulk_size: int = UNSET,
        bulk_timeout: float | None = UNSET,
        concurrency: int = UNSET,
        prefetch: int | None = UNSET,
        on_success: Actions = UNSET,
        on_exception: Actions = UNSET,
        max_attempts: int | None = UNSET,
        backoff: tuple[float, float] = UNSET,
        priorities: int = UNSET,
        ordered: bool = UNSET,
        options: Mapping[Any, Any] | None = None,
    ) -> Callable[[H], H]:
        """Declare the handler of some queues.

        The handler takes one argument, whose annotation decides the shape: none or `list[Message]`,
        batches of up to `bulk_size` (1), gathered for at most `bulk_timeout` (1.0) seconds, None until
        full; `Message`, one by one, `concurrency` (1) at once; any other type or a list of it, decoded
        and validated bodies. A plain `def` runs in a thread.

        `topics`: further names the queues are bound to. `on_success` (ACK) and `on_exception` (REQUEUE)
        decide about messages without a verdict of their own. A message that has failed is retried by
        itself after a delay of `backoff` (1, 300: first and longest, in seconds, with full jitter), and
        goes to the dead letters after `max_attempts` (10; None: never). `ordered`: messages of one key
        one after another. `options={Options.BULK_SIZE: 1000, …}` says the same as the keywords.

        :raises ConfigError: an unknown option, a value that cannot be.
        :raises DeclarationError: a handler that could not be called with a message.
        :raises DuplicateQueue: a queue that another handler of this app owns.
        """
        if callable(queues):
            name = name_of(queues)
            raise DeclarationError(f"@app.route takes the names of queues: write @app.route('…') above {name}")
        names = _texts("a queue's name", queues)
        bound = _texts("a topic", topics)
        if not names:
            raise DeclarationError("a route needs at least one queue")
        keywords = {
            "bulk_size": bulk_size,
            "bulk_timeout": bulk_timeout,
            "concurrency": concurrency,
            "prefetch": prefetch,
            "on_success": on_success,
            "on_exception": on_exception,
            "max_attempts": max_attempts,
            "backoff": backoff,
            "priorities": priorities,
            "ordered": ordered,
        }
        given = {name: value for name, value in keywords.items() if value is not UNSET}
        policy = make_policy(given, options or {})
        if broker is not None and broker not in self._brokers:
            raise ConfigError(f"no broker is named {broker!r}: give it in App(brokers={{…}})")

        def declare(handler: H) -> H:
            self._add(names, bound, handler, policy, broker, vhost)
            return handler

        return declare

    def _add(
        self,
        names: tuple[str, ...],
        topics: tuple[str, ...],
        handler: Callable[..., Any],
        policy: Policy,
        broker: str | None,
        vhost: str | None,
    ) -> None:
        binding = bind(handler)
        label = name_of(handler)
        if len(set(names)) < len(names):
            raise DeclarationError(f"{label}: a queue is named twice in {names}")
        route = Route(
            name=label,
            queues=names,
            topics=topics,
            handler=handler,
            binding=binding,
            policy=policy,
            broker=broker,
            vhost=vhost,
            prefetch=policy.prefetch or self.prefetch,
        )
        self._own(route)
        if route.one_by_one and policy.bulk_size > 1:
            self.log.warning("%s takes one message at a time: bulk_size=%d has no effect", label, policy.bulk_size)
        elif route.bulk_size < policy.bulk_size:
            text = "%s: batches hold at most %d messages, not bulk_size=%d: prefetch=%d is for concurrency=%d of them"
            self.log.warning(text, label, route.bulk_size, policy.bulk_size, route.prefetch, policy.concurrency)
        self.routes.append(route)

    def _own(self, route: Route) -> None:
        """:raises DuplicateQueue: another handler has one of its queues."""
        names = [queue for name in route.queues for queue in (name, suspect_queue(name))]
        consumed = {(route.broker, route.vhost, queue): route.name for queue in names}
        for address in consumed:
            owner = self._owners.get(address)
            if owner is not None:
                raise DuplicateQueue(address[2], owner)
        self._owners.update(consumed)

    @overload
    def task(self, name: Callable[P, R], /) -> TaskFunction[P, R]: ...

    @overload
    def task(
        self,
        name: str | None = None,
        *,
        topics: Iterable[str] = (),
        timeout: float | None = None,
        isolation: Isolation = "auto",
        retries: int = 0,
        backoff: tuple[float, float] = (1, 300),
        priorities: int = 10,
        concurrency: int = 1,
        cluster_limit: int | None = None,
        rate_limit: float | str | None = None,
        expires: float | None = None,
        result_ttl: float | None = 86_400,
    ) -> Callable[[Callable[P, R]], TaskFunction[P, R]]: ...

    def task(
        self,
        name: str | Callable[..., Any] | None = None,
        *,
        topics: Iterable[str] = (),
        timeout: float | None = None,
        isolation: Isolation = "auto",
        retries: int = 0,
        backoff: tuple[float, float] = (1, 300),
        priorities: int = 10,
        concurrency: int = 1,
        cluster_limit: int | None = None,
        rate_limit: float | str | None = None,
        expires: float | None = None,
        result_ttl: float | None = 86_400,
    ) -> Any:
        """Declare a task: a function that is called through a queue. `@app.task`, `@app.task("name", …)`.

        The queue has the task's name, which is the function's unless given, and is bound to `topics` too.
        The function's parameters are filled from what is sent, converted to their annotations; one named
        `task`, or annotated `Task`, gets the whole record.

        `timeout`: seconds a run may take, then it is stopped. `isolation`: "auto" runs a coroutine in the
        event loop and a plain function in a thread; "thread", "process" as they say; only a process can be
        stopped for certain, wherever it hangs. `retries`: further attempts after a failure, each after a
        delay of `backoff` (first, longest; exponential, full jitter). `priorities`: levels of the queue.
        `concurrency`: runs at once in this process. `cluster_limit`: runs at once in all processes.
        `rate_limit`: runs begun a second, or text such as "100/m", in all processes. `expires`: seconds
        within which somebody must take it, unless the sender says otherwise. `result_ttl`: seconds that a
        task is remembered after its end.

        :raises ConfigError: a value that cannot be.
        :raises DeclarationError: a function that could not be called.
        :raises DuplicateTask: the app has a task of that name.
        :raises DuplicateQueue: a route owns that queue.
        :raises StoreRequired: a limit of the cluster, and nothing to keep it in.
        """
        options = {
            "timeout": timeout,
            "isolation": isolation,
            "retries": retries,
            "backoff": backoff,
            "priorities": priorities,
            "concurrency": concurrency,
            "cluster_limit": cluster_limit,
            "rate_limit": rate_limit,
            "expires": expires,
            "result_ttl": result_ttl,
        }
        policy = make_task_policy(options)
        bound = _texts("a topic", topics)
        for what in ("cluster_limit", "rate_limit"):
            if options[what] is not None and self.store is None:
                raise StoreRequired(what)

        def declare(function: Callable[..., Any]) -> TaskFunction[..., Any]:
            given = None if callable(name) else name
            found = given if given is not None else getattr(function_of(function), "__name__", "")
            _check_name("a task's name", found)
            task: TaskFunction[..., Any] = TaskFunction(function, found, bound, policy, lambda: self.client, self)
            self._adopt(task)
            return task

        return declare(name) if callable(name) else declare

    def _adopt(self, task: TaskFunction[..., Any]) -> None:
        """:raises DuplicateTask, DuplicateQueue: its name, or its queue, is another one's."""
        if task.name in self.tasks:
            raise DuplicateTask(task.name, name_of(self.tasks[task.name].function))
        self._own(task.route)
        self.tasks[task.name] = task
        self.routes.append(task.route)

    def _disown(self, task: TaskFunction[..., Any]) -> None:
        """The reverse, of a task that is not run any more."""
        del self.tasks[task.name]
        self.routes.remove(task.route)
        for queue in (task.name, suspect_queue(task.name)):
            del self._owners[task.route.broker, task.route.vhost, queue]

    def every(self, seconds: float, **options: Any) -> Callable[[Any], TaskFunction[..., Any]]:
        """Declare a task that is enqueued every `seconds`, once in the cluster: at the multiples of that
        interval since 1970 (UTC). `options` are those of `task`.

        :raises StoreRequired: there is no store in which processes agree.
        :raises ConfigError, DeclarationError: as `task`; an interval under 0.01 seconds.
        """
        from penstock.tasks.instants import Every  # not everybody's: it costs some milliseconds of each start

        return self._schedule("every", lambda name: Every(name, seconds), options)

    def cron(
        self, expression: str, timezone: str | None = None, **options: Any
    ) -> Callable[[Any], TaskFunction[..., Any]]:
        """Declare a task that is enqueued at the instants of a cron expression, once in the cluster.

        `timezone` is one of the IANA names, "Asia/Tokyo" say; none is UTC. `options` are those of `task`.

        :raises StoreRequired: there is no store in which processes agree.
        :raises ConfigError, DeclarationError: as `task`; an expression or zone that there is not.
        """
        from penstock.tasks.instants import Cron

        return self._schedule("cron", lambda name: Cron(name, expression, timezone), options)

    def _schedule(
        self, what: str, make: Callable[[str], Schedule], options: dict[str, Any]
    ) -> Callable[[Any], TaskFunction[..., Any]]:
        make("any")  # what is wrong with it is told where it stands
        if self.store is None:
            raise StoreRequired(what)

        def declare(function: Any) -> TaskFunction[..., Any]:
            if isinstance(function, TaskFunction) and options:
                text = f"{function.name} is a task already: give @app.task its options, {', '.join(options)}"
                raise DeclarationError(text)
            bare = function.function if isinstance(function, TaskFunction) else function
            try:
                Signature(bare).bind({"args": [], "kwargs": {}}, arguments=True)
            except InvalidArguments as error:
                raise DeclarationError(f"it is enqueued without arguments: {error}") from None
            task = function if isinstance(function, TaskFunction) else self.task(**options)(function)
            if any(one.name == task.name for one in self.schedules):
                raise DeclarationError(f"{task.name} has a schedule already: declare another task for the other one")
            self.schedules.append(make(task.name))
            return task

        return declare

    def subscribe(self, topic: str) -> Callable[[H], H]:
        """Declare a handler of what is broadcast to a topic while this app runs.

        It takes one argument, the data, decoded and validated into its annotation if it has one. Calls
        do not overlap. A plain `def` runs in a thread.

        :raises DeclarationError: a handler that could not be called with one argument.
        """
        _check_name("a topic", topic)

        def declare(handler: H) -> H:
            self._listeners.append((topic, handler, bind_data(handler)))
            return handler

        return declare

    def worker(
        self,
        mode: Mode = "single",
        watch_interval: float = 10,
        *,
        name: str | None = None,
        backoff: tuple[float, float] = (1, 300),
        category: str | None = None,
    ) -> Callable[[H], H]:
        """Declare a worker: a function without parameters that is resident while the app runs.

        When it ends it is run again after `watch_interval` seconds, when it raises after a delay of
        `backoff` (first, longest; exponential, full jitter). `single`: one process of those that share the
        store is elected to run it; `multi`: every process does. A loop asks `Runtime.running()`: at the stop
        that is false, and after the app's grace the function is cancelled, again and again until it has
        ended. A plain `def` runs in a thread. `category` is a free label.

        :raises ConfigError: a value that cannot be.
        :raises DeclarationError: a function that could not be called, a name that another worker has.
        :raises StoreRequired: a `single` worker, and no store in which processes agree.
        """
        if callable(mode):
            raise DeclarationError(f"@app.worker takes its mode: write @app.worker('multi') above {name_of(mode)}")
        from penstock.workers.definition import make_worker

        if mode == "single" and self.store is None:
            raise StoreRequired("a single worker")

        def declare(function: H) -> H:
            found = name if name is not None else getattr(function_of(function), "__name__", "")
            _check_name("a worker's name", found)
            worker = make_worker(function, found, mode, watch_interval, backoff, category)
            if found in self.workers:
                raise DeclarationError(f"two workers are named {found!r}")
            self.workers[found] = worker
            return function

        return declare

    def on_startup(self, hook: H) -> H:
        """Call `hook()` before consuming begins; plain or async. An error in it ends the start."""
        self._startup.append(hook)
        return hook

    def on_shutdown(self, hook: H) -> H:
        """Call `hook()` after the last handler has ended; plain or async. The last declared goes first."""
        self._shutdown.append(hook)
        return hook

    # -- the calling side

    @property
    def url(self) -> str:
        """The main broker's URL."""
        if self._url is None:
            self._url = resolve_broker(self._given_url)
        return self._url

    @url.setter
    def url(self, value: str) -> None:
        if self._client is not None or self._life is not None:
            raise ConfigError("the broker's URL cannot change while the app is in use")
        self._given_url, self._url, self._store = value, None, UNSET
        self._new_client()

    @property
    def store(self) -> str | None:
        """The store's URL; None: there is none.

        :raises ConfigError: a URL that no adapter serves.
        """
        if self._store is UNSET:
            self._store = resolve_store(self._given_store, self.url)
        return self._store

    @property
    def client(self) -> Client:
        """The app's calling side. `async with app.client:` bounds its connections."""
        if self._client is None:
            self._client = self._new_client()
        return self._client

    @property
    def sync(self) -> SyncClient:
        """The calling side for threads and scripts: the same verbs, blocking."""
        if self._sync is None:
            self._sync = SyncClient(make=self._new_client)
        return self._sync

    @functools.cached_property
    def transactions(self) -> Transactions:
        """The transactions in the store: `get`, `list`, `suspend`, `resume`, `cancel`."""
        from penstock.control.transactions import Transactions

        return Transactions(lambda: self.client)

    publish = _through_client(Client.publish)
    publish_many = _through_client(Client.publish_many)
    broadcast = _through_client(Client.broadcast)

    send = _through_client(Client.send)
    call = _through_client(Client.call)
    waitfor = _through_client(Client.waitfor)

    def parallel(self) -> Parallel:
        """`async with app.parallel() as calls:` makes calls at the same time; see `Parallel`."""
        return self.client.parallel()

    def _new_client(self) -> Client:
        """:raises ConfigError: a URL that no adapter serves."""
        named = dict(self._brokers)
        if self._dead_letters is not None:
            named[DEAD_LETTERS] = self._dead_letters

        async def opened(name: str | None, vhost: str | None, broker: Broker) -> None:
            await self._declare_queues(name, vhost, broker, client)

        urls = {alias: config.named(url, f"{self._name}/{alias}") for alias, url in named.items()}
        pool = Pool(config.named(self.url, self._name), urls, opened)
        store = None if self.store is None else config.named(self.store, self._name)
        client = Client(pool=pool, keeper=Keeper(store), max_body=self.max_body, fits=self._check_arguments)
        return client

    def _check_arguments(self, name: str, body: bytes, headers: Mapping[str, Any]) -> None:
        """:raises InvalidArguments: the task of that name is here, and could not be called with that."""
        task = self.tasks.get(name)
        if task is not None:
            task.signature.decode(body, headers, self.max_body)

    async def _declare_queues(self, name: str | None, vhost: str | None, broker: Broker, client: Client) -> None:
        """What this app consumes exists from the first connection on, so that it can publish to itself."""
        wanted: list[tuple[Route, Queue]] = []
        for route in self.routes:
            ours = (route.broker, route.vhost) == (name, vhost)
            letters = {dead_queue(own) for own in route.queues} if name == DEAD_LETTERS else set[str]()
            wanted += [(route, queue) for queue in queues_of(route) if ours or queue.name in letters]
        # What a topic may reach is declared one after another: what is published meanwhile misses as little as can be.
        wanted.sort(key=lambda one: (one[1].lane_of is not None, one[1].name in one[0].queues))
        for route, queue in wanted:
            if route in self.routes:  # it was not given up meanwhile
                await broker.declare(queue)
        if self.tasks and self.store is not None and (name, vhost) == (None, None):
            try:
                ledger = await client._ledger(STORE_WITHIN)
            except TimeoutError as error:
                raise BrokerUnavailable(str(error)) from error
            for task in list(self.tasks.values()):
                if task.name not in self.tasks:
                    continue
                await ledger.topics.register(task.name, task.topics)

    # -- running

    async def __aenter__(self) -> Self:
        """Start consuming in the running loop; leaving the block drains and stops.

        :raises BrokerRefused: the message system will not have us.
        """
        if self._life is not None:
            raise RuntimeError("the app is running already")
        self._life = Life(self)
        try:
            await self._life.start()
        except BaseException:
            await self._life.stop(self.grace)  # some routes may be at work already
            self._life = None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        life, self._life = self._life, None
        if life is not None:
            await life.stop(self.grace)

    @property
    def consuming(self) -> bool:
        """Whether every route is connected and would get messages now."""
        return self._life is not None and self._life.consuming

    def run(self, **settings: Any) -> None:
        """Consume until SIGTERM or SIGINT, then drain; keywords become `context.settings`.

        Reads `-v`, `--log-level`, `--log-format`, `--broker`, `-H` and `-P` from the command line, and
        logs to stderr unless logging is set up already. Exits with 1 and one line when the start fails.
        """
        from penstock import running

        if importing.get():
            raise ConfigError("app.run() is for scripts: put it under `if __name__ == '__main__':`")
        self.settings.update(settings)
        running.run_from_argv(self)


def _texts(what: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several.

    :raises DeclarationError: as `_check_name`.
    """
    if not isinstance(given, str | Iterable):
        raise DeclarationError(f"{what} is text and not empty, not {given!r}")
    texts = (given,) if isinstance(given, str) else tuple(given)
    for text in texts:
        _check_name(what, text)
    return texts


def _check_name(what: str, name: Any) -> None:
    """:raises DeclarationError: not a name that every message system could carry."""
    if not isinstance(name, str) or not name:
        raise DeclarationError(f"{what} is text and not empty, not {name!r}")
    try:
        check_text(what, name)
    except ValueError as error:
        raise DeclarationError(str(error)) from None
