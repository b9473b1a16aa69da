"""finetune(): the training loop that follows a compression.

SGD with Nesterov momentum, a linear warm-up, a cosine decay and clipped gradients: settings at which balanced or
orthonormal factors do not diverge. Optional: distillation from the original model, freezing of factors by a schedule,
fixed BatchNorm statistics, and a checkpoint after each epoch from which training resumes.

Under ``torchrun`` every process takes its share of each batch of the same loader, and DistributedDataParallel
averages the gradients, so that a step equals that of one process on the full batch. Two things remain per process:
BatchNorm statistics in training mode (on CPU), and dropout masks.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fxlrd.errors import FxlrdError, unknown
from fxlrd.layers.kinds import as_layer
from fxlrd.passes.freeze import check_schedule, forms, freeze_factors
from fxlrd.progress import bar, length_of, quiet
from fxlrd.training.checkpoint import Epoch, resume, save
from fxlrd.training.examples import Part, share

BATCH_NORM = ("train", "frozen")


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 1,
    lr: float = 0.005,
    weight_decay: float = 1e-4,
    warmup: float = 0.05,
    clip: float | None = 1.0,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    temperature: float = 4.0,
    schedule: str | None = None,
    batch_norm: str = "train",
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Epoch]:
    """Train ``model`` in place and return its history, resumed epochs included.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> batches = [(torch.randn(16, 4), torch.randint(0, 2, (16,))) for _ in range(3)]
    >>> history = finetune(model, batches, epochs=2, lr=0.1, progress=False)
    >>> [(epoch.epoch, epoch.trained) for epoch in history]
    [(0, 58), (1, 58)]

    Args:
        model: any module, such as ``result.model``. Its modes and ``requires_grad`` are restored afterwards.
        loader: batches (inputs, target); has a length. Inputs are a tensor, or a tuple of positional arguments: a
            model that returns its losses in training mode gets (images, targets) there. Processes that train together
            share the examples of a batch: rows of tensors, and elements of lists with one for each example.
        epochs: passes over the loader.
        lr: the peak learning rate, after ``warmup`` (a share of all steps); it decays to 0 by a cosine.
        weight_decay: of the default optimizer.
        clip: largest norm of the gradient; None leaves it alone.
        optimizer: makes another optimizer from the parameters; its own learning rates are then the peaks.
        loss: of (output, target), averaged over the batch.
        teacher: the original model, which returns one tensor of logits; the loss becomes (1-distill)·loss +
            distill·T²·KL of the softened outputs.
        distill: weight of the teacher, 0 to 1.
        temperature: T of the softened outputs.
        schedule: freezing of factors, paper or sequential (see `fxlrd.passes.freeze`); None trains all.
        batch_norm: "train" re-estimates the statistics while training; "frozen" leaves them unchanged.
        evaluate: called with the model in eval mode after each epoch, in the first process only.
        checkpoint: a file that is replaced atomically after each epoch; if it exists, training resumes from it.
        seed: of each epoch's shuffling and dropout; the global random state is restored afterwards.
        progress: show a bar while standard error is a terminal.

    Raises:
        FxlrdError: for options out of range, a loader without batches, a loss that is not finite, or a
            checkpoint with other settings.
    """
    _check(epochs, lr, warmup, distill, temperature, schedule, batch_norm)
    steps = _length(loader)
    parameters = _trainable(model, schedule)
    device = next(model.parameters()).device
    make = optimizer or (lambda ps: torch.optim.SGD(ps, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay))
    path = None if checkpoint is None else Path(checkpoint)
    settings = {"epochs": epochs, "lr": lr, "seed": seed, "steps": steps, "schedule": schedule or ""}
    with _processes(device) as processes, _as_before(model), torch.random.fork_rng(_cuda(device)):
        run = _Run(
            model,
            parameters,
            make(parameters),
            objective=_objective(loss, teacher, distill, temperature),
            rate=lambda epoch, step: _rate(epoch * steps + step, epochs * steps, warmup),
            clip=clip,
            lr=lr,
            processes=processes,
            device=device,
        )
        show = bar if progress and processes.rank == 0 else quiet
        history = resume(path, model, run.optimizer, settings, device)
        for epoch in range(len(history), epochs):
            torch.manual_seed(seed + epoch)
            start = time.perf_counter()
            if schedule is not None:
                freeze_factors(model, schedule, epoch)
            _train_mode(model, batch_norm)
            mean = run.train(epoch, show(loader, f"epoch {epoch + 1}/{epochs}"))
            metric = _evaluated(evaluate, model) if processes.rank == 0 else None
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            history.append(Epoch(epoch, mean, time.perf_counter() - start, trained, metric))
            if path is not None and processes.rank == 0:
                save(path, model, run.optimizer, settings, history)
    return history


class _Processes(NamedTuple):
    """This process's rank, and the number of processes."""

    rank: int
    world: int


