"""Models in ONNX Runtime on a CPU, in fp32 and in int8 (static, QDQ), each for the batch that it is made for."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT = "input"
Call = Callable[[Tensor], Tensor]


def in_onnx_runtime(module: nn.Module, x: Tensor, calibration: Sequence[Tensor] | None = None) -> Call:
    """Return the module as a call of ONNX Runtime; in int8 if there are batches, like ``x``, to measure ranges with."""
    import onnxruntime

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(module, x, Path(folder))
        if calibration is not None:
            path = _quantized(path, calibration)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.contiguous().numpy()})[0])


def _exported(module: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    plain = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    torch.onnx.export(plain, (x.contiguous(),), str(path), dynamo=True, verbose=False, input_names=[INPUT])
    return path


class _Batches:
    """What ONNX Runtime measures ranges with: a batch a call, None after the last."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.contiguous().numpy()}


def _quantized(path: Path, calibration: Sequence[Tensor]) -> Path:
    """Return the file of the quantized model: ONNX Runtime's own steps, convs and matrices with a scale a channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, done = path.with_name("ready.onnx"), path.with_name("int8.onnx")
    quant_pre_process(os.fspath(path), os.fspath(ready))  # BatchNorms into convs
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}  # what VNNI multiplies
    quantize_static(ready, done, _Batches(calibration), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return done
