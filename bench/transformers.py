"""Fidelity and speed of pretrained transformers that were compressed without training, by the way it was done.

``python -m bench.transformers DIR [--json FILE] [--model smollm2,minilm] [--shares 0.9,0.8,0.6] [--sequences 128]``.
DIR holds the models and the text; bench/pretrained.py says how to get them. A share is that of the parameters of the
blocks' linear layers. SmolLM2: perplexity on held-out text, relative to the original's (``--held-out`` sequences).
MiniLM: mean cosine of the embeddings of held-out sentences to the original's (``--sentences``). ``--sequences`` and
``--length`` set what the factors are fitted to.

    plain SVD, uniform       every layer at the same ratio, by its weight alone
    whitened SVD, uniform    the same, fitted to the inputs of each layer (SVD-LLM)
    scaled SVD, uniform      the same, of the weight scaled by the mean magnitudes of its inputs (ASVD)
    single matrices          ranks by a knapsack over all layers, weighted by their effect on the output
    units and matrices       hidden units of the MLPs in the same knapsack: preset auto under a budget of layers

Speed is that of the last way, all shares side by side with the original, as medians of interleaved runs: of SmolLM2 a
prefill of 256 tokens and 64 decoded ones, of MiniLM one forward; at batch 1 and 8, eagerly and compiled. ``--no-speed``
leaves it out. ``--json`` keeps what was measured, with the settings; a second run measures what is missing only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from bench import asvd, generation, pretrained
from bench.cells import Cells, Results, Rows, machine
from fxlrd import Budget, frontier
from fxlrd.capturing.model import capture_any
from fxlrd.graph.captured import runnable
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.layer import layers_of
from fxlrd.passes import Allocate, Calibrate, Decompose
from fxlrd.progress import bar
from fxlrd.timing.clock import Timing
from fxlrd.timing.models import time_models

ROWS = 4
"""Sequences in a batch of calibration."""
BATCHES = (1, 8)
JOINT = "units and matrices"


class Smollm2:
    """SmolLM2, what it is fitted to, and the perplexity of a compressed one."""

    name = "smollm2"
    skip = ("lm_head",)
    title = "SmolLM2-135M, perplexity ×"
    figure = "perplexity, × that of the original"

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = pretrained.smollm2(arguments.folder)
        calibration, held_out = pretrained.handbook(arguments.folder)
        length = arguments.length
        ids = pretrained.sequences(tokenizer, calibration, arguments.sequences, length)
        self.calibration = [{"input_ids": rows, "use_cache": False} for rows in ids.split(ROWS)]
        self.held_out = pretrained.sequences(tokenizer, held_out, arguments.held_out, length)
        self.base = self._perplexity(self.model)

    def fidelity(self, model: nn.Module) -> float:
        return self._perplexity(model) / self.base

    @torch.no_grad()
    def _perplexity(self, model: nn.Module) -> float:
        total = count = 0.0
        for rows in self.held_out.split(ROWS):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            labels = rows[:, 1:].flatten()
            total += nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").item()
            count += len(labels)
        return math.exp(total / count)

    def timings(self, models: dict[str, nn.Module], batch: int, compile: bool, seconds: float) -> dict[str, Any]:
        """Return the timings of each kind of workload, by model."""
        return {
            f"prefill of {generation.PROMPT}": generation.time_prefill(models, batch, compile, seconds),
            f"{generation.DECODED} decoded": generation.time_decode(models, batch, compile, seconds),
        }


class Minilm:
    """The sentence encoder, what it is fitted to, and how near a compressed one's embeddings are."""

    name = "minilm"
    skip = ()
    title = "MiniLM-L6, cosine"
    figure = "mean cosine to the original's embeddings"

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = pretrained.minilm(arguments.folder)
        calibration, held_out = pretrained.handbook(arguments.folder)
        # Sentences are shorter than sequences: four times as many.
        fitted = pretrained.sentences(tokenizer, calibration, 4 * arguments.sequences, 64)
        self.calibration = _batches(fitted, 4 * ROWS)
        self.held_out = _batches(pretrained.sentences(tokenizer, held_out, arguments.sentences, 64), 4 * ROWS)
        self.embeddings = self._embedded(self.model)
        self.base = 1.0

    def fidelity(self, model: nn.Module) -> float:
        return nn.functional.cosine_similarity(self._embedded(model), self.embeddings).mean().item()

    @torch.no_grad()
    def _embedded(self, model: nn.Module) -> Tensor:
        return torch.cat([model(**batch) for batch in self.held_out])

    def timings(self, models: dict[str, nn.Module], batch: int, compile: bool, seconds: float) -> dict[str, Any]:
        """Return the timings of a forward, by model."""
        rows = {key: value[:batch] for key, value in self.held_out[0].items()}
        return {"forward of 64": time_models(models, Inputs.of(rows), under_inductor=compile, seconds=seconds)}


