"""Where the tests of this folder run: on a pretended GPU, and on a real one where there is one (``pytest -m cuda``)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.pretend import PretendedGpu

NO_GPU = "torch sees no CUDA device here"
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)])


@pytest.fixture(params=["pretended", CUDA])
def device(request, monkeypatch) -> Iterator[torch.device]:
    """The device to compare with the CPU."""
    if request.param != "pretended":
        yield torch.device(request.param)
        return
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "a pretended GPU")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
    with PretendedGpu():
        yield torch.device("cuda")


@pytest.fixture(params=["cpu", CUDA])
def real_device(request) -> torch.device:
    """A device where nothing is pretended: the CPU, for what is compiled or timed, or a GPU."""
    return torch.device(request.param)
