from __future__ import annotations

import itertools

import pytest
import torch

from fxlrd.layers.attention import ProjectedAttention
from tests.support.attention import attention, values

FORMS = [None, "bool", "float"]


def mask_of(form, *shape):
    """Return a mask of this form that leaves the first key to everyone."""
    if form is None:
        return None
    mask = values(*shape, seed=3)
    if form == "float":
        return mask
    hidden = mask > 0.3
    hidden[..., 0] = False
    return hidden


def sized(batched, batch_first, length, channels, seed):
    shape = (length, channels) if not batched else (3, length, channels) if batch_first else (length, 3, channels)
    return values(*shape, seed=seed).requires_grad_()


def calls(batched):
    """Yield arguments of calls beside query, key and value."""
    for dims, form, padding, weights, average in itertools.product((2, 3), FORMS, FORMS, (False, True), (False, True)):
        if form and padding and form != padding:
            continue  # as nn.MultiheadAttention wants it
        shape = (5, 7) if dims == 2 else (6 if batched else 2, 5, 7)
        yield {
            "attn_mask": mask_of(form, *shape),
            "key_padding_mask": mask_of(padding, *((3, 7) if batched else (7,))),
            "need_weights": weights,
            "average_attn_weights": average,
        }


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}, {"kdim": 6, "vdim": 4, "bias": False}]
)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_it_gives_what_the_stock_module_gives_in_eval_and_training_mode(options, batch_first, batched):
    stock = attention(batch_first=batch_first, **options)
    projected = ProjectedAttention.around(stock)
    sizes = [(5, 8), (7, options.get("kdim", 8)), (7, options.get("vdim", 8))]
    inputs = [sized(batched, batch_first, *size, seed) for seed, size in enumerate(sizes)]
    for arguments, training in itertools.product(calls(batched), (False, True)):
        outputs, weights = projected.train(training)(*inputs, **arguments)
        expected, expected_weights = stock.train(training)(*inputs, **arguments)
        torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-10)
        for mine, own in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (outputs, expected)), strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_hint_that_a_mask_is_causal(form, weights, padded):
    stock, x = attention(batch_first=True), values(3, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if form == "float":
        mask = torch.where(mask, -torch.inf, 0.0).double()
    options = {"attn_mask": mask, "is_causal": True, "need_weights": weights}
    options |= {"key_padding_mask": mask_of(form, 3, 5) if padded else None}
    projected = ProjectedAttention.around(stock)
    torch.testing.assert_close(projected(x, x, x, **options), stock(x, x, x, **options), rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="is_causal"):
        projected(x, x, x, is_causal=True)


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_draws_the_same_numbers_in_training_mode(weights):
    stock, x = attention(batch_first=True, dropout=0.5).train(), values(3, 5, 8)
    projected = ProjectedAttention.around(stock)
    outputs = []
    for module, training in ((stock, True), (projected, True), (projected, False)):
        torch.manual_seed(0)
        outputs.append(module.train(training)(x, x, x, need_weights=weights)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(outputs[1], outputs[2])


def test_it_shares_parameters_and_has_the_attributes_of_the_stock_module():
    stock = attention(batch_first=True)
    stock.user_attribute = 3
    projected = ProjectedAttention.around(stock)
    assert projected.k_proj.weight.data_ptr() == stock.in_proj_weight[8:].data_ptr()
    assert projected.out_proj.weight is stock.out_proj.weight
    assert sum(p.numel() for p in projected.parameters()) == sum(p.numel() for p in stock.parameters())
    assert (projected.num_heads, projected.batch_first, projected.user_attribute) == (2, True, 3)
    assert projected.in_proj_weight is None
    closed = projected.closed()
    assert {n: p.shape for n, p in closed.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
