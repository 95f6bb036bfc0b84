"""The conformance suite of stores: every sentence of their contract, as tests for any adapter.

    from penstock.testing.stores import StoreConformance, StoreHarness

    class TestMine(StoreConformance):
        @pytest.fixture
        def harness(self, tmp_path):
            return StoreHarness(connect=lambda: MyStore(url))

Needs `pip install penstock[testing]`.
"""

import pkgutil

import pytest

# Before they are imported below: a failed assert then shows its values.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))

from penstock.testing.stores.harness import StoreHarness  # noqa: E402
from penstock.testing.stores.suite import StoreConformance  # noqa: E402

__all__ = ["StoreConformance", "StoreHarness"]
