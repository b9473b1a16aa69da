"""save and load: a compressed model as a directory that holds no code.

    plan.json                        what became of which module of the architecture (`fxlrd.layout`), as data
    weights-<hash>.safetensors       every parameter and buffer, under its name in the model

Loading makes a copy of the user's own architecture without weights, puts empty layers into it where the plan says so,
and gives it the tensors. Nothing is decomposed, timed or unpickled; the classes that a plan may name are listed in
`_LAYERS`. All is checked before the model is handed out, against the plan and the architecture; the plan holds a
checksum of the weights and of itself.

Saving is atomic: the weights are written under the name of their own hash, and with the plan, which is replaced last
and at once, they take effect. Whoever is killed before leaves the old checkpoint, and after, the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import stat
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxlrd.around import put_modules, structure
from fxlrd.capture.whole import trace
from fxlrd.errors import FxlrdError, one_line
from fxlrd.files import write_whole
from fxlrd.graph import FACTORS, chained, evaluating
from fxlrd.layers import CONVS, TRANSPOSED
from fxlrd.layout import Layout, config, described, recall, remember, wrapped

if TYPE_CHECKING:
    from fxlrd.compress import Result

PLAN = "plan.json"
VERSION = 1
_FORMAT = "fxlrd checkpoint"
_LARGEST_PLAN = 32 * 2**20
"""Bytes; the plan of ResNet-152 has a quarter of a MiB."""
_OURS = re.compile(r"\.weights-[0-9a-f]{16}|weights-[0-9a-f]{16}\.safetensors|\.plan\.json\.\d+\.[0-9a-f]{8}")
_CHUNK = 2**22
_REMEDY = "give the architecture that was compressed"

_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias",
)  # fmt: skip
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats", "bias")
_LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    **{kind.__name__: (kind, _CONV) for kind in CONVS},
    **{kind.__name__: (kind, (*_CONV, "output_padding")) for kind in TRANSPOSED},
    **{kind.__name__: (kind, _NORM) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)},
    "PReLU": (nn.PReLU, ("num_parameters",)),
    "Identity": (nn.Identity, ()),
}
"""What a plan may put into a model, with the options that it is made from."""


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


# -- save


def save(result: Result | nn.Module, path: str | os.PathLike[str], *, source: str | None = None) -> None:
    """Write a compressed model to the directory ``path``, in the place of the checkpoint that is there.

    Args:
        result: what `compress` returned, or its model, or one from `load`; also after fine-tuning.
        path: the directory; it is made, with those around it. Of other files in it none is touched.
        source: how the command line names the architecture, such as torchvision:resnet50, if it should open the
            checkpoint.

    Raises:
        FxlrdError: for a model that no layout is known of, that holds what is no tensor, and for a failed write.
    """
    model = result if isinstance(result, nn.Module) else getattr(result, "model", None)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"save: a {type(result).__name__} is no result of compress")
    layout = recall(model)
    if layout is None:
        raise FxlrdError("save: it is not known what this model was made from: give the result of fxlrd.compress")
    if layout["refused"] is not None:
        raise FxlrdError(f"save: {layout['refused']}")
    if source is not None:
        layout = layout | {"source": source}
    layers = _rewritten(model, layout)
    tensors, details = _tensors(model, layout, layers)
    plan = {
        "format": _FORMAT,
        "version": VERSION,
        "made_with": {"torch": torch.__version__.split("+")[0]},
        "architecture": {key: layout[key] for key in ("modules", "gone", "arguments", "source")},
        "layers": layers,
        "tensors": details,
        "training": _modes(model),
    }
    try:
        _write(Path(path), plan, tensors)
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"save: {path}: nothing was changed there: {one_line(error)}") from error


def _rewritten(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """Return what stands in the place of a module of the architecture, where that is another one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Any] = {name: _spec(name, nn.Identity()) for name in layout["gone"]}
    holders = {around for name in layout["modules"] for around in _around(name)}
    for name, was in layout["modules"].items():
        module = modules.get(name)
        if not name or module is None or name in found or config(module) == was:
            continue
        # What a graph has in the place of a module of the user's, or of a layer whose weight is read, is bare as well.
        if type(module) is nn.Module and (name in holders or not module._modules):
            continue
        found[name] = _spec(name, module)
    return found


