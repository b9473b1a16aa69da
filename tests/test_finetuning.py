from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxlrd
from fxlrd import FxlrdError, finetune
from tests.support.tensors import same_tensors


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def data(count: int = 64) -> TensorDataset:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(count, 16, generator=g)
    return TensorDataset(x, (x[:, :4] + 0.1 * x[:, 4:8]).argmax(1))


def loader(count: int = 64, shuffle: bool = True) -> DataLoader:
    return DataLoader(data(count), batch_size=16, shuffle=shuffle)


def small_factors() -> nn.Module:
    return fxlrd.compress(net(), torch.randn(2, 16), ratio=2.0, skip="6", measure=False).model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_the_loss_falls_and_the_history_records_it():
    model = small_factors()
    history = finetune(model, loader(256), epochs=20, lr=0.1, evaluate=lambda m: float(m.training))
    assert [e.epoch for e in history] == list(range(20))
    assert history[-1].loss < 0.5 * history[0].loss
    assert history[-1].metric == 0.0, "evaluate sees the model in eval mode"
    assert history[0].trained == sum(p.numel() for p in model.parameters())


def test_training_is_seeded_and_leaves_the_global_random_state_unchanged():
    before = torch.get_rng_state()
    a, b, c = (copy.deepcopy(net(0.3)) for _ in range(3))
    torch.set_rng_state(before)
    finetune(a, loader(), epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(5)
    finetune(b, loader(), epochs=2)
    finetune(c, loader(), epochs=2, seed=1)
    assert same_tensors(state(a), state(b))
    assert not same_tensors(state(a), state(c))


def test_modes_and_requires_grad_are_restored():
    model = net().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    finetune(model, loader())
    assert model.training
    assert not model[1].training
    assert torch.equal(model[0].weight, frozen)
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 7]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("batch_norm", "moves"), [("train", True), ("frozen", False)])
def test_frozen_batch_norm_statistics_stay(batch_norm, moves):
    model = net()
    before = model[1].running_mean.clone()
    finetune(model, loader(), batch_norm=batch_norm)
    assert torch.equal(model[1].running_mean, before) != moves


def test_the_papers_freezing_trains_one_factor():
    model = small_factors()
    before = state(model)
    finetune(model, loader(), schedule="paper")
    after = state(model)
    assert torch.equal(after["4.first.weight"], before["4.first.weight"])
    assert not torch.equal(after["4.last.weight"], before["4.last.weight"])
    assert all(p.requires_grad for p in model.parameters())


def test_the_sequential_schedule_alternates():
    model = small_factors()
    states = []
    history = finetune(
        model, loader(), epochs=3, schedule="sequential", evaluate=lambda m: states.append(state(m)) or 0.0
    )
    first, last = [s["4.first.weight"] for s in states], [s["4.last.weight"] for s in states]
    assert torch.equal(first[0], first[2]) is False
    assert torch.equal(last[0], last[1])
    assert torch.equal(first[1], first[2])
    assert not torch.equal(last[1], last[2])
    assert history[0].trained != history[1].trained


def test_factors_that_were_frozen_before_train_when_it_is_their_turn():
    model = fxlrd.compress(net(), torch.randn(2, 16), ratio=2.0, skip="6", preset="freeze", measure=False).model
    states = [state(model)]
    finetune(model, loader(), epochs=2, schedule="sequential", evaluate=lambda m: states.append(state(m)) or 0.0)
    firsts = [each["4.first.weight"] for each in states]
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(firsts)]
    assert moved == [False, True]
    assert not model.get_submodule("4.first").weight.requires_grad, "as it was before"


def test_a_layer_that_is_frozen_altogether_stays_so():
    model = small_factors()
    model.get_submodule("4").requires_grad_(False)
    before = state(model)
    finetune(model, loader(), epochs=2, schedule="sequential")
    after = state(model)
    assert all(torch.equal(before[f"4.{part}.weight"], after[f"4.{part}.weight"]) for part in ("first", "last"))
    assert not torch.equal(before["0.last.weight"], after["0.last.weight"])


def test_a_teacher_of_a_model_that_returns_no_single_tensor_is_refused():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x):
            return {"scores": self.net(x)}

    with pytest.raises(FxlrdError, match=r"returns a dict; a teacher needs one tensor of logits: leave teacher out"):
        finetune(Named(), loader(), loss=lambda output, target: output["scores"].mean(), teacher=Named())


