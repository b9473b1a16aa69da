"""Properties that hold for every model and pipeline, on random small networks.

FXLRD_RANDOM_CASES sets how many networks are drawn for each property: few in CI, thousands by hand.
"""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxlrd
from fxlrd import FxlrdError, Pipeline
from fxlrd.graph.inputs import tensors
from tests.support.cases import cases
from tests.support.random_networks import RandomNetwork, exact_pipeline, inputs, pipeline

SEEDS = range(int(os.environ.get("FXLRD_RANDOM_CASES", "12")))
CASES = cases(SEEDS, slow=SEEDS[3:])


def network(seed: int, dtype: torch.dtype = torch.float64) -> RandomNetwork:
    model = RandomNetwork(seed, traceable=seed % 3 != 0).to(dtype).eval()
    for i, module in enumerate(model.modules()):
        if i % 4 == 3:
            module.training = seed % 2 == 0  # modes differ between modules
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != seed % 3)
    return model


def state(model: nn.Module) -> dict[str, object]:
    """Return everything that a compression must leave as it is."""
    digest = hashlib.sha256()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode() + t.detach().numpy().tobytes())
    return {
        "values": digest.hexdigest(),
        "identities": [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "random state": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


def compressed(model: nn.Module, x: torch.Tensor, steps: str, calibration: object = None) -> fxlrd.Result:
    """Compress without timing; a request that this network cannot meet is skipped by the caller."""
    return fxlrd.compress(model, x, pipeline=steps, calibration=calibration, measure=False)


def batches(model: RandomNetwork, seed: int) -> list[torch.Tensor]:
    return [inputs(model, 1000 * seed + i) for i in range(6)]


def attempted(model: nn.Module, x: torch.Tensor, steps: str, calibration: object) -> fxlrd.Result | None:
    """Return the result, or None where the request is refused in one line."""
    try:
        return compressed(model, x, steps, calibration)
    except FxlrdError as error:
        message = str(error)
    assert "\n" not in message
    assert "report this" not in message
    return None


@pytest.mark.parametrize("seed", CASES)
def test_full_rank_and_exact_passes_leave_the_function_as_it_is_on_other_inputs(seed):
    model = network(seed)
    result = compressed(model, inputs(model, seed), exact_pipeline(seed))
    model.eval()
    result.model.eval()
    for other in range(3):
        x = inputs(model, 100 + other, batch=3)
        with torch.no_grad():
            pairs = zip(tensors(result.model(x)), tensors(model(x)), strict=True)
            for after, before in pairs:
                torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8 * float(before.abs().max()))


@pytest.mark.parametrize("seed", CASES)
def test_the_input_model_is_left_as_it_was(seed):
    model = network(seed)
    before = state(model)
    attempted(model, inputs(model, seed), pipeline(seed), batches(model, seed))
    assert state(model) == before


@pytest.mark.parametrize("seed", CASES)
def test_reported_figures_are_those_of_torch(seed):
    model = network(seed, torch.float32)
    x = inputs(model, seed)
    result = attempted(model, x, pipeline(seed), batches(model, seed))
    if result is None:
        return
    assert result.report.after["params"] == sum(p.numel() for p in result.model.parameters())
    result.model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result.model(x)
    assert result.report.after["flops"] == counter.get_total_flops()


@pytest.mark.parametrize("seed", CASES)
def test_the_same_inputs_give_the_same_weights_bit_for_bit(seed):
    results = []
    for _ in range(2):
        model = network(seed)
        torch.manual_seed(torch.randint(0, 99, ()).item())  # whatever the global random state is
        results.append(attempted(model, inputs(model, seed), pipeline(seed), batches(model, seed)))
    first, second = results
    assert (first is None) == (second is None)
    if first is not None:
        a, b = first.model.state_dict(), second.model.state_dict()
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("seed", CASES)
def test_the_text_form_is_read_back(seed):
    for text in (pipeline(seed), exact_pipeline(seed)):
        steps = Pipeline.parse(text)
        assert Pipeline.parse(str(steps)) == steps
