"""The engine under seeded faults in virtual time: `python -m penstock.testing.simulation SEED`.

Some simulated processes consume one queue of a memory broker while everything goes wrong that a
seed can think of: a process dies between any two awaits, a confirmation or an acknowledgement is
lost, messages come doubled or out of order, a lease is lost, handlers fail, reject, find their
store away, or kill the process. After every step the promises are checked; at the end, with the
faults over, every message must have been finished or lie in the dead letters with good reason.
The same seed is the same run.

`penstock.testing.simulation.tasks` is the same for tasks and schedules, with a store that fails as well:
`python -m penstock.testing.simulation --tasks SEED`.
"""

from __future__ import annotations

from penstock.testing.simulation.plan import Violation
from penstock.testing.simulation.play import simulate

__all__ = ["Violation", "simulate"]
