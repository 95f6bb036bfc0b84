"""`redis://`, `rediss://` and `redis+unix://`: entries in a Redis server that many machines share."""

from penstock.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
