"""Running a function so that it can be stopped: in the event loop, in a thread, in a process of its own."""

from penstock.delivery.stopping.base import Abandoned, Overrun, RemoteFailure, Runner
from penstock.delivery.stopping.children import ProcessDied, ProcessRunner
from penstock.delivery.stopping.loop import LoopRunner
from penstock.delivery.stopping.threads import ThreadRunner

__all__ = [
    "Abandoned",
    "LoopRunner",
    "Overrun",
    "ProcessDied",
    "ProcessRunner",
    "RemoteFailure",
    "Runner",
    "ThreadRunner",
]
