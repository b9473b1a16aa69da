"""load of a compressed model of sentence-transformers: its modules as that library makes them, but for the compressed.

Its ``save_pretrained`` writes each of its modules, and the transformer in it as `fxlrd.saving.pretrained` has it write.
Its constructor reads them again; a subclass of that loads transformers with a plan through `load_pretrained`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.saving.architecture import recall, remember
from fxlrd.saving.descriptions import descriptions
from fxlrd.saving.from_pretrained import load_pretrained
from fxlrd.saving.pretrained import read_pretrained, save_all_of
from fxlrd.saving.schema import Origin
from fxlrd.saving.tensors import joined

MODULES = "modules.json"
_CONFIG = "config_sentence_transformers.json"
_FINDS, _READS = "_load_module_class_from_ref", "_load_model"
"""Methods of the library: of a model, which returns the class of a module, and of that, which reads a transformer."""


def makes_sentences(cls: type[nn.Module]) -> bool:
    """Whether the class is one of sentence-transformers, such as SentenceTransformer or CrossEncoder."""
    return any(kind.__module__.startswith("sentence_transformers.") for kind in cls.__mro__) and hasattr(cls, _FINDS)


def holds_sentences(folder: Path) -> bool:
    """Whether sentence-transformers wrote the directory, and a transformer in it is compressed."""
    return (folder / MODULES).is_file() and any(
        read_pretrained(place) is not None for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir()))
    )


def load_sentences(folder: Path, cls: Any = None) -> nn.Module:
    """Return the model in a directory, on the CPU and in eval mode.

    ``cls`` is its class; None is for the one that the directory names. Raises FxlrdError for what cannot be read.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise FxlrdError(
            f"load: {folder} is a model of sentence-transformers: pip install sentence-transformers, or give the "
            "transformer in it, fxlrd.load(path, model)"
        ) from error
    try:
        return _read(folder, cls or _class_in(folder, sentence_transformers))
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"load: {folder}: {one_line(error)}") from error


def _class_in(folder: Path, library: Any) -> Any:
    name = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("model_type", "SentenceTransformer")
    cls = getattr(library, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and makes_sentences(cls)):
        raise FxlrdError(
            f"load: {folder}: sentence-transformers {library.__version__} has no {str(name)[:80]!r} that could be read "
            "into: give the transformer in it, fxlrd.load(path, model)"
        )
    return cls


def _read(folder: Path, cls: Any) -> nn.Module:
    transformers: dict[int, nn.Module] = {}

    def read(self: Any, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        place = Path(model_name_or_path) / kwargs.get("subfolder", "")
        plan = read_pretrained(place)
        if plan is None:
            return getattr(super(type(self), self), _READS)(model_name_or_path, *args, **kwargs)
        model = load_pretrained(place, plan, None)
        transformers[id(model)] = model
        return model

    def find(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = getattr(cls, _FINDS)(self, *args, **kwargs)
        return _derived(kind, {_READS: read}) if hasattr(kind, _READS) else kind

    model = _derived(cls, {_FINDS: find})(str(folder), device="cpu", local_files_only=True)
    for module in model.modules():
        if type(module).__dict__.get(_READS) is read or module is model:
            module.__class__ = type(module).__base__
    if not transformers:
        raise FxlrdError(f"load: {folder}: sentence-transformers read it without its plan: give the architecture")
    remember(model, _origin(model, transformers))
    save_all_of(model)
    return model.eval()


def _derived(cls: Any, own: dict[str, Any]) -> Any:
    return type(cls.__name__, (cls,), {**own, "__module__": cls.__module__})


def _origin(model: nn.Module, transformers: dict[int, nn.Module]) -> Origin:
    """Return what a model was made from: what the transformers in it were made from, and the rest as it is."""
    modules, gone, described = descriptions(model), list[str](), list[str]()
    for name, module in model.named_modules():
        if id(module) not in transformers or (origin := recall(module)) is None:
            continue
        modules = {n: was for n, was in modules.items() if n != name and not n.startswith(f"{name}.")}
        modules |= {joined(name, part) if part else name: was for part, was in origin.modules.items()}
        gone += [joined(name, part) for part in origin.gone]
        described += [joined(name, part) for part in origin.described]
    return Origin(modules, tuple(gone), None, None, tuple(described))
