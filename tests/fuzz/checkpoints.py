"""Damaged checkpoints: each is refused with one line, or loads as what was saved."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxlrd
from fxlrd.errors import FxlrdError
from fxlrd.saving.schema import Weights, checksum
from fxlrd.saving.storage import PLAN, hashed, weights_file
from tests.fuzz.mutations import damage, edit
from tests.saving.mixed import CHANNELS, Mixed, Switched, compressed_mixed, compressed_switched, images
from tests.saving.nets import Net, trained
from tests.support.attention import Block
from tests.support.folding import CausalConv, SameConv

DATA = Path(__file__).parents[1] / "saving" / "data"
_LONGEST = 1000
"""Characters of an error, which is one line."""


@dataclass(frozen=True)
class Good:
    """A checkpoint, the architecture that it is of, inputs, and the model that was saved."""

    folder: Path
    make: Callable[[], nn.Module]
    x: Tensor
    model: nn.Module

    @property
    def plan(self) -> dict:
        """The plan, to be changed."""
        return json.loads((self.folder / PLAN).read_text())

    @property
    def weights(self) -> Path:
        """The file of tensors."""
        return next(self.folder.glob("*.safetensors"))


def stack() -> nn.Module:
    """Return layers of equal sizes, whose factors at full rank could stand in each other's place."""
    parts = OrderedDict(
        a=nn.Linear(8, 8),
        act=nn.GELU(),
        b=nn.Linear(8, 8, bias=False),
        conv=nn.Conv1d(6, 6, 3, padding=1),
        leaky=nn.LeakyReLU(0.2),
        norm=nn.BatchNorm1d(6),
        grouped=nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=2),
        up=nn.ConvTranspose1d(6, 6, 2, stride=2),
        softplus=nn.Softplus(2.0),
    )
    return nn.Sequential(parts)


def padded() -> nn.Module:
    """Return layers that pad their input themselves."""
    same, causal = SameConv(6, 8, 3, stride=2), CausalConv(8, 8, 3)
    return nn.Sequential(OrderedDict(same=same, act=nn.SiLU(), flat=nn.Flatten(2), causal=causal)).double()


RECIPES: list[tuple[Callable[[], nn.Module], Tensor, str]] = [
    (stack, torch.ones(2, 6, 8), "decompose{ranks=8}"),
    (stack, torch.ones(2, 6, 8), "decompose{ranks=2}"),
    (Net, torch.ones(2, 3, 8, 8), "decompose,branch{groups=2}"),
    (Net, torch.ones(2, 3, 8, 8), "merge{mode=exact,norms=true}"),
    (Net, torch.ones(2, 3, 8, 8), "calibrate,merge{ratio=1.5}"),
    (padded, torch.ones(2, 6, 6, 6).double(), "decompose{ranks=2}"),
    (Block, torch.ones(2, 5, 8).double(), "decompose{ranks=8}"),
]


def checkpoints(folder: Path) -> list[Good]:
    """Save a few small models below a folder; the two in the tests' data have all that the format has."""
    made = [
        Good(DATA / "mixed", lambda: Mixed().double(), images(), compressed_mixed()),
        Good(DATA / "switched", lambda: Switched().double(), torch.ones(2, CHANNELS).double(), compressed_switched()),
    ]
    for i, (make, like, pipeline) in enumerate(RECIPES):
        torch.manual_seed(i)
        model, x = trained(make()), torch.randn_like(like)
        data = [torch.randn_like(like) for _ in range(3)] if "calibrate" in pipeline else None
        result = fxlrd.compress(model, x, pipeline=pipeline, calibration=data, measure=False)
        fxlrd.save(result, folder / str(i))
        made.append(Good(folder / str(i), make, x, result.model))
    return made


def plan_case(good: Good, scratch: Path, rng: random.Random) -> bool:
    """Edit the plan as someone would who knows of its checksum; return whether it loads, as what was saved."""
    plan = good.plan
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        part = rng.choice(["layers", "layers", "tensors", "architecture", ""])
        edit(rng, plan[part] if type(plan.get(part)) is dict else plan)
    if isinstance(plan.get("architecture"), dict):  # which arguments are frozen, the plan alone says
        plan["architecture"]["arguments"] = good.plan["architecture"]["arguments"]
    if rng.random() < 0.95:
        plan["checksum"] = checksum(plan)
    bad = _copied(good, scratch)
    (bad / PLAN).write_text(json.dumps(plan))
    return _loads_alike(good, bad)


def bytes_case(good: Good, scratch: Path, rng: random.Random) -> bool:
    """Damage the bytes of a file; return whether it loads, as what was saved."""
    bad = _copied(good, scratch)
    file = bad / rng.choice([PLAN, good.weights.name])
    file.write_bytes(damage(rng, file.read_bytes()))
    return _loads_alike(good, bad)


def header_case(good: Good, scratch: Path, rng: random.Random) -> bool:
    """Change the header of the tensors' file, with the plan's checksum of it; return whether it loads.

    The tensors of the model are then those that safetensors itself reads of that file.
    """
    content = good.weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.2:
        content = damage(rng, content[: 8 + size]) + data
    else:
        table = json.loads(header)
        for _ in range(rng.choice([1, 1, 2, 3])):
            edit(rng, table)
        header = json.dumps(table).encode("utf-8", "surrogatepass")
        content = len(header).to_bytes(8, "little") + header + data
    bad = _copied(good, scratch)
    (bad / good.weights.name).unlink()
    new = bad / "new"
    new.write_bytes(content)
    named = Weights(*hashed(new))
    new.rename(weights_file(bad, named))
    plan = good.plan
    plan["weights"] = named.to_json()
    plan["checksum"] = checksum(plan)
    (bad / PLAN).write_text(json.dumps(plan))
    model = _load(good, bad)
    if model is None:
        return False
    stored, own = load_file(weights_file(bad, named)), model.state_dict()
    assert all(torch.equal(_bits(own[name]), _bits(stored[name])) for name in own if name in stored)
    return True


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _copied(good: Good, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(good.folder, scratch)
    return scratch


def _load(good: Good, folder: Path) -> nn.Module | None:
    """Load a checkpoint; None if it is refused. Either way the architecture stays as it was."""
    model = good.make().eval()
    before = {name: (t, t._version) for name, t in model.state_dict(keep_vars=True).items()}
    modules = [*model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = fxlrd.load(folder, model)
        except FxlrdError as error:
            text = str(error)
            assert text.isprintable(), repr(text)
            assert len(text) < _LONGEST, text
            loaded = None
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is t and t._version == version for name, (t, version) in before.items())
    assert [*model.modules()] == modules
    return loaded


def _loads_alike(good: Good, folder: Path) -> bool:
    model = _load(good, folder)
    if model is None:
        return False
    with torch.no_grad():
        wanted = good.model.eval()(good.x)
        try:
            outputs = model.eval()(good.x)
        except Exception:  # it says so itself when it is called: not silently another function
            return True
    assert outputs.shape == wanted.shape, "loaded as another function"
    assert torch.equal(outputs, wanted), "loaded as another function"
    return True
