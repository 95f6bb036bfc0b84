"""`Conformance`: the promises of all verbs, together."""

from __future__ import annotations

from penstock.testing.conformance.admin import AdminPromises
from penstock.testing.conformance.batch import BatchPromises
from penstock.testing.conformance.broadcast import BroadcastPromises
from penstock.testing.conformance.delay import DelayPromises
from penstock.testing.conformance.expiry import ExpiryPromises
from penstock.testing.conformance.leases import LeasePromises
from penstock.testing.conformance.lifecycle import LifecyclePromises
from penstock.testing.conformance.limits import LimitPromises
from penstock.testing.conformance.move import MovePromises
from penstock.testing.conformance.ordered import OrderedPromises
from penstock.testing.conformance.priority import PriorityPromises
from penstock.testing.conformance.publish import PublishPromises
from penstock.testing.conformance.receive import ReceivePromises
from penstock.testing.conformance.replies import ReplyPromises
from penstock.testing.conformance.settle import SettlePromises
from penstock.testing.conformance.topics import TopicPromises
from penstock.testing.conformance.unbind import UnbindPromises
from penstock.testing.conformance.waking import WakingPromises


class Conformance(
    LifecyclePromises,
    PublishPromises,
    ReceivePromises,
    WakingPromises,
    SettlePromises,
    MovePromises,
    TopicPromises,
    DelayPromises,
    ExpiryPromises,
    PriorityPromises,
    OrderedPromises,
    LeasePromises,
    LimitPromises,
    BatchPromises,
    BroadcastPromises,
    ReplyPromises,
    AdminPromises,
    UnbindPromises,
):
    """Subclass it as `Test…` and give it a `harness` fixture; nothing else is needed."""
