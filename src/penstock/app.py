"""`App`: what a user declares, and its life from start to stop."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from penstock import config
from penstock.brokers.base import Broker
from penstock.brokers.pool import Pool
from penstock.client import Client, SyncClient
from penstock.client.client import resolve_broker
from penstock.codec import Decode
from penstock.context import Settings, current_app
from penstock.delivery.arguments import bind, bind_data, name_of
from penstock.delivery.consumer import Consumer, queues_of
from penstock.delivery.dead_letters import dead_queue
from penstock.delivery.execution import Executor
from penstock.delivery.route import Policy, Route, make_policy
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import Solitude, suspect_queue
from penstock.delivery.watchdog import Watchdog
from penstock.errors import BrokerUnavailable, ConfigError, DeclarationError, DuplicateQueue
from penstock.options import Actions

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H", bound=Callable[..., Any])

FIRST_RETRY, LONGEST_RETRY = 0.5, 10.0  # seconds between tries to reach a broker at the start

DEAD_LETTERS = "dead letters"
"""The pool's name for the broker of `App(dead_letters=…)`."""


class _Unset:
    """A keyword that was not given."""

    def __repr__(self) -> str:
        return "…"


UNSET: Any = _Unset()


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
    `store`: the URL of results and schedules; nothing in this version needs one. `dead_letters`:
    the URL of another broker for the dead letters. `brokers`: more message systems by name.
    `lease`: seconds of silence after which a consumer's messages go to others. `grace`: seconds that
    running handlers get at the stop. `max_body`: bytes of a body, after decompression.

    :raises ConfigError: a URL that no adapter serves, a number that cannot be.
    """

    importing = False
    """The command line is importing the module of an app, to look at it or to run it itself."""

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
            if not isinstance(seconds, int | float) or not seconds >= 0 or (name == "lease" and seconds == 0):
                raise ConfigError(f"{name} must be a number of seconds above 0, not {seconds!r}")
        self.store = store
        self.lease = float(lease)
        self.grace = float(grace)
        self.max_body = max_body
        self.settings = Settings(settings or {})
        self.log = logger or logging.getLogger("penstock.app")
        self.routes: list[Route] = []
        self._brokers = dict(brokers or {})
        self._dead_letters = dead_letters
        self._owners: dict[tuple[str | None, str | None, str], str] = {}
        self._listeners: list[tuple[str, Callable[..., Any], Decode]] = []
        self._startup: list[Callable[[], Any]] = []
        self._shutdown: list[Callable[[], Any]] = []
        self._client: Client | None = None
        self._sync: SyncClient | None = None
        self._life: _Life | None = None
        self._url: str | None = None
        self._new_pool()  # a URL that no adapter serves is told here

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
        names = (queues,) if isinstance(queues, str) else tuple(queues)
        bound = (topics,) if isinstance(topics, str) else tuple(topics)
        for name in (*names, *bound):
            if not isinstance(name, str) or not name:
                raise DeclarationError(f"a queue's name is text and not empty, not {name!r}")
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
        consumed = {(broker, vhost, queue): label for name in names for queue in (name, suspect_queue(name))}
        for address in consumed:
            owner = self._owners.get(address)
            if owner is not None:
                raise DuplicateQueue(address[2], owner)
        self._owners.update(consumed)
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
        if route.one_by_one and policy.bulk_size > 1:
            self.log.warning("%s takes one message at a time: bulk_size=%d has no effect", label, policy.bulk_size)
        elif route.bulk_size < policy.bulk_size:
            text = "%s: batches hold at most %d messages, not bulk_size=%d: prefetch=%d is for concurrency=%d of them"
            self.log.warning(text, label, route.bulk_size, policy.bulk_size, route.prefetch, policy.concurrency)
        self.routes.append(route)

    def subscribe(self, topic: str) -> Callable[[H], H]:
        """Declare a handler of what is broadcast to a topic while this app runs.

        It takes one argument, the data, decoded and validated into its annotation if it has one. Calls
        do not overlap. A plain `def` runs in a thread.

        :raises DeclarationError: a handler that could not be called with one argument.
        """
        if not isinstance(topic, str) or not topic:
            raise DeclarationError(f"a topic is text and not empty, not {topic!r}")

        def declare(handler: H) -> H:
            self._listeners.append((topic, handler, bind_data(handler)))
            return handler

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
        self._given_url, self._url = value, None
        self._new_pool()

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

    publish = _through_client(Client.publish)
    publish_many = _through_client(Client.publish_many)
    broadcast = _through_client(Client.broadcast)

    def _new_pool(self) -> Pool:
        """:raises ConfigError: a URL that no adapter serves."""
        named = dict(self._brokers)
        if self._dead_letters is not None:
            named[DEAD_LETTERS] = self._dead_letters
        return Pool(self.url, named, self._declare_queues)

    def _new_client(self) -> Client:
        return Client(pool=self._new_pool(), max_body=self.max_body)

    async def _declare_queues(self, name: str | None, vhost: str | None, broker: Broker) -> None:
        """What this app consumes exists from the first connection on, so that it can publish to itself."""
        if name == DEAD_LETTERS:
            for route in self.routes:
                for queue in queues_of(route):
                    if queue.name == dead_queue(queue.name.removesuffix(".dead")):
                        await broker.declare(queue)
            return
        for route in self.routes:
            if (route.broker, route.vhost) == (name, vhost):
                for queue in queues_of(route):
                    await broker.declare(queue)

    # -- running

    async def __aenter__(self) -> Self:
        """Start consuming in the running loop; leaving the block drains and stops.

        :raises BrokerRefused: the message system will not have us.
        """
        if self._life is not None:
            raise RuntimeError("the app is running already")
        self._life = _Life(self)
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

        if App.importing:
            raise ConfigError("app.run() is for scripts: put it under `if __name__ == '__main__':`")
        self.settings.update(settings)
        running.run_from_argv(self)


class _Life:
    """One run of an app, from start to stop."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._consumers: list[Consumer] = []
        self._executors: list[Executor] = []
        self._watchdog = Watchdog()
        self._watching = False
        self._started_hooks = False
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    @property
    def consuming(self) -> bool:
        return bool(self._consumers) and all(consumer.consuming for consumer in self._consumers)

    async def start(self) -> None:
        app = self._app
        current_app.set(app)
        for route in app.routes:
            await self._broker(route.broker, route.vhost)  # before the hooks: a wrong URL costs nothing yet
        self._started_hooks = True
        for hook in app._startup:
            await _call(hook)
        dead = await self._broker(DEAD_LETTERS, None) if app._dead_letters is not None else None
        around = Surroundings(solitude=Solitude(), lease=app.lease, max_body=app.max_body, dead_letters=dead)
        self._watchdog.__enter__()
        self._watching = True
        for topic, handler, decode in app._listeners:
            executor = Executor(handler, 1, name_of(handler))
            self._executors.append(executor)
            await app.client._listening.add(topic, executor.call, decode)
        for route in app.routes:
            broker = await self._broker(route.broker, route.vhost)
            consumer = Consumer(route, broker, around, self._fail)
            await consumer.start()
            self._consumers.append(consumer)
        app.log.info("consuming %s from %s", ", ".join(self._queues()) or "nothing", config.mask(app.url))

    def _queues(self) -> list[str]:
        return [name for route in self._app.routes for name in route.queues]

    async def _broker(self, name: str | None, vhost: str | None) -> Broker:
        """A connected broker; one that cannot be reached is tried until it can."""
        delay = FIRST_RETRY
        while True:
            try:
                return await self._app.client._pool.get(name, vhost)
            except BrokerUnavailable as error:
                self._app.log.warning("broker not reachable, again in %.1f s: %s", delay, error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, LONGEST_RETRY)

    def _fail(self, error: BaseException) -> None:
        self._app.log.critical("consuming cannot go on: %s: %s", type(error).__name__, error)
        if not self.failed.done():
            self.failed.set_result(error)

    def cancel(self) -> None:
        """Cut the grace short: cancel the handler calls under way. `stop` then releases their messages."""
        for consumer in self._consumers:
            consumer.cancel()

    async def stop(self, grace: float) -> None:
        app = self._app
        await asyncio.gather(*(consumer.stop(grace) for consumer in self._consumers))
        if self._started_hooks:
            for hook in reversed(app._shutdown):
                try:
                    await _call(hook)
                except Exception:
                    app.log.exception("shutdown hook %r failed", hook)
        for executor in self._executors:
            executor.close()
        if self._watching:
            self._watchdog.__exit__(None, None, None)
        if app._client is not None:
            await app._client.close()
            app._client = None


async def _call(hook: Callable[[], Any]) -> None:
    result = hook()
    if inspect.isawaitable(result):
        await result
