"""The conformance suite: every sentence of the broker contract, as tests for any adapter.

    from penstock.testing.conformance import Conformance, Harness

    class TestMine(Conformance):
        @pytest.fixture
        def harness(self, tmp_path):
            return Harness(connect=lambda: MyBroker(url))

Needs `pip install penstock[testing]`. `docs/adapters.md` tells the rest.
"""

import pkgutil

import pytest

# Before they are imported below: a failed assert then shows its values.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))

from penstock.testing.conformance.harness import Harness  # noqa: E402
from penstock.testing.conformance.suite import Conformance  # noqa: E402

__all__ = ["Conformance", "Harness"]
