"""Files of a checkpoint: written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fxlrd.errors import FxlrdError, one_line
from fxlrd.files import write_whole
from fxlrd.saving.schema import _LARGEST_PLAN, PLAN, _check, _checksum, _regular

_OURS = re.compile(r"\.weights-[0-9a-f]{16}|weights-[0-9a-f]{16}\.safetensors|\.plan\.json\.\d+\.[0-9a-f]{8}")
_CHUNK = 2**22


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


def _weights(digest: str) -> str:
    return f"weights-{digest[:16]}.safetensors"


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
