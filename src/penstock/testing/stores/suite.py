"""`StoreConformance`: the promises of all verbs, together."""

from __future__ import annotations

from penstock.testing.stores.batch import BatchPromises
from penstock.testing.stores.cancelling import CancellingPromises
from penstock.testing.stores.elections import ElectionPromises
from penstock.testing.stores.expect import ExpectPromises
from penstock.testing.stores.lifecycle import LifecyclePromises
from penstock.testing.stores.limits import LimitPromises
from penstock.testing.stores.scan import ScanPromises
from penstock.testing.stores.ttl import TtlPromises
from penstock.testing.stores.values import ValuePromises
from penstock.testing.stores.versions import VersionPromises
from penstock.testing.stores.watch import WatchPromises
from penstock.testing.stores.watching import WatchingPromises


class StoreConformance(
    LifecyclePromises,
    ValuePromises,
    ExpectPromises,
    VersionPromises,
    TtlPromises,
    ScanPromises,
    WatchPromises,
    WatchingPromises,
    BatchPromises,
    LimitPromises,
    CancellingPromises,
    ElectionPromises,
):
    """Subclass it as `Test…` and give it a `harness` fixture; nothing else is needed."""
