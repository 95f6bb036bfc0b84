"""`nats://` and `tls://`: NATS JetStream 2.9 or newer, through nats-py."""

from penstock.brokers.nats.broker import NatsBroker

__all__ = ["NatsBroker"]