class _Run:
    """What the steps of all epochs have in common.

    ``rate(epoch, step)`` is the learning rate relative to its peak, ``objective(inputs, output, target)`` the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        objective: Callable[[tuple[Any, ...], Any, Any], Tensor],
        rate: Callable[[int, int], float],
        clip: float | None,
        lr: float,
        processes: _Processes,
        device: torch.device,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.optimizer = optimizer
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.objective = objective
        self.rate = rate
        self.clip = clip
        self.lr = lr
        self.processes = processes
        self.device = device

    def train(self, epoch: int, batches: Iterable[Any]) -> float:
        """Train for an epoch and return the mean loss over all its examples."""
        rank, world = self.processes
        # Wrapped anew each epoch: DistributedDataParallel fixes at wrapping which parameters have gradients.
        model = DistributedDataParallel(self.model) if world > 1 else self.model
        total = examples = 0.0
        for step, batch in enumerate(batches):
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * self.rate(epoch, step)
            part = share(batch, rank, world, self.device)
            total += self.step(model, part) * part.weight * part.size / world
            examples += part.size
            if not math.isfinite(total):
                raise FxlrdError(
                    f"finetune: the loss is not finite at epoch {epoch}, step {step}: lower lr={self.lr:g}"
                )
        if examples == 0:
            raise FxlrdError("finetune: the loader gives no batches")
        return _summed(total, world, self.device) / examples

    def step(self, model: nn.Module, part: Part) -> float:
        """Take one step of the optimizer and return the loss on ``part``."""
        value = self.objective(part.inputs, model(*part.inputs), part.target)
        self.optimizer.zero_grad(set_to_none=True)
        (value * part.weight).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], self.clip)
        self.optimizer.step()
        return value.item()


def _objective(
    loss: Callable[[Any, Any], Tensor], teacher: nn.Module | None, distill: float, temperature: float
) -> Callable[[tuple[Any, ...], Any, Any], Tensor]:
    """Return the loss of (inputs, output, target), with the teacher's part in it."""
    if teacher is None:
        return lambda inputs, output, target: loss(output, target)
    return lambda inputs, output, target: (
        (1 - distill) * loss(output, target) + distill * _teach(teacher, inputs, output, temperature)
    )


def _trainable(model: nn.Module, schedule: str | None) -> list[nn.Parameter]:
    """Return the parameters to train: with a schedule also factors that are frozen now, and whose turn comes.

    A layer none of whose factors trains stays as it is.
    """
    taking_turns: set[int] = set()
    if schedule is not None:
        if not (found := forms(model)):
            raise FxlrdError(f"finetune: schedule={schedule}: no layer of the model is decomposed; leave schedule out")
        for form in found.values():
            weights = [as_layer(part).weight for part in form.children()]
            if any(weight.requires_grad for weight in weights):
                taking_turns.update(map(id, weights))
    parameters = [p for p in model.parameters() if p.requires_grad or id(p) in taking_turns]
    if not parameters:
        raise FxlrdError("finetune: no parameter requires a gradient")
    return parameters


def _check(
    epochs: int, lr: float, warmup: float, distill: float, temperature: float, schedule: str | None, batch_norm: str
) -> None:
    if epochs < 1:
        raise FxlrdError(f"finetune: epochs={epochs}: at least one is needed")
    if not (math.isfinite(lr) and lr > 0):
        raise FxlrdError(f"finetune: lr={lr}: a learning rate is a finite number above 0")
    if not 0 <= warmup < 1:
        raise FxlrdError(f"finetune: warmup={warmup} is not a share of the steps in [0, 1)")
    if not 0 <= distill <= 1 or not temperature > 0:
        raise FxlrdError(f"finetune: distill={distill}, temperature={temperature}: use a weight in [0, 1] and T > 0")
    if schedule is not None:
        check_schedule(schedule)
    if batch_norm not in BATCH_NORM:
        raise unknown("batch_norm", batch_norm, BATCH_NORM)


def _length(loader: Iterable[Any]) -> int:
    length = length_of(loader)
    if length is None:
        raise FxlrdError(
            "finetune: the loader has no length, which the learning rate goes by: use a list, or a DataLoader whose "
            "data set has one"
        )
    if length == 0:
        raise FxlrdError("finetune: the loader gives no batches")
    return length


def _rate(step: int, total: int, warmup: float) -> float:
    """Return the learning rate of a step relative to its peak: a linear rise, then half a cosine."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _teach(teacher: nn.Module, inputs: tuple[Any, ...], output: Any, temperature: float) -> Tensor:
    modes = [(m, m.training) for m in teacher.modules()]
    teacher.eval()
    with torch.no_grad():
        expected = teacher(*inputs)
    for module, training in modes:
        module.training = training
    for value in (expected, output):
        if not isinstance(value, Tensor):
            raise FxlrdError(
                f"finetune: the model returns a {type(value).__name__}; a teacher needs one tensor of logits: "
                "leave teacher out, or compare with it in loss"
            )
    softened = F.log_softmax(output / temperature, -1), F.log_softmax(expected / temperature, -1)
    return temperature**2 * F.kl_div(*softened, reduction="batchmean", log_target=True)


def _train_mode(model: nn.Module, batch_norm: str) -> None:
    model.train()
    if batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _evaluated(evaluate: Callable[[nn.Module], float] | None, model: nn.Module) -> float | None:
    if evaluate is None:
        return None
    model.eval()
    with torch.no_grad():
        return float(evaluate(model))


def _summed(value: float, world: int, device: torch.device) -> float:
    if world == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


@contextmanager
def _processes(device: torch.device) -> Iterator[_Processes]:
    """Yield the processes of torchrun, after joining its process group unless the caller has; otherwise one process."""
    joined = False
    if dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        joined = True
    try:
        grouped = dist.is_available() and dist.is_initialized()
        yield _Processes(dist.get_rank(), dist.get_world_size()) if grouped else _Processes(0, 1)
    finally:
        if joined:
            dist.destroy_process_group()


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Restore the modules' modes and the parameters' ``requires_grad`` on exit."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
