"""A web site on Tornado that leaves the work to `worker.py`.

PENSTOCK_BROKER=amqp://guest:guest@127.0.0.1/ python site_tornado.py --port 8888
"""

import argparse
import asyncio
import logging
import signal

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from penstock import BodyTooLarge, BrokerUnavailable, Client, ExpirationError, PenstockError, RemoteError, Unroutable

LONGEST_POLL = 30  # seconds: proxies cut what is silent for longer

client = Client()  # one for the whole process, at $PENSTOCK_BROKER
polls = set()  # futures of those who wait for the next broadcast
under_way = set()  # requests that are not answered yet
all_answered = asyncio.Event()


def tell_polls(data):
    for poll in polls:
        if not poll.done():
            poll.set_result(data if isinstance(data, bytes) else str(data))


listener = client.subscribe("test", tell_polls)  # there need not be an event loop yet


def explain(error):
    """The HTTP status and text for a call that failed."""
    match error:
        case TimeoutError():
            return 504, "Timeout"
        case ExpirationError() | Unroutable():
            return 503, "All workers are gone"
        case BrokerUnavailable():
            return 503, "The connection was lost: it may have been done, or not"
        case BodyTooLarge():
            return 413, "Too much"
        case RemoteError():
            return 502, "The worker failed"
        case _:
            return 500, "Internal Server Error"


class Handler(RequestHandler):
    def prepare(self):
        under_way.add(self)

    def on_finish(self):
        under_way.discard(self)
        if not under_way:
            all_answered.set()

    def set_default_headers(self):
        self.set_header("Content-Type", "text/plain; charset=utf-8")

    def write_error(self, status_code, **kwargs):
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, PenstockError):
            status_code, text = explain(error)
            self.set_status(status_code)
            self.finish(text)
        else:
            self.finish(self._reason)

    def log_exception(self, kind, error, trace):
        if isinstance(error, RemoteError):
            logging.error("the worker failed: %s\n%s", error, error.traceback)
        elif explain(error)[0] == 500:
            super().log_exception(kind, error, trace)


class MainHandler(Handler):
    async def get(self):
        answer = await client.call("test", priority=100)
        self.write(f"{type(answer).__name__}: {answer}")


class StatHandler(Handler):
    async def get(self):
        answer, headers = await client.call("stat", persistent=False, priority=0, with_headers=True)
        self.set_header("X-Worker", headers["worker"])
        self.write(f"{type(answer).__name__}: {answer}")


class FastHandler(Handler):
    async def get(self):
        # Three seconds for somebody to take it, and ten for the answer.
        answer = await client.call("dead", persistent=False, priority=255, expires=3, timeout=10)
        self.write(f"{type(answer).__name__}: {answer}")


class LongPollingHandler(Handler):
    async def get(self):
        self.poll = asyncio.get_running_loop().create_future()
        polls.add(self.poll)
        try:
            async with asyncio.timeout(LONGEST_POLL):
                self.write(await self.poll)
        except TimeoutError:
            self.set_status(204)  # nothing was said: ask again
        except asyncio.CancelledError:
            pass  # there is nobody to tell any more
        finally:
            polls.discard(self.poll)

    def on_connection_close(self):
        super().on_connection_close()
        self.poll.cancel()


class PublishHandler(Handler):
    """By way of the worker."""

    async def post(self):
        await client.call("publish", self.request.body)
        self.set_status(204)


class PublishHandler2(Handler):
    """Straight from here."""

    async def post(self):
        await client.broadcast("test", self.request.body)
        self.set_status(204)


class ParallelHandler(Handler):
    async def get(self):
        async with client.parallel() as calls:
            calls.call("test")
            calls.call("stat")
        test, stat = (f"failed, {one}" if isinstance(one, Exception) else one for one in calls.results)
        self.write(f"Test result: {test}\nStat result: {stat}")


site = Application(
    [
        ("/", MainHandler),
        ("/stat", StatHandler),
        ("/fast", FastHandler),
        ("/subscribe", LongPollingHandler),
        ("/publish", PublishHandler),
        ("/publish2", PublishHandler2),
        ("/parallel", ParallelHandler),
    ]
)


async def main(port):
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with client:  # closed at the end of the block
        await client.connect()
        await listener  # it hears from here on
        sockets = bind_sockets(port, "127.0.0.1")
        server = HTTPServer(site)
        server.add_sockets(sockets)
        print(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", flush=True)
        await stop.wait()
        server.stop()
        tell_polls(b"")  # let go of who polls, rather than wait for them
        if under_way:
            all_answered.clear()
            async with asyncio.timeout(30):
                await all_answered.wait()
        await server.close_all_connections()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8888, help="0: any that is free")
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main(parser.parse_args().port))
