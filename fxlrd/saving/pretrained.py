"""save_pretrained of a compressed model: transformers' own files, and a plan that `fxlrd.load` reads.

    model.safetensors     the tensors, as transformers writes them, in shards where they are large
    config.json           the architecture's config, with two entries more:
        fxlrd                 what takes the place of which of the architecture's modules
        transformers_weights  a sentence in the place of a file's name
        quantization_config   that fxlrd takes part in from_pretrained (fxlrd/saving/taking_part.py)

transformers makes new weights for layers that a checkpoint has not, with a warning only. A name of weights that names
no safetensors file is an error to it, which quotes the name: hence the sentence.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.files import write_atomically
from fxlrd.layers.quantized import quantized_weight
from fxlrd.saving.architecture import recall, remember
from fxlrd.saving.fields import Record
from fxlrd.saving.save import replacements
from fxlrd.saving.schema import Factors, LayerSpec, Narrowed, Origin

CONFIG = "config.json"
KEY = "fxlrd"
WEIGHTS_KEY = "transformers_weights"
ENTRY, METHOD = "quantization_config", "fxlrd"
VERSION = 1
_SENTENCE = "this model has layers that fxlrd compressed: load it with fxlrd.load(path)"


@dataclass(frozen=True)
class PretrainedPlan(Record):
    """What config.json says of a compressed model."""

    version: int
    layers: Mapping[str, LayerSpec | Factors | Narrowed]
    """What takes the place of modules of the architecture, by their names."""
    gone: tuple[str, ...]
    described: tuple[str, ...]
    """As in `fxlrd.saving.schema.Architecture`."""
    absent: tuple[str, ...]
    """Attributes that are None in this model, where others of its class and config may have a module."""


def save_all_of(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a compressed model, and of the models that it holds, write all that they are.

    A model of sentence-transformers holds one of transformers. With another ``save_pretrained`` factors would be lost:
    diffusers would make new layers where it reads them, PEFT writes adapters alone. It raises.
    """
    origin = recall(model)
    if (
        origin is None
        or origin.arguments is not None
        or origin.refused is not None
        or isinstance(model, fx.GraphModule)
    ):
        return
    saving = {name: module for name, module in model.named_modules() if _saves_itself(module)}
    for name, module in saving.items():
        if name:
            remember(module, _inside(origin, name))
        module.save_pretrained = functools.partial(save_pretrained, module)
    others = {n: m for n, m in model.named_modules() if hasattr(type(m), "save_pretrained") and n not in saving}
    changed = sorted(replacements(model, origin.architecture)) if others else []
    for name, module in others.items():
        written = tuple(f"{own}." for own in saving) if _has_others_save(type(module)) else ()
        inside = [layer for layer in changed if layer.startswith(f"{name}." if name else "")]
        if lost := [layer for layer in inside if not layer.startswith(written)]:
            module.save_pretrained = functools.partial(_refuse, lost[0])


def _has_others_save(cls: type[nn.Module]) -> bool:
    """Whether ``save_pretrained`` of the class calls that of the modules it holds: sentence-transformers' does."""
    return any(kind.__module__.startswith("sentence_transformers.") for kind in cls.__mro__)


def _refuse(name: str, *_: Any, **__: Any) -> None:
    """Raise FxlrdError: what ``save_pretrained`` would write cannot be read again."""
    raise FxlrdError(
        f"save_pretrained: {name} is compressed, and from_pretrained would make it anew: use fxlrd.save and fxlrd.load"
    )


def _saves_itself(module: nn.Module) -> bool:
    """Whether the module is one of transformers: it writes its config and its weights."""
    config = getattr(module, "config", None)
    return hasattr(type(module), "save_pretrained") and hasattr(type(module), "_from_config") and config is not None


def _inside(origin: Origin, name: str) -> Origin:
    """Return what the module ``name`` of a model was made from."""

    def own(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n.removeprefix(f"{name}.") for n in names if n.startswith(f"{name}."))

    modules = {n.removeprefix(f"{name}."): was for n, was in origin.modules.items() if n.startswith(f"{name}.")}
    if name in origin.modules:
        modules[""] = origin.modules[name]
    return replace(origin, modules=modules, gone=own(origin.gone), described=own(origin.described), source=None)


def save_pretrained(
    model: Any, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Write a compressed model as transformers does, and what `fxlrd.load` needs beside it.

    The arguments are those of the model's class. Raises FxlrdError for a quantized model, for one with adapters and,
    since files that are sent before the plan is written are not complete, for push_to_hub.
    """
    if push_to_hub:
        raise FxlrdError("save_pretrained: push_to_hub=True would send it without its plan: call model.push_to_hub(…)")
    if (weight := quantized_weight(model)) is not None:
        raise FxlrdError(f"save_pretrained: {weight} is quantized: save first, and quantize what fxlrd.load returns")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise FxlrdError(
            "save_pretrained: of a model with adapters it writes these alone: use fxlrd.save and fxlrd.load"
        )
    origin = recall(model)
    if origin is None:
        raise FxlrdError("save_pretrained: it is not known what this model was made from: use fxlrd.save")
    layers = replacements(model, origin.architecture)
    plan = PretrainedPlan(VERSION, layers, origin.gone, origin.described, _absent(model))
    entries = {WEIGHTS_KEY: _SENTENCE, KEY: plan.to_json(), ENTRY: {"quant_method": METHOD}}
    with _in_config(model.config, entries if layers else {}):
        type(model).save_pretrained(model, save_directory, *args, **kwargs)


@contextmanager
def _in_config(config: Any, entries: Mapping[str, Any]) -> Iterator[None]:
    """Let a config write ``entries`` with its own: it is written before the weights, which mean nothing without them.

    As attributes they would not do, since transformers removes the name of weights before it writes.
    """
    cls = type(config)

    def to_json_file(self: Any, path: str | os.PathLike[str], use_diff: bool = True) -> None:
        own = json.loads(self.to_json_string(use_diff=use_diff))
        write_atomically(Path(path), json.dumps({**own, **entries}, indent=2) + "\n")

    config.__class__ = type(cls.__name__, (cls,), {"to_json_file": to_json_file, "__module__": cls.__module__})
    try:
        yield
    finally:
        config.__class__ = cls


def _absent(model: nn.Module) -> tuple[str, ...]:
    return tuple(k for k, v in {**vars(model), **model._modules}.items() if v is None and not k.startswith("_"))


def read_pretrained(folder: Path) -> PretrainedPlan | None:
    """Return what a directory's config.json says of a compressed model; None if there is none, or it says nothing."""
    file = folder / CONFIG
    try:
        data = json.loads(file.read_text(encoding="utf-8"))[KEY] if file.is_file() else None
    except KeyError:
        return None
    except Exception as error:
        raise FxlrdError(f"load: {file} cannot be read: {one_line(error)}") from error
    return None if data is None else _plan_of(data, file)


def take_plan(config: Any) -> PretrainedPlan | None:
    """Take what a config says of a compressed model out of it; None where it says nothing."""
    data = getattr(config, KEY, None)
    for key in (KEY, WEIGHTS_KEY):
        if hasattr(config, key):
            delattr(config, key)
    return None if data is None else _plan_of(data, Path(str(config._name_or_path)) / CONFIG)


def _plan_of(data: Any, file: Path) -> PretrainedPlan:
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise FxlrdError(f"load: {file}: another version of fxlrd wrote it, this one reads {VERSION}")
    try:
        return PretrainedPlan.from_json(data, KEY)
    except FxlrdError as error:
        raise FxlrdError(f"load: {file}: {error}: the plan is damaged; save the model again") from None
