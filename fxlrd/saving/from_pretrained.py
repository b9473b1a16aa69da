"""load of what ``save_pretrained`` wrote: transformers makes the class and reads weights, a plan sets the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.saving.architecture import remember
from fxlrd.saving.descriptions import descriptions
from fxlrd.saving.pretrained import KEY, WEIGHTS_KEY, PretrainedPlan, save_all_of
from fxlrd.saving.replacing import put_layers
from fxlrd.saving.schema import ModuleDescription, Origin


def load_pretrained(folder: Path, plan: PretrainedPlan, cls: type[nn.Module] | None) -> nn.Module:
    """Return the model in a directory, in eval mode as transformers' from_pretrained returns it.

    ``cls`` is its class; None is for what the config names, of transformers' own. Raises FxlrdError if the directory
    has not exactly the tensors of the model.
    """
    try:
        import transformers
    except ImportError as error:
        raise FxlrdError(f"load: {folder} is a model of transformers: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        for key in (KEY, WEIGHTS_KEY):
            if hasattr(config, key):
                delattr(config, key)
        name = (config.architectures or [""])[0]
        cls = cls or getattr(transformers, name, None)
        if cls is None:
            raise FxlrdError(
                f"load: {folder}: transformers has no {name[:80]!r}: give the architecture, fxlrd.load(path, model)"
            )
        return _read(folder, plan, config, cls)
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"load: {folder}: {one_line(error)}") from error


def _read(folder: Path, plan: PretrainedPlan, config: Any, cls: Any) -> nn.Module:
    was: dict[str, ModuleDescription] = {}
    layers: set[int] = set()

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        for name in plan.absent:  # made with an argument beside its config, such as add_pooling_layer=False
            if name in self._modules:
                setattr(self, name, None)
        was.update(descriptions(self))
        put_layers(folder, plan.layers, plan.described, self)
        layers.update(id(self.get_submodule(name)) for name in plan.layers)

        for module in self.modules():
            if hasattr(module, "_init_weights"):
                module._init_weights = functools.partial(_initialise, module._init_weights, layers)

    # from_pretrained makes an instance without weights of the class that it is called on.
    own = {"__init__": init, "__module__": cls.__module__}
    compressed: Any = type(cls.__name__, (cls,), own)
    model, loading = compressed.from_pretrained(folder, config=config, dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, loading.get(kind) or ())):
            raise FxlrdError(f"load: {folder}: {kind.replace('_', ' ')}: {found[0][:80]}: save the model again")
    model.__class__ = cls
    for module in model.modules():
        vars(module).pop("_init_weights", None)
    remember(model, Origin(was, plan.gone, None, None, plan.described))
    save_all_of(model)
    return model


def _initialise(initialise: Callable[[nn.Module], None], layers: set[int], module: nn.Module) -> None:
    """Initialise a module: what its tensors in no file need. Those of a block may be read by their names, as in T5."""
    try:
        initialise(module)
    except (AttributeError, FxlrdError):
        if layers.isdisjoint(map(id, module.modules())):
            raise
