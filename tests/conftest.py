from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh(tmp_path_factory, monkeypatch):
    """Each test has its own timing cache and starts from the same random state."""
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo(_fresh):
    """Nothing that Dynamo compiled before or in this test outlives it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
