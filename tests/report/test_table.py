from __future__ import annotations

import torch
from torch import nn

import fxlrd
from fxlrd.report.table import headline, output_error


def test_the_table_of_ranks_shows_ranks_also_where_factors_are_fitted_to_data():
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40)), torch.randn(64, 32)
    result = fxlrd.compress(
        model, x, pipeline="calibrate,decompose{ranks=8},snap{seconds=0.01,cache=false}", calibration=x, measure=False
    )
    _, rule, *lines = result.report.ranks_table().splitlines()
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    assert [(name, first) for name, _, first, *_ in cells] == [("0", "8"), ("2", "8")]
    for _, _, first, now, at_first, *_ in cells:
        assert now in ("6", "7", "8", "ORG")
        assert ("±" in at_first) == (now != first), "the pass that moves a rank has measured it"


def test_sites_have_ranks_before_and_after():
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40)), torch.randn(64, 32)
    result = fxlrd.compress(model, x, pipeline="decompose{ranks=8},snap{seconds=0.01,cache=false}", measure=False)
    decomposed, snapped = result.report.ledger
    assert [(site.ranks_before, site.ranks) for site in decomposed.sites] == [(None, (8,)), (None, (8,))]
    assert all(site.ranks_before == (8,) and site.ranks in ((6,), (7,), None) for site in snapped.sites)


def test_an_output_error_that_is_not_known_is_said_to_be_so(report):
    data = report.to_dict()
    data = data | {"settings": data["settings"] | {"output_error": None}}
    row = next(line for line in headline(data).splitlines() if line.startswith("output error"))
    assert row.split("  ")[-1] == "not known: outputs of other shapes, or none"
    assert output_error(data) is None, "those of the passes are of regions"
