from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    """No test uses what another compiled."""
