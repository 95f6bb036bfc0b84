"""A web site on FastAPI that leaves the work to `worker.py`.

PENSTOCK_BROKER=amqp://guest:guest@127.0.0.1/ python site_fastapi.py --port 8888
"""

import argparse
import asyncio
import contextlib
import logging
import socket

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from penstock import BodyTooLarge, BrokerUnavailable, Client, ExpirationError, PenstockError, RemoteError, Unroutable

LONGEST_POLL = 30  # seconds: proxies cut what is silent for longer

client = Client()  # one for the whole process, at $PENSTOCK_BROKER
polls = set()  # futures of those who wait for the next broadcast


def tell_polls(data):
    for poll in polls:
        if not poll.done():
            poll.set_result(data if isinstance(data, bytes) else str(data))


listener = client.subscribe("test", tell_polls)  # there need not be an event loop yet


@contextlib.asynccontextmanager
async def lifespan(site):
    async with client:  # closed at the end of the block
        await client.connect()
        await listener  # it hears from here on
        yield


site = FastAPI(lifespan=lifespan, default_response_class=PlainTextResponse)


@site.exception_handler(PenstockError)
async def explain(request: Request, error: PenstockError):
    """The answer to a request whose call failed."""
    match error:
        case TimeoutError():
            return PlainTextResponse("Timeout", 504)
        case ExpirationError() | Unroutable():
            return PlainTextResponse("All workers are gone", 503)
        case BrokerUnavailable():
            return PlainTextResponse("The connection was lost: it may have been done, or not", 503)
        case BodyTooLarge():
            return PlainTextResponse("Too much", 413)
        case RemoteError():
            logging.error("the worker failed: %s\n%s", error, error.traceback)
            return PlainTextResponse("The worker failed", 502)
        case _:
            raise error


@site.get("/")
async def main():
    answer = await client.call("test", priority=100)
    return f"{type(answer).__name__}: {answer}"


@site.get("/stat")
async def stat(response: Response):
    answer, headers = await client.call("stat", persistent=False, priority=0, with_headers=True)
    response.headers["X-Worker"] = headers["worker"]
    return f"{type(answer).__name__}: {answer}"


@site.get("/fast")
async def fast():
    # Three seconds for somebody to take it, and ten for the answer.
    answer = await client.call("dead", persistent=False, priority=255, expires=3, timeout=10)
    return f"{type(answer).__name__}: {answer}"


@site.get("/subscribe")
async def subscribe(request: Request):
    poll = asyncio.get_running_loop().create_future()
    leaving = asyncio.create_task(disconnected(request))
    polls.add(poll)
    try:
        await asyncio.wait((poll, leaving), timeout=LONGEST_POLL, return_when=asyncio.FIRST_COMPLETED)
    finally:
        polls.discard(poll)
        leaving.cancel()
    if poll.done():
        return PlainTextResponse(poll.result())
    return Response(status_code=204)  # nothing was said: ask again


async def disconnected(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


@site.post("/publish", status_code=204)
async def publish(request: Request):
    """By way of the worker."""
    await client.call("publish", await request.body())


@site.post("/publish2", status_code=204)
async def publish2(request: Request):
    """Straight from here."""
    await client.broadcast("test", await request.body())


@site.get("/parallel")
async def parallel():
    async with client.parallel() as calls:
        calls.call("test")
        calls.call("stat")
    test, stat = (f"failed, {one}" if isinstance(one, Exception) else one for one in calls.results)
    return f"Test result: {test}\nStat result: {stat}"


class Server(uvicorn.Server):
    async def shutdown(self, sockets=None):
        tell_polls(b"")  # let go of who polls, rather than wait for them
        await super().shutdown(sockets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8888, help="0: any that is free")
    logging.basicConfig(level=logging.INFO)
    listening = socket.create_server(("127.0.0.1", parser.parse_args().port))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    Server(uvicorn.Config(site, timeout_graceful_shutdown=30)).run(sockets=[listening])
