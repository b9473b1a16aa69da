"""Models of torchvision and timm by name, with random weights, published ones, or those of the user's file."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.app.output import warn
from fxlrd.errors import FxlrdError, one_line, unknown

PACKAGES = ("torchvision", "timm")
SCALING = ("googlenet", "inception_v3")
"""Models of torchvision that scale their inputs if, and only if, they are built with published weights."""
_NAME = re.compile(r"([^{}]+?)(?:\{(\w+=\d+(?:,\w+=\d+)*)\})?")
_WRAPPED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def zoo_source(package: str, name: str, weights: str | None) -> str:
    """Return the full name of the architecture that ``weights`` belong to, such as timm:resnet18{num_classes=3}."""
    if weights is None:
        return f"{package}:{name}"
    if is_file(weights):
        count = _classes_in(package, name, weights)
        return f"{package}:{name}" if count is None else f"{package}:{with_options(package, name, num_classes=count)}"
    return f"timm:{_tagged(name, weights)}" if package == "timm" else f"{package}:{name}"


def with_options(package: str, name: str, **options: int) -> str:
    """Return a name with these options of its builder, beside those that it has."""
    plain, own = parsed(package, name)
    return f"{plain}{{{','.join(f'{key}={value}' for key, value in {**own, **options}.items())}}}"


def zoo_model(package: str, name: str, weights: str | None) -> nn.Module:
    """Return a model of torchvision or timm; ``name`` may end with options of its builder, such as {num_classes=3}.

    ``weights`` are published ones by their name, DEFAULT, or a file with a state dict; None is for random ones. Raises
    FxlrdError for an unknown name, and for a file with the weights of another model.
    """
    if weights is not None and is_file(weights):
        source = zoo_source(package, name, weights).partition(":")[2]
        plain, options = parsed(package, source)
        if plain in SCALING and package == "torchvision" and "transform_input" not in options:
            remedy = f"if those of the file do too, write {with_options(package, source, transform_input=1)}"
            warn(f"{package}:{name}: published weights scale their inputs; {remedy}")
        return _with_weights(zoo_model(package, source, None), f"{package}:{name}", weights)
    plain, options = parsed(package, name)
    try:
        return _torchvision(plain, options, weights) if package == "torchvision" else _timm(plain, options, weights)
    except FxlrdError:
        raise
    except (Exception, SystemExit) as error:
        raise FxlrdError(f"model '{package}:{name}' cannot be built: {one_line(error)}") from error


def imported_timm() -> Any:
    """Return the module timm. Raises FxlrdError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise FxlrdError("timm: models need timm: pip install timm") from error
    return timm


def parsed(package: str, name: str) -> tuple[str, dict[str, int]]:
    """Return the plain name and the options of its builder."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise FxlrdError(f"model '{package}:{name}': write options as {package}:NAME{{num_classes=10}}, whole numbers")
    pairs = (match[2] or "").split(",") if match[2] else []
    return match[1], {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def _torchvision(name: str, options: Mapping[str, int], weights: str | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    valid = [*(w.name for w in models.get_model_weights(name)), "DEFAULT"]
    if weights is not None and weights not in valid:
        raise unknown(f"weights of {name}", weights, valid)
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # By default, detectors and segmentation models download weights of their backbone.
    backbone = {"weights_backbone": None} if "weights_backbone" in parameters and weights is None else {}
    model: nn.Module = models.get_model(name, weights=weights, **backbone, **options)
    return model


def _timm(name: str, options: Mapping[str, int], weights: str | None) -> nn.Module:
    timm = imported_timm()
    _check_timm(timm, name)
    if weights is not None:
        name = _tagged(name, weights)
    model: nn.Module = timm.create_model(name, pretrained=weights is not None, **options)
    return model


def _check_timm(timm: Any, name: str) -> None:
    """Raise FxlrdError for what is no architecture of timm, with a tag or not: timm itself would look on the hub."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise unknown("timm model", name, timm.list_models())
    if "." in name and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise unknown("timm model", name, [architecture, *tagged])


def _tagged(name: str, weights: str) -> str:
    if weights == "DEFAULT" or "." in name:
        return name
    valid = [each.partition(".")[2] for each in imported_timm().list_pretrained(f"{name}.*")]
    if weights not in valid:
        raise unknown(f"weights of {name}", weights, [*valid, "DEFAULT"])
    return f"{name}.{weights}"


def is_file(weights: str) -> bool:
    """Whether ``weights`` are a file, not the name of published ones."""
    return Path(weights).suffix in (".pth", ".pt", ".bin", ".safetensors", ".tar") or "/" in weights


def _state(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Nothing in it is executed."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FxlrdError(f"--weights {path}: {one_line(error)}; give a file with a state dict") from error
    for key in _WRAPPED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise FxlrdError(f"--weights {path}: it holds no state dict; save model.state_dict() into it")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _classes_in(package: str, name: str, weights: str) -> int | None:
    """Return how many classes a file's weights tell apart, if that is all that differs from what the name builds."""
    state = _state(weights)
    model = without_weights(package, name).state_dict()
    pairs = [(state[key].shape, value.shape) for key, value in model.items() if key in state]
    heads = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    counts = {ours[0] if ours and theirs and ours[1:] == theirs[1:] else None for ours, theirs in heads}
    return counts.pop() if len(counts) == 1 else None


def without_weights(package: str, name: str) -> nn.Module:
    """Return a model whose weights are not allocated, where it can be built like that."""
    with contextlib.suppress(FxlrdError), torch.device("meta"):
        return zoo_model(package, name, None)
    return zoo_model(package, name, None)  # RegNet computes its widths with tensors


def _with_weights(model: nn.Module, name: str, weights: str) -> nn.Module:
    state, own = _state(weights), model.state_dict()
    # Old files lack BatchNorm's count of batches.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    odd = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    for keys, what in ((missing, "lacks"), (odd, "also has"), (shapes, "has another shape of")):
        if keys:
            raise FxlrdError(f"--weights {weights}: it {what} {keys[0]} ({len(keys)} such): not the weights of {name}")
    model.load_state_dict(state, strict=False)
    return model