def _batches(encoded: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    parts = {key: value.split(rows) for key, value in encoded.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]


MODELS = {model.name: model for model in (Smollm2, Minilm)}


def _plain(subject: Smollm2 | Minilm, shares: list[float]) -> dict[float, nn.Module]:
    return _decomposed(subject, capture_any(subject.model, Inputs.of(subject.calibration[0])), shares)


def _whitened(subject: Smollm2 | Minilm, shares: list[float]) -> dict[float, nn.Module]:
    gm = capture_any(subject.model, Inputs.of(subject.calibration[0]))
    return _decomposed(subject, Calibrate(subject.calibration, outputs=False)(gm, bar).graph_module, shares)


def _scaled(subject: Smollm2 | Minilm, shares: list[float]) -> dict[float, nn.Module]:
    gm = capture_any(subject.model, Inputs.of(subject.calibration[0]))
    names = [layer.origin for layer in layers_of(gm) if isinstance(layer.module, nn.Linear)]
    linears = {name: module for name in names if isinstance(module := subject.model.get_submodule(name), nn.Linear)}
    magnitudes = asvd.mean_magnitudes(linears, lambda: [subject.model(**batch) for batch in subject.calibration])
    passes = {share: Decompose(ratio=1 / share, skip=subject.skip) for share in shares}
    models = {share: each(gm, bar).graph_module for share, each in passes.items()}
    for model in models.values():
        asvd.refactor(model, magnitudes)
    return {share: runnable(model) for share, model in models.items()}


def _decomposed(subject: Smollm2 | Minilm, gm: fx.GraphModule, shares: list[float]) -> dict[float, nn.Module]:
    passes = {share: Decompose(ratio=1 / share, skip=subject.skip) for share in shares}
    return {share: runnable(each(gm, bar).graph_module) for share, each in passes.items()}


def _single(subject: Smollm2 | Minilm, shares: list[float]) -> dict[float, nn.Module]:
    calibrate = Calibrate(outputs=False, effects=256, holdout=True)
    return _allocated(subject, shares, [calibrate, Allocate(layers=shares[0], merge=False), Decompose()])


def _joint(subject: Smollm2 | Minilm, shares: list[float]) -> dict[float, nn.Module]:
    return _allocated(subject, shares, None)


def _allocated(subject: Smollm2 | Minilm, shares: list[float], passes: Any) -> dict[float, nn.Module]:
    """Return the models within budgets of the layers' parameters, from one calibration."""
    tried = frontier(
        subject.model,
        subject.calibration[0],
        calibration=subject.calibration,
        budgets=[Budget(layers=share) for share in shares],
        pipeline=passes,
        skip=subject.skip,
        measure=False,
        progress=True,
    )
    return {point.budget.share: point.result().model for point in tried.points}


METHODS: dict[str, Callable[[Any, list[float]], dict[float, nn.Module]]] = {
    "plain SVD, uniform": _plain,
    "whitened SVD, uniform": _whitened,
    "scaled SVD, uniform": _scaled,
    "single matrices": _single,
    JOINT: _joint,
}
"""What makes the models, by the share of the layers' parameters that they retain."""


class Bench:
    """One model and its compressed ones."""

    def __init__(self, subject: Smollm2 | Minilm, shares: list[float], results: Results, seconds: float) -> None:
        self.subject, self.shares, self.results, self.seconds = subject, shares, results, seconds
        self.joint: dict[float, nn.Module] = {}

    def fidelity(self, method: str) -> list[str]:
        """Return the figures of a method, of which one calibration is measured together."""
        keys = {share: f"{self.subject.name}, {method}, {share:g}" for share in self.shares}
        missing = [share for share, key in keys.items() if key not in self.results.cells]
        models = METHODS[method](self.subject, missing) if missing else {}
        if method == JOINT:
            self.joint |= models
        cells = [self.results.cell(key, lambda s=share: self._figures(models.get(s))) for share, key in keys.items()]
        return [f"{c['fidelity']:.4g}" if "fidelity" in c else c["error"] for c in cells]

    def _figures(self, model: nn.Module | None) -> dict[str, Any]:
        if model is None:
            return {"error": "out of reach"}
        left = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in self.subject.model.parameters())
        return {"fidelity": self.subject.fidelity(model), "params": left}

    def table(self, methods: list[str]) -> None:
        rows = [[method, *self.fidelity(method)] for method in methods]
        print(f"\n{self.subject.name}: {self.subject.figure} (original {self.subject.base:.2f})")
        print(tabulate(rows, headers=["", *map(str, self.shares)], disable_numparse=True), flush=True)

    def speed(self) -> None:
        rows = []
        for compile in (False, True):
            for batch in BATCHES:
                setting = f"{'compiled' if compile else 'eager'}, batch {batch}"
                key = f"{self.subject.name}, speed, {setting}"
                cell = self.results.cell(key, lambda c=compile, b=batch: self._timed(b, c))
                for workload, timings in cell.items():
                    if workload == "error":
                        rows.append([setting, timings])
                        continue
                    first = timings["original"]["seconds"]
                    speeds = [
                        f"{1 / t['ratio']:.2f}× ± {t['spread'] / t['ratio'] ** 2:.2f}"
                        for t in list(timings.values())[1:]
                    ]
                    rows.append([setting, workload, f"{1e3 * first:.1f} ms", *speeds])
        print(f"\n{self.subject.name}: speed of {JOINT}")
        print(tabulate(rows, headers=["", "", "original", *map(str, self.shares)], disable_numparse=True), flush=True)

    def _timed(self, batch: int, compile: bool) -> dict[str, Any]:
        if missing := [share for share in self.shares if share not in self.joint]:
            self.joint |= _joint(self.subject, missing)
        models = {"original": self.subject.model, **{str(share): self.joint[share] for share in self.shares}}
        timed = self.subject.timings(models, batch, compile, self.seconds)
        return {workload: {name: _as_dict(t) for name, t in timings.items()} for workload, timings in timed.items()}