def test_distillation_pulls_towards_the_teacher():
    teacher, model = net().train(), net()
    with torch.no_grad():
        model[6].weight.zero_()
    x = data().tensors[0]

    def distance(m: nn.Module) -> float:
        return (m.eval()(x).softmax(-1) - copy.deepcopy(teacher).eval()(x).softmax(-1)).norm().item()

    before = distance(model)
    stats = teacher[1].running_mean.clone()
    finetune(model, loader(), epochs=100, lr=0.1, teacher=teacher, distill=1.0, batch_norm="frozen")
    assert distance(model) < 0.2 * before
    assert teacher.training
    assert torch.equal(teacher[1].running_mean, stats)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    path = tmp_path / "run.pt"
    straight, broken = net(0.3), net(0.3)
    uninterrupted = finetune(straight, loader(), epochs=3)

    class Breaks:
        def __init__(self, after: int) -> None:
            self.remaining, self.inner = after, loader()

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self):
            self.remaining -= 1
            if self.remaining < 0:
                raise KeyboardInterrupt
            yield from self.inner

    with pytest.raises(KeyboardInterrupt):
        finetune(broken, Breaks(2), epochs=3, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    again = net(0.3)
    history = finetune(again, loader(), epochs=3, checkpoint=path)
    assert same_tensors(state(again), state(straight))
    assert [e.loss for e in history] == [e.loss for e in uninterrupted]
    with pytest.raises(FxlrdError, match="has other settings"):
        finetune(again, loader(), epochs=3, lr=0.1, checkpoint=path)
    with pytest.raises(FxlrdError, match="is of another model, or trains other parameters of it: remove it"):
        finetune(nn.Linear(16, 4), loader(), epochs=3, checkpoint=path)
    path.write_bytes(b"junk")
    with pytest.raises(FxlrdError, match="is not a checkpoint of finetune"):
        finetune(again, loader(), epochs=3, checkpoint=path)


def test_modules_that_tell_the_version_of_their_state_are_resumed(tmp_path):
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            assert metadata.get("version") == 2
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    for _ in range(2):
        torch.manual_seed(0)
        assert len(finetune(nn.Sequential(Versioned(16, 4)), loader(), checkpoint=tmp_path / "run.pt")) == 1


def test_a_learning_rate_of_numpys_is_resumed(tmp_path):
    options = {"lr": np.float64(0.01), "checkpoint": tmp_path / "run.pt", "epochs": np.int64(1)}
    first = finetune(net(), loader(), **options)
    assert [e.loss for e in finetune(net(), loader(), **options)] == [e.loss for e in first]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "at least one"),
        ({"lr": 0}, "finite number above 0"),
        ({"lr": float("nan")}, "finite number above 0"),
        ({"warmup": 1}, "share of the steps"),
        ({"distill": 2}, "weight in"),
        ({"schedule": "papr"}, "did you mean paper"),
        ({"batch_norm": "frozn"}, "did you mean frozen"),
        ({"schedule": "paper"}, "no layer of the model is decomposed"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(FxlrdError, match=message) as caught:
        finetune(net(), loader(), **options)
    assert "\n" not in str(caught.value)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.randn(16), 0


def test_invalid_loaders():
    for bad, message in [
        ([], "no batches"),
        ((batch for batch in loader()), "no length"),
        (DataLoader(Endless()), "no length"),
        ([torch.randn(4, 16)], "pairs"),
    ]:
        with pytest.raises(FxlrdError, match=message):
            finetune(net(), bad)
    x, y = data().tensors
    with pytest.raises(FxlrdError, match="lower lr"):
        finetune(net(), [(x * float("inf"), y)])


WORKER = """
import sys
import torch
sys.path.insert(0, sys.argv[2])
from tests.test_finetuning import loader, net
from fxlrd import finetune
import torch.distributed as dist
import os
model = net()
history = finetune(model.double(), [(x.double(), y) for x, y in loader(69, shuffle=False)], epochs=2, lr=0.05,
                   batch_norm="frozen", progress=False)
if int(os.environ["RANK"]) == 0:
    torch.save((model.state_dict(), [e.loss for e in history]), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_full_batch(tmp_path):
    # 69 examples in batches of 16 leave 5 for the last: shares of 2 and 3.
    script, out = tmp_path / "worker.py", tmp_path / "out.pt"
    script.write_text(WORKER)
    root = str(Path(__file__).parents[1])
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*run, str(script), str(out), root], capture_output=True, text=True, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr
    theirs, losses = torch.load(out, weights_only=True)
    model = net().double()
    batches = [(x.double(), y) for x, y in loader(69, shuffle=False)]
    history = finetune(model, batches, epochs=2, lr=0.05, batch_norm="frozen", progress=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-10, atol=1e-12)
    assert losses == pytest.approx([e.loss for e in history], rel=1e-10)


def test_a_model_that_returns_its_losses_is_trained():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x, target=None):
            y = self.net(x)
            return {"classes": nn.functional.cross_entropy(y, target)} if self.training else y.argmax(1)

    batches = [((x, y), y) for x, y in loader(shuffle=False)]
    history = finetune(Detector(), batches, epochs=20, lr=0.1, loss=lambda losses, _: sum(losses.values()))
    assert history[-1].loss < 0.5 * history[0].loss
