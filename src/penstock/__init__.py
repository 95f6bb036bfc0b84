"""Penstock carries work from any message system to Python handlers and never loses a message on the way."""

from penstock.app import App
from penstock.client import Client, SyncClient
from penstock.context import context
from penstock.errors import (
    BodyTooLarge,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    ConfigError,
    DeclarationError,
    DuplicateQueue,
    InvalidMessage,
    PenstockError,
    PublishError,
    PublishTimeout,
    QueueFull,
    QueueMismatch,
    StorageFull,
    Unavailable,
    Unencodable,
    Unroutable,
    Unsupported,
)
from penstock.message import Message
from penstock.options import Actions, Events, Options
from penstock.timeit import Timeit

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
    "Events",
    "InvalidMessage",
    "Message",
    "Options",
    "PenstockError",
    "PublishError",
    "PublishTimeout",
    "QueueFull",
    "QueueMismatch",
    "StorageFull",
    "SyncClient",
    "Timeit",
    "Unavailable",
    "Unencodable",
    "Unroutable",
    "Unsupported",
    "context",
]