def _spec(name: str, module: nn.Module) -> dict[str, Any]:
    """Return class and options of a module, or those of the factors that it holds."""
    module = chained(module)
    if type(module) is nn.Sequential and set(module._modules) <= set(FACTORS):
        if beside := config(module)[1]["shapes"]:
            raise FxlrdError(f"save: {name}: {', '.join(beside)} beside its factors: load makes no layer with that")
        return {"parts": [[role, _spec(f"{name}.{role}", part)] for role, part in module.named_children()]}
    kind, names = _LAYERS.get(type(module).__name__, (None, ()))
    if type(module) is not kind:
        raise FxlrdError(f"save: {name}: a {type(module).__name__} has taken the place of what was compressed")
    options = {n: getattr(module, n) if n != "bias" else module.bias is not None for n in names}
    spec = {
        "kind": type(module).__name__,
        "options": {n: list(v) if isinstance(v, tuple) else v for n, v in options.items()},
    }
    if config(_made(name, spec)) != config(module):
        raise FxlrdError(f"save: {name}: this {type(module).__name__} is no longer what its options say")
    return spec


def _tensors(model: nn.Module, layout: Layout, layers: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the model's tensors by name, and what safetensors cannot hold of them."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise FxlrdError(f"save: {name} ({type(module).__name__}) has a state that is no tensor (get_extra_state)")
    slots = dict(_slots(model))
    wanted = [_join(name, t) for name, (_, options) in layout["modules"].items() for t in options["shapes"]]
    if layout["arguments"] is None:
        for name in wanted:
            if name not in slots and not any(around in layers for around in _around(name)):
                raise FxlrdError(f"save: {name} is not in the model: did passes run on it after compress?")
    plain = {_join(name, k): t for name, m in model.named_modules() for k, t in _plain(m) if not t.is_meta}
    # What the architecture does not register: constants of a graph, and tensors that are mere attributes of modules.
    known = set(wanted)
    beside = [n for n in slots if n not in known and not any(around in layers for around in _around(n))]
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    details: dict[str, Any] = {"same": {}, "strides": {}, "frozen": [], "attributes": sorted({*plain, *beside})}
    for name, tensor in (plain | slots).items():
        if (canonical := first.setdefault(id(tensor), name)) != name:
            details["same"][name] = canonical
            continue
        if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise FxlrdError(f"save: {name} has no values: it is not initialised, or on the meta device")
        tensors[name] = tensor.detach()
        shape, strides = list(tensor.shape), list(tensor.stride())
        if strides != _strides(shape) and _dense(shape, strides):
            details["strides"][name] = strides
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            details["frozen"].append(name)
    return tensors, details


def _slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under every name that it has, those that a state_dict leaves out too."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _plain(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are mere attributes of the module."""
    yield from ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _around(name: str) -> list[str]:
    """Return the names of the modules around what has this name, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _strides(shape: list[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    return list(torch.empty(shape, device="meta").stride())


def _dense(shape: list[int], strides: list[int]) -> bool:
    """Whether these strides give every element a place of its own and leave none free: channels_last, transposed."""
    if 0 in shape:
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _modes(model: nn.Module) -> dict[str, bool]:
    """Return the mode of the model and of each module that is in another than the one around it."""
    modes = {name: m.training for name, m in model.named_modules(remove_duplicate=False)}
    return {name: mode for name, mode in modes.items() if not name or modes[name.rpartition(".")[0]] != mode}


def _write(folder: Path, plan: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if folder.exists() and not folder.is_dir():
        raise FxlrdError(f"save: {folder} is a file; name a directory")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        # In a folder of its own, as safetensors has files of its own beside the one that it writes.
        scratch = folder / f".weights-{uuid.uuid4().hex[:16]}"
        file = scratch / "weights.safetensors"
        try:
            scratch.mkdir()
            file.touch()
            readers = file.stat().st_mode  # as the user's umask says; safetensors writes for the owner alone
            save_file(_apart(tensors), file)
            file.chmod(readers)
            digest, size = _hashed(file)
            plan["weights"] = {"sha256": digest, "bytes": size}
            text = json.dumps({"checksum": _checksum(plan), **plan}, indent=1) + "\n"
            try:
                _check(json.loads(text))
            except FxlrdError as error:
                raise FxlrdError(f"save: {folder}: nothing was changed there: load would refuse {error}") from error
            if len(text.encode()) > _LARGEST_PLAN:
                raise FxlrdError(f"save: {folder}: the plan takes {len(text):,} bytes, more than a plan may have")
            file.replace(folder / _weights(digest))
            _synced(folder)
            write_whole(folder / PLAN, text)
            _synced(folder)
        finally:
            _discard(scratch)
        for left in folder.iterdir():  # of the checkpoint before, or of someone who was killed
            if _OURS.fullmatch(left.name) and left.name != _weights(digest):
                _discard(left)


def _discard(path: Path) -> None:
    """Take away what is not needed any more, if that may be done: what was written is in effect without it."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.name.startswith(".weights-") and path.is_dir() else path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other savers out of the folder, where the system can."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _synced(path: Path) -> None:
    """Have what was written reach the disk, in a directory the names."""
    with contextlib.suppress(PermissionError):  # Windows opens no directories
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous, on the CPU and on storages of their own, as safetensors takes them."""
    taken: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        value = tensor.cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        if place in taken or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)
        taken.add(value.untyped_storage().data_ptr())
        found[name] = value
    return found


def _hashed(path: Path) -> tuple[str, int]:
    """Return the SHA-256 of a file that is on the disk by then, and its size."""
    _synced(path)
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return found.hexdigest(), size


def _checksum(plan: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in plan.items() if k != "checksum"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _weights(digest: str) -> str:
    return f"weights-{digest[:16]}.safetensors"


# -- load


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Return the compressed model that was saved at ``path``, as a model of the user's own class.

    Args:
        path: a directory that `save` wrote.
        model: the architecture that was compressed, with any weights or, made under ``torch.device("meta")``, with
            none. It is not changed, and its weights are not copied. What was compressed as a graph that no class of
            the user's computes (arguments were frozen that its forward asks for, layers left out) comes back as such.

    Returns:
        The model in the modes (train or eval) that it was saved in, each tensor on the device of the architecture's,
        or on the CPU where that is meta.

    Raises:
        FxlrdError: for a file that is missing, damaged or of another version, and for another architecture.
    """
    if not isinstance(model, nn.Module):
        raise FxlrdError(f"load: a {type(model).__name__} is not a torch.nn.Module: give the architecture")
    try:
        folder = Path(path)
    except TypeError as error:
        raise FxlrdError(f"load: {path!r} is no path: {one_line(error)}") from error
    for attempt in range(3):
        plan = read_plan(folder)
        try:
            return _loaded(folder, plan, model)
        except FxlrdError:
            if attempt == 2 or read_plan(folder) == plan:  # else it was saved anew meanwhile
                raise
        except Exception as error:
            raise FxlrdError(f"load: {folder}: {one_line(error)}: the checkpoint is damaged") from error
    raise AssertionError("three attempts end in a return or an error")


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
    known = isinstance(spec["kind"], str) and spec["kind"] in _LAYERS
    _need(known, f"{where}: its class is none of {', '.join(_LAYERS)}")
    options = spec["options"]
    _need(isinstance(options, dict) and set(options) == set(_LAYERS[spec["kind"]][1]), f"{where}: options")
    for name, value in options.items():
        _need(_ALLOWED.get(name, _whole)(value), f"{where}: {name}")


def _made(name: str, spec: dict[str, Any]) -> nn.Module:
    """Return the empty module, or factors, that a spec describes."""
    if "parts" in spec:
        return nn.Sequential(OrderedDict((role, _made(f"{name}.{role}", part)) for role, part in spec["parts"]))
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in spec["options"].items()}
    kind, names = _LAYERS[spec["kind"]]
    device = {} if spec["kind"] == "Identity" else {"device": "meta"}
    biased = options.pop("bias") if names is _NORM else True  # older versions of torch have no such option
    try:
        module = kind(**options, **device)
    except Exception as error:
        raise FxlrdError(f"load: {name} cannot be made: {one_line(error)}: the plan is damaged") from error
    if not biased:
        module.register_parameter("bias", None)
    return module


