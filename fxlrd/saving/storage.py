"""A checkpoint's files: written completely or not at all, and checked when read.

    plan.json                        see `fxlrd.saving.schema`
    weights-<hash>.safetensors       the tensors, under a name that their own hash sets

A save writes the tensors first. They take effect with the plan that names them, which is replaced last and atomically:
a save that is killed before leaves the old checkpoint, one that is killed after leaves the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fxlrd.errors import FxlrdError, one_line
from fxlrd.files import write_atomically
from fxlrd.saving.schema import FORMAT, VERSION, Plan, Weights

PLAN = "plan.json"
_LARGEST_PLAN = 32 * 2**20
"""Bytes; the plan of ResNet-152 has a quarter of a MiB."""
_OURS = re.compile(r"\.weights-[0-9a-f]{16}|weights-[0-9a-f]{16}\.safetensors|\.plan\.json\.\d+\.[0-9a-f]{8}")
_CHUNK = 2**22


class Disk:
    """What a save does to the disk, one method an operation. Tests replace it, to fail or be killed at each."""

    def write_tensors(self, file: Path, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file, readable for those whom the user's umask lets read."""
        file.touch()
        mode = file.stat().st_mode  # safetensors writes for the owner alone
        save_file(tensors, file)
        file.chmod(mode)

    def write_text(self, file: Path, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(file, text)

    def rename(self, file: Path, target: Path) -> None:
        """Rename a file, replacing the target if it exists."""
        file.replace(target)

    def sync(self, path: Path) -> None:
        """Wait until a file, or the names in a directory, are on the disk."""
        with contextlib.suppress(PermissionError):  # Windows opens no directories
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def remove(self, path: Path) -> None:
        """Remove a file, or a directory that a save has made, with its files."""
        shutil.rmtree(path) if path.name.startswith(".weights-") and path.is_dir() else path.unlink()


def write(
    folder: Path, tensors: Mapping[str, Tensor], plan_for: Callable[[Weights], Plan], disk: Disk | None = None
) -> None:
    """Write a checkpoint into a directory, replacing the one in it, if there is one. Other files in it stay.

    ``plan_for`` returns the plan of the checkpoint whose tensors are in a file. Raises FxlrdError for a plan that
    could not be loaded again; nothing is changed then.
    """
    if folder.exists() and not folder.is_dir():
        raise FxlrdError(f"save: {folder} is a file; name a directory")
    disk = disk or Disk()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        # In a directory of its own, since safetensors writes a temporary file beside its file.
        scratch = folder / f".weights-{uuid.uuid4().hex[:16]}"
        file = scratch / "weights.safetensors"
        try:
            scratch.mkdir()
            disk.write_tensors(file, _separate(tensors))
            disk.sync(file)
            weights = Weights(*hashed(file))
            text = _plan_text(folder, plan_for(weights))
            with _unless_planned(folder, weights_file(folder, weights), text, disk):
                disk.rename(file, weights_file(folder, weights))
                disk.sync(folder)
                disk.write_text(folder / PLAN, text)
            disk.sync(folder)
        finally:
            _discard(scratch, disk)
        for path in folder.iterdir():  # files of the checkpoint before, or of a save that was killed
            if _OURS.fullmatch(path.name) and path != weights_file(folder, weights):
                _discard(path, disk)


@contextmanager
def _unless_planned(folder: Path, file: Path, text: str, disk: Disk) -> Iterator[None]:
    """Remove a file of weights that was not there before if anything fails, Ctrl-C too, before the plan names it."""
    was_there = file.exists()
    try:
        yield
    except BaseException:
        plan = folder / PLAN
        if not was_there and not (plan.is_file() and plan.read_text(encoding="utf-8") == text):
            _discard(file, disk)
        raise


def _plan_text(folder: Path, plan: Plan) -> str:
    text = json.dumps(plan.to_json(), indent=1) + "\n"
    try:
        Plan.from_json(json.loads(text))
    except FxlrdError as error:
        raise FxlrdError(f"save: {folder}: nothing was changed there: load would refuse {error}") from error
    if (size := len(text.encode())) > _LARGEST_PLAN:
        raise FxlrdError(f"save: {folder}: the plan has {size:,} bytes, and load takes {_LARGEST_PLAN:,} at most")
    return text


def _discard(path: Path, disk: Disk) -> None:
    """Remove what is not needed any more, if that is possible: the checkpoint is complete without."""
    with contextlib.suppress(OSError):
        if path.exists():
            disk.remove(path)


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


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous, on the CPU and each on a storage of its own, as safetensors takes them."""
    taken: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        value = tensor.cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)
        taken.add(value.untyped_storage().data_ptr())
        separate[name] = value
    return separate


def hashed(file: Path) -> tuple[str, int]:
    """Return the SHA-256 of a file, in hexadecimal digits, and its size in bytes."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def weights_file(folder: Path, weights: Weights) -> Path:
    """Return where the tensors of a checkpoint are."""
    return folder / f"weights-{weights.sha256[:16]}.safetensors"


def read_plan(folder: Path) -> Plan:
    """Return the plan of a checkpoint. Raises FxlrdError for anything that can be wrong without regard to a model."""
    file = folder / PLAN
    try:
        size = _regular_size(file)
        if size > _LARGEST_PLAN:
            raise FxlrdError(f"load: {file} has {size:,} bytes: no plan is as large as that")
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FxlrdError(f"load: {folder} holds no checkpoint: there is no {PLAN} in it") from None
    except FxlrdError:
        raise
    except Exception as error:  # not UTF-8, not JSON, nested too deeply, not to be read
        raise FxlrdError(f"load: {file} cannot be read: {one_line(error)}") from error
    _check_version(file, data)
    try:
        return Plan.from_json(data)
    except Exception as error:
        why = str(error) if isinstance(error, FxlrdError) else one_line(error)
        raise FxlrdError(f"load: {file}: {why}: the plan is damaged; save the model again") from None


def _check_version(file: Path, data: Any) -> None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FxlrdError(f"load: {file} is not a plan of fxlrd")
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        shown = str(version)[:20]
        raise FxlrdError(f"load: {file} has version {shown!r}, this fxlrd reads {VERSION}: another fxlrd wrote it")


def _regular_size(file: Path) -> int:
    """Return a file's size. Raises FxlrdError if it is no regular file: reading that might never end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FxlrdError(f"load: {file} is no file")
    return status.st_size


def check_weights(folder: Path, weights: Weights) -> Path:
    """Return the file of a checkpoint's tensors. Raises FxlrdError if it is missing, or not the plan's."""
    file = weights_file(folder, weights)
    try:
        size = _regular_size(file)
        if size != weights.bytes:
            raise FxlrdError(f"load: {file} has {size:,} bytes and should have {weights.bytes:,}: copy it again")
        digest, _ = hashed(file)
    except FileNotFoundError:
        raise FxlrdError(f"load: {file} is missing") from None
    except OSError as error:
        raise FxlrdError(f"load: {file} cannot be read: {one_line(error)}") from error
    if digest != weights.sha256:
        raise FxlrdError(f"load: {file} is damaged: its checksum is not that of the plan; copy it again")
    return file
