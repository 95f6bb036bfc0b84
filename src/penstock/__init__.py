"""Penstock carries work from any message system to Python handlers and never loses a message on the way."""

from penstock.app import App
from penstock.client import Client, SyncClient
from penstock.client.handles import Handle
from penstock.context import context
from penstock.errors import (
    BodyTooLarge,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    ConfigError,
    DeclarationError,
    DuplicateQueue,
    DuplicateTask,
    ExpirationError,
    InvalidArguments,
    InvalidMessage,
    NotUnique,
    PenstockError,
    PublishError,
    PublishTimeout,
    QueueFull,
    QueueMismatch,
    RemoteError,
    StorageFull,
    StoreRequired,
    TaskCancelled,
    TransactionAborted,
    TransactionCancelled,
    TransactionConflict,
    TransactionError,
    TransactionStopped,
    TransactionSuspended,
    Unavailable,
    Unencodable,
    UnknownDefinition,
    UnknownQueue,
    UnknownTask,
    UnknownTransaction,
    UnknownWorker,
    Unroutable,
    Unsupported,
)
from penstock.errors import TimeoutError as TimeoutError  # not for `import *`: it would hide the builtin
from penstock.message import Message
from penstock.options import Actions, Events, Options
from penstock.stores.records import TaskRecord
from penstock.tasks.journal import TransactionRecord
from penstock.tasks.signature import Task
from penstock.tasks.transaction import transaction
from penstock.terms import Reply
from penstock.timeit import Timeit
from penstock.workers.runtime import Runtime

__version__ = "0.1.0"

__all__ = [
    "Actions",
    "App",
    "BodyTooLarge",
    "BrokerError",
    "BrokerRefused",
    "BrokerUnavailable",
    "Client",
    "ConfigError",
    "DeclarationError",
    "DuplicateQueue",
    "DuplicateTask",
    "Events",
    "ExpirationError",
    "Handle",
    "InvalidArguments",
    "InvalidMessage",
    "Message",
    "NotUnique",
    "Options",
    "PenstockError",
    "PublishError",
    "PublishTimeout",
    "QueueFull",
    "QueueMismatch",
    "RemoteError",
    "Reply",
    "Runtime",
    "StorageFull",
    "StoreRequired",
    "SyncClient",
    "Task",
    "TaskCancelled",
    "TaskRecord",
    "Timeit",
    "TransactionAborted",
    "TransactionCancelled",
    "TransactionConflict",
    "TransactionError",
    "TransactionRecord",
    "TransactionStopped",
    "TransactionSuspended",
    "Unavailable",
    "Unencodable",
    "UnknownDefinition",
    "UnknownQueue",
    "UnknownTask",
    "UnknownTransaction",
    "UnknownWorker",
    "Unroutable",
    "Unsupported",
    "context",
    "transaction",
]
