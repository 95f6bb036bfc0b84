"""A worker: it takes tasks from their queues, one at a time of each, and answers whoever called.

PENSTOCK_BROKER=amqp://guest:guest@127.0.0.1/ python worker.py
"""

import threading

from penstock import App, context

app = App()
counting = threading.Lock()  # plain functions run in threads, one for each task: what they share is theirs to lock


def count():
    with counting:
        context.settings.counter += 1
        return context.settings.counter


@app.task("test")
def long_task(request):
    count()
    return "Wake up Neo.\n"


@app.task("stat")
def get_counter(request):
    context.headers["worker"] = context.settings.uuid
    return f'I\'m worker "{context.settings.uuid}". And I serve {count()} tasks'


@app.task("dead", timeout=3)
def infinite_loop_task(request):
    while True:  # after three seconds SystemExit is raised in here, and the worker goes on
        pass


@app.task("publish")
async def publish(request):
    await context.app.broadcast("test", request)


if __name__ == "__main__":
    app.run(counter=0)  # a part of this worker's context: context.settings.counter
