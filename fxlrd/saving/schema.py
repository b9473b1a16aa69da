"""plan.json: what a plan may say, and the check of one that was read."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.facts import FACTORS
from fxlrd.layers.kinds import OPTIONS

PLAN = "plan.json"
VERSION = 1
_FORMAT = "fxlrd checkpoint"
_LARGEST_PLAN = 32 * 2**20
"""Bytes; the plan of ResNet-152 has a quarter of a MiB."""
_REMEDY = "give the architecture that was compressed"
KINDS = {kind.__name__: kind for kind in OPTIONS}
"""The classes of what a plan may put into a model."""


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _sizes(value: Any) -> bool:
    return type(value) is list and 1 <= len(value) <= 3 and all(_whole(v) for v in value)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


_ALLOWED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("kernel_size", "stride", "dilation", "output_padding"), _sizes),
    **dict.fromkeys(("bias", "affine", "track_running_stats"), lambda v: type(v) is bool),
    "padding": lambda v: v in ("same", "valid") or _sizes(v),
    "padding_mode": lambda v: v in ("zeros", "reflect", "replicate", "circular"),
    "eps": _number,
    "momentum": lambda v: v is None or _number(v),
}
"""What an option may be; a whole number where nothing is said."""


def _checksum(plan: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in plan.items() if k != "checksum"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan of a checkpoint, of which all that needs no architecture is checked."""
    file = folder / PLAN
    try:
        size = _regular(file)
        if size > _LARGEST_PLAN:
            raise FxlrdError(f"load: {file} has {size:,} bytes: no plan is as large as that")
        plan = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FxlrdError(f"load: {folder} holds no checkpoint: there is no {PLAN} in it") from None
    except FxlrdError:
        raise
    except Exception as error:  # not UTF-8, not JSON, nested too deeply, not to be read
        raise FxlrdError(f"load: {file} cannot be read: {one_line(error)}") from error
    if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
        raise FxlrdError(f"load: {file} is no plan of fxlrd's")
    if type(plan.get("version")) is not int or plan["version"] != VERSION:
        found = str(plan.get("version"))[:20]
        raise FxlrdError(f"load: {file} has version {found!r}, this fxlrd reads {VERSION}: another fxlrd wrote it")
    try:
        _check(plan)
    except Exception as error:
        why = str(error) if isinstance(error, FxlrdError) else one_line(error)
        raise FxlrdError(f"load: {file}: {why}: the plan is damaged; save the model again") from None
    return plan


def _regular(file: Path) -> int:
    """Return a file's size; FxlrdError if it is anything else than a file, which to read might never end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FxlrdError(f"load: {file} is no file")
    return status.st_size


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise FxlrdError(what)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _check(plan: dict[str, Any]) -> None:
    weights, architecture, tensors = plan.get("weights"), plan.get("architecture"), plan.get("tensors")
    _need(isinstance(weights, dict) and set(weights) == {"sha256", "bytes"}, "weights")
    assert isinstance(weights, dict)
    digest = weights["sha256"]
    _need(isinstance(digest, str) and bool(re.fullmatch("[0-9a-f]{64}", digest)), "weights: sha256")
    _need(type(weights["bytes"]) is int, "weights: bytes")
    wanted = {"modules", "gone", "arguments", "source"}
    _need(isinstance(architecture, dict) and set(architecture) == wanted, "architecture")
    assert isinstance(architecture, dict)
    arguments, source, modules = architecture["arguments"], architecture["source"], architecture["modules"]
    _need(_texts(architecture["gone"]), "gone")
    _need(source is None or isinstance(source, str), "source")
    scalar = (bool, int, float, str, type(None))
    _need(arguments is None or isinstance(arguments, dict), "arguments")
    _need(all(isinstance(v, scalar) for v in (arguments or {}).values()), "arguments")
    _need(isinstance(modules, dict), "modules")
    for name, was in modules.items():
        options = was[1] if isinstance(was, list) and len(was) == 2 else None
        whole = isinstance(options, dict) and isinstance(was[0], str) and isinstance(options.get("shapes"), dict)
        _need(whole, f"modules: {name[:80]!r}")
    layers = plan.get("layers")
    _need(isinstance(layers, dict), "layers")
    assert isinstance(layers, dict)
    _need(layers.keys() <= modules.keys() | set(architecture["gone"]), "layers: one is not in the architecture")
    for name, spec in layers.items():
        _check_spec(spec, f"layers: {name[:80]!r}", parts=True)
    _need(isinstance(tensors, dict) and set(tensors) == {"same", "strides", "frozen", "attributes"}, "tensors")
    assert isinstance(tensors, dict)
    _need(isinstance(tensors["same"], dict) and _texts([*tensors["same"].values()]), "tensors: same")
    _need(isinstance(tensors["strides"], dict), "tensors: strides")
    for strides in tensors["strides"].values():
        _need(isinstance(strides, list) and all(type(v) is int and 0 <= v < 2**62 for v in strides), "tensors: strides")
    _need(_texts(tensors["frozen"]) and _texts(tensors["attributes"]), "tensors")
    training = plan.get("training")
    _need(isinstance(training, dict) and "" in training, "training")
    _need(all(isinstance(mode, bool) for mode in training.values()), "training")  # type: ignore[union-attr]
    _need(plan.get("checksum") == _checksum(plan), "checksum: it is not of this plan")


def _check_spec(spec: Any, where: str, parts: bool = False) -> None:
    if parts and isinstance(spec, dict) and set(spec) == {"parts"}:
        inner = spec["parts"]
        _need(isinstance(inner, list) and all(isinstance(part, list) and len(part) == 2 for part in inner), where)
        roles = [role for role, _ in inner]
        _need(all(role in FACTORS for role in roles) and len(set(roles)) == len(roles), where)
        for _, part in inner:
            _check_spec(part, where)
        return
    _need(isinstance(spec, dict) and set(spec) == {"kind", "options"}, where)
    known = isinstance(spec["kind"], str) and spec["kind"] in KINDS
    _need(known, f"{where}: its class is none of {', '.join(KINDS)}")
    options = spec["options"]
    _need(isinstance(options, dict) and set(options) == set(OPTIONS[KINDS[spec["kind"]]]), f"{where}: options")
    for name, value in options.items():
        _need(_ALLOWED.get(name, _whole)(value), f"{where}: {name}")
