"""Graphs of Dynamo's."""

from __future__ import annotations

import torch


def graph(model, *inputs, freezing=False, **options):
    """Return Dynamo's graph of the model, and its arguments."""
    found = []

    def backend(gm, values):
        found.append((gm, list(values)))
        return gm

    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        torch.compile(model, backend=backend, **options)(*inputs)
    (one,) = found
    return one
