from __future__ import annotations

import itertools
import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side, and those that they start, take a thread each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def cache_folders(tmp_path_factory):
    """Paths of folders that do not exist yet, each other than all before."""
    parent = tmp_path_factory.mktemp("caches")
    return (parent / str(i) for i in itertools.count())


@pytest.fixture(autouse=True)
def isolated(cache_folders, monkeypatch):
    """Each test has its own timing cache and starts from the same random state."""
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(next(cache_folders)))
    torch.manual_seed(0)


@pytest.fixture
def without_ridge(monkeypatch):
    """Layers are fitted to the calibration inputs as they are, so that what is exact of those can be checked."""
    monkeypatch.setattr("fxlrd.layers.fit.best_ridge", lambda *_: 0.0)


@pytest.fixture
def fresh_dynamo(isolated):
    """Nothing that Dynamo compiled before or in this test outlives it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