def _loaded(folder: Path, plan: dict[str, Any], model: nn.Module) -> nn.Module:
    architecture = plan["architecture"]
    model = wrapped(model)
    _check_architecture(folder, architecture["modules"], model)
    target = structure(model)
    if architecture["arguments"] is not None:
        takes = inspect.signature(model.forward).parameters
        if (alien := next((name for name in architecture["arguments"] if name not in takes), None)) is not None:
            raise FxlrdError(f"load: {folder}: forward of the model takes no {alien!r}: give the architecture")
        with evaluating(target):
            target, _ = trace(target, architecture["arguments"])
    devices = {name: t.device for name, t in _slots(target)}
    modules = dict(target.named_modules(remove_duplicate=False))
    for name in plan["layers"]:
        if not name or name not in modules:
            raise FxlrdError(f"load: {folder}: the model has no module {name[:80]!r}: {_REMEDY}")
    before = put_modules(target, {name: _made(name, spec) for name, spec in plan["layers"].items()})
    devices |= {name: t.device for name, old in before.items() for _, t in _slots(old)}
    _fill(folder, plan, target, devices)
    modes = plan["training"]
    for name, module in target.named_modules(remove_duplicate=False):
        module.training = next(modes[around] for around in [name, *reversed(_around(name)), ""] if around in modes)
    remember(target, architecture | {"refused": None})
    return target


