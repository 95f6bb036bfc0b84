"""`amqp://` and `amqps://`: RabbitMQ 3.10 or newer, through aiormq."""

from penstock.brokers.amqp.broker import AmqpBroker

__all__ = ["AmqpBroker"]
