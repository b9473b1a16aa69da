"""load of what ``save_pretrained`` wrote: transformers makes the class and reads weights, a plan sets the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.saving.prepared import Prepared, finish, prepare
from fxlrd.saving.pretrained import ENTRY, KEY, WEIGHTS_KEY, PretrainedPlan
from fxlrd.saving.taking_part import register


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
        for key in (KEY, WEIGHTS_KEY, ENTRY):
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
    prepared: list[Prepared] = []

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        prepared.append(prepare(folder, plan, self))

    # from_pretrained makes an instance without weights of the class that it is called on.
    own = {"__init__": init, "__module__": cls.__module__}
    compressed: Any = type(cls.__name__, (cls,), own)
    model, loading = compressed.from_pretrained(folder, config=config, dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, loading.get(kind) or ())):
            raise FxlrdError(f"load: {folder}: {kind.replace('_', ' ')}: {found[0][:80]}: save the model again")
    model.__class__ = cls
    finish(model, plan, prepared[-1])
    register()
    return model
