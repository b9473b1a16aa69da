"""transformers' own from_pretrained, of what ``save_pretrained`` of a compressed model wrote.

transformers lets packages put layers of their own into a model before it reads the weights: it calls them quantizers,
and finds them by the entry quantization_config of config.json. Where nothing is registered under the name there, it
goes on with a warning; the name of weights in config.json, which is a sentence (fxlrd/saving/pretrained.py), then stops
it. So it is in processes that have not used fxlrd since transformers was imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fxlrd.errors import FxlrdError
from fxlrd.saving.prepared import finish, prepare
from fxlrd.saving.pretrained import METHOD, take_plan


def register() -> None:
    """Take part in from_pretrained, where transformers is imported and its version lets others do so."""
    auto = sys.modules.get("transformers.quantizers.auto")
    if auto is None or METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    try:
        from transformers.quantizers.base import HfQuantizer
        from transformers.utils.quantization_config import QuantizationConfigMixin

        auto.register_quantization_config(METHOD)(_configuration(QuantizationConfigMixin))
        auto.register_quantizer(METHOD)(_quantizer(HfQuantizer))
    except (ImportError, AttributeError):  # another version: the sentence stops it
        return


def _configuration(base: Any) -> Any:
    class FxlrdConfig(base):
        """That fxlrd made the layers; which, is said beside."""

        def __init__(self, **_: Any) -> None:
            super().__init__(METHOD)

    return FxlrdConfig


def _quantizer(base: Any) -> Any:
    class FxlrdLayers(base):
        """Puts the layers that fxlrd made into a model, before its weights are read."""

        plan: Any = None
        prepared: Any = None

        def update_attn_implementation(self, config: Any) -> Any:
            """Read the plan and the config's own entries out of it: transformers looks for weights after this."""
            self.plan = take_plan(config)
            return config

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            if self.plan is None:
                raise FxlrdError("from_pretrained: config.json has no plan of the layers: save the model again")
            self.prepared = prepare(Path(str(model.config._name_or_path)), self.plan, model)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            self.remove_quantization_config(model)
            vars(model).pop("is_quantized", None)
            for module in model.modules():
                if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                    del module.config._is_quantized
            finish(model, self.plan, self.prepared)
            return model

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return FxlrdLayers