def _check_architecture(folder: Path, wanted: dict[str, Any], model: nn.Module) -> None:
    """Raise FxlrdError where a module of the model is not as it was in the one that was compressed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (kind, options) in wanted.items():
        if name not in modules:
            raise FxlrdError(f"load: {folder}: the model has no module {name[:80]!r}: {_REMEDY}")
        here, now = config(modules[name])
        where = name or "the model"
        if name and here != kind:
            raise FxlrdError(f"load: {folder}: {where} is a {here} in the model and was a {kind[:80]!r}: {_REMEDY}")
        for option in sorted(options.keys() & now.keys()):
            a, b = now[option], options[option]
            if option == "shapes":
                shape = next((t for t in {**a, **b} if a.get(t, 0) != b.get(t, 0)), None)
                if shape is None:
                    continue
                option, a, b = f"the shape of {shape[:80]!r}", a.get(shape), b.get(shape)
            if a != b:
                raise FxlrdError(f"load: {folder}: {where}: {option} is {a!r} and was {str(b)[:80]!r}: {_REMEDY}")
    if (more := next((name for name in described(model) if name not in wanted), None)) is not None:
        kind = type(modules[more]).__name__
        raise FxlrdError(f"load: {folder}: {more or 'the model'} is a {kind} and was not there: {_REMEDY}")


def _fill(folder: Path, plan: dict[str, Any], model: nn.Module, devices: dict[str, torch.device]) -> None:
    """Give the model the tensors of the file, each of which must have a place, and each place a tensor."""
    file = folder / _weights(plan["weights"]["sha256"])
    details = plan["tensors"]
    frozen, attributes = set(details["frozen"]), set(details["attributes"])
    slots = dict(_slots(model))
    plain = {_join(name, k): t for name, m in model.named_modules() for k, t in _plain(m)}
    others: dict[str, list[str]] = {}
    for alias, name in details["same"].items():
        others.setdefault(name, []).append(alias)
    _check_file(file, plan["weights"])
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except Exception as error:
        raise FxlrdError(f"load: {file} is no safetensors file: {one_line(error)}") from error
    given: dict[str, Tensor] = {}
    with opened as stored:
        for name in stored.keys():  # noqa: SIM118
            slot = next((slots[n] for n in [name, *others.get(name, ())] if n in slots), plain.get(name))
            if slot is None:
                if name in attributes:  # one that the architecture makes when it runs
                    continue
                raise FxlrdError(f"load: {file}: the model has no place for {name[:80]!r}")
            shape = stored.get_slice(name).get_shape()
            if torch.nn.parameter.is_lazy(slot) or shape != list(slot.shape):
                raise FxlrdError(f"load: {file}: {name} has shape {shape}, the model takes {list(slot.shape)}")
            where = next((devices[n] for n in [name, *reversed(_around(name))] if n in devices), slot.device)
            value = _own(name, stored.get_tensor(name), details["strides"].get(name), where)
            if isinstance(slot, nn.Parameter):
                value = nn.Parameter(value, name not in frozen)
            for each in [name, *others.get(name, ())]:
                if each in slots and slots[each].shape != value.shape:
                    raise FxlrdError(f"load: {file}: {each} and {name} are one tensor, but not in the model: {_REMEDY}")
                given[each] = value
    tied = {id(slots[name]): value for name, value in given.items() if name in slots}
    for name, slot in slots.items():
        if name not in given and id(slot) not in tied:
            raise FxlrdError(f"load: {file}: there is no tensor {name[:80]!r}")
    for name, slot in slots.items():
        _assign(model, name, given.get(name, tied.get(id(slot), slot)))
    for name in given.keys() - slots.keys():
        if name in plain:
            _assign(model, name, given[name])
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and any(
                isinstance(t, Tensor) and t.is_meta for t in tree_leaves(value)
            ):
                raise FxlrdError(
                    f"load: {_join(name, key)} holds a tensor on the meta device that is no parameter and no buffer: "
                    "build the architecture on a real device"
                )


def _own(name: str, tensor: Tensor, strides: list[int] | None, device: torch.device) -> Tensor:
    """Return the tensor in memory of its own, not that of the file, with the strides that it had."""
    device = torch.device("cpu") if device.type == "meta" else device
    shape = list(tensor.shape)
    if strides is None:
        return tensor.to(device, copy=True)
    if len(strides) != len(shape) or not _dense(shape, strides):
        raise FxlrdError(f"load: strides {strides} of {name} fit no tensor of shape {shape}: the plan is damaged")
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    holder, _, key = name.rpartition(".")
    module = model.get_submodule(holder)
    if key in module._buffers:
        module._buffers[key] = value
    else:
        setattr(module, key, value)  # recurrent modules hold their parameters elsewhere as well, and see to that


def _check_file(file: Path, weights: dict[str, Any]) -> None:
    try:
        size = _regular(file)
        if size != weights["bytes"]:
            raise FxlrdError(f"load: {file} has {size:,} bytes and should have {weights['bytes']:,}: copy it again")
        digest, _ = _hashed(file)
    except FileNotFoundError:
        raise FxlrdError(f"load: {file} is missing") from None
    except OSError as error:
        raise FxlrdError(f"load: {file} cannot be read: {one_line(error)}") from error
    if digest != weights["sha256"]:
        raise FxlrdError(f"load: {file} is damaged: its checksum is not that of the plan; copy it again")
