from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh(tmp_path_factory, monkeypatch):
    """Each test has its own timing cache and starts from the same random state."""
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    torch.manual_seed(0)
