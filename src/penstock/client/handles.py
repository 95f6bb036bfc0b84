"""`Handle`: a task that was sent, to be waited for or cancelled."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from penstock.client.calls import raise_failure
from penstock.errors import ExpirationError, PenstockError, RemoteError, TaskCancelled
from penstock.stores.ledger import MOST_BODY
from penstock.stores.records import Standing, TaskRecord

if TYPE_CHECKING:
    from penstock.client.client import Client
    from penstock.client.tasks import Asking

T = TypeVar("T")


class Handle(str):
    """The id of a task that was sent. It is text, and may be stored or sent as such."""

    __slots__ = ("_client", "_typed")

    _client: Asking
    _typed: Callable[[Any], Any] | None

    def __new__(cls, taskid: str, client: Asking, typed: Callable[[Any], Any] | None = None) -> Handle:
        """`typed` makes of what came as JSON what the task's function is declared to return."""
        handle = super().__new__(cls, taskid)
        handle._client, handle._typed = client, typed
        return handle

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Copied or pickled it is the id alone: a connection is in one process and event loop."""
        return str, (str(self),)

    async def result(self, timeout: float | None = None) -> Any:
        """What the task's one run returned, once it has ended: as what the function is annotated to return,
        where it was sent by that.

        :raises RemoteError: the run failed.
        :raises TimeoutError: it has not ended within `timeout` seconds, or was stopped at its own limit.
        :raises ExpirationError: nobody took it in time.
        :raises TaskCancelled: as it says.
        :raises StoreRequired: nothing remembers results.
        :raises PenstockError: it has several runs: `waitfor` tells of all.
        """
        value = outcome(await self._client._wait(self, timeout, "result()"))
        return value if self._typed is None else self._typed(value)

    async def record(self) -> TaskRecord:
        """All that is known of it now."""
        return await self._client._record(self)

    async def cancel(self) -> bool:
        """Have it end: untaken, it is never begun; running, it is stopped. False: it had ended.

        :raises StoreRequired: nothing would remember it.
        """
        return await self._client._cancel(self)


class SyncHandle(str):
    """The blocking twin."""

    __slots__ = ("_run",)

    _run: Callable[[Callable[[Client], Coroutine[Any, Any, Any]]], Any]

    def __new__(cls, taskid: str, run: Callable[[Callable[[Client], Coroutine[Any, Any, Any]]], Any]) -> SyncHandle:
        handle = super().__new__(cls, taskid)
        handle._run = run
        return handle

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """As `Handle`'s."""
        return str, (str(self),)

    def result(self, timeout: float | None = None) -> Any:
        """As `Handle.result`."""
        return self._run(lambda client: Handle(self, client).result(timeout))

    def record(self) -> TaskRecord:
        """As `Handle.record`."""
        record: TaskRecord = self._run(lambda client: Handle(self, client).record())
        return record

    def cancel(self) -> bool:
        """As `Handle.cancel`."""
        return bool(self._run(lambda client: Handle(self, client).cancel()))


def outcome(task: Standing) -> Any:
    """The result of the one run of a task that has ended, or its error raised."""
    if task.state == "expired":
        raise ExpirationError(f"nobody took task {task.taskid} in time")
    if task.state == "cancelled" and not task.runs:
        raise TaskCancelled(task.taskid)
    if len(task.runs) != 1:
        raise PenstockError(f"task {task.taskid} has {len(task.runs)} runs, not one: waitfor() tells of all")
    (run,) = task.runs.values()
    if run.state == "cancelled":
        raise TaskCancelled(task.taskid)
    if run.state == "failed":
        if run.error is None:
            raise RemoteError("Exception", "it is not known why")
        raise_failure(run.error)
    return None if run.result is None else run.result.value(MOST_BODY)