def rows(cells: Cells) -> Rows:
    """Return the fidelities by model and method, a column for each share of the layers' parameters."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for key, cell in cells.items():
        name, *method, share = key.split(", ")
        if "speed" not in method:
            row = table.setdefault((name, ", ".join(method)), {"": MODELS[name].title, "method": ", ".join(method)})
            row[share] = f"{cell['fidelity']:.4g}" if "fidelity" in cell else cell["error"]
    return list(table.values())


def _as_dict(timing: Timing) -> dict[str, float]:
    return asdict(timing)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transformers")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the models and the text are")
    parser.add_argument("--model", default=",".join(MODELS), help="smollm2, minilm or both")
    parser.add_argument("--method", help=f"only this one of: {'; '.join(METHODS)}", choices=METHODS, action="append")
    parser.add_argument("--shares", default="0.9,0.8,0.6", help="of the parameters of the blocks' linear layers")
    parser.add_argument("--sequences", type=int, default=128, help="to fit to; four times as many sentences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--held-out", type=int, default=64, help="sequences to measure perplexity on")
    parser.add_argument("--sentences", type=int, default=512, help="sentences to measure embeddings on")
    parser.add_argument("--no-speed", action="store_true", help="leave out speed")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timing of each workload, of all models")
    parser.add_argument("--json", type=Path, help="keep what was measured, and go on from there")
    arguments = parser.parse_args()
    names = arguments.model.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"no model {unknown[0]!r}: {', '.join(MODELS)}")
    kept = ("sequences", "length", "held_out", "sentences")
    settings = {name: getattr(arguments, name) for name in kept}
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    about = {
        "title": "Transformers without training: perplexity, and cosine of embeddings, against the original",
        "machine": machine(torch.device("cpu")),
        "command": "python -m bench.transformers",
    }
    results = Results(arguments.json, settings, about, rows)
    for name in names:
        torch.manual_seed(0)
        bench = Bench(
            MODELS[name](arguments), [float(s) for s in arguments.shares.split(",")], results, arguments.seconds
        )
        bench.table(arguments.method or list(METHODS))
        if not arguments.no_speed:
            bench.speed()


if __name__ == "__main__":
    main()
