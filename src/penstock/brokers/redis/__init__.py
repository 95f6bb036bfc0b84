"""`redis://`, `rediss://` and `redis+unix://`: Redis 6.2 or newer, or Valkey, through hiredis."""

from penstock.brokers.redis.broker import RedisBroker

__all__ = ["RedisBroker"]
