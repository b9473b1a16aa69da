"""hf:DIR: a local folder of Hugging Face as a model, and its compressed counterpart as another one.

Nothing is downloaded, and no code in a folder runs: its class is one of transformers' own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fxlrd.errors import FxlrdError, one_line
from fxlrd.saving.architecture import recall
from fxlrd.saving.from_pretrained import load_pretrained
from fxlrd.saving.pretrained import KEY, read_pretrained

SCHEME = "hf:"
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_TEXT_FILES = {".json", ".txt", ".model", ".jinja", ".bpe", ".vocab", ".tiktoken"}
"""Suffixes of what describes tokenizers, processors and generation."""
_OURS = {"config.json", "plan.json"}


def is_compressed(folder: Path) -> bool:
    """Whether the folder is of a model of transformers that fxlrd has compressed."""
    try:
        return KEY in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def folder_model(text: str) -> nn.Module:
    """Return the model in the folder ``text``, in eval mode and in the dtype of its weights.

    Raises FxlrdError for what is no folder, such as a name on the hub, and for one without a model of transformers.
    """
    folder = checked(text)
    transformers = _transformers()
    if (plan := read_pretrained(folder)) is not None:
        return load_pretrained(folder, plan, None).eval()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        names = getattr(config, "architectures", None) or ["AutoModel"]
        cls = getattr(transformers, str(names[0]), None)
        if cls is None:
            raise FxlrdError(
                f"hf:{text}: transformers {transformers.__version__} has no class {str(names[0])[:80]}, and code in a "
                "folder is never run: load the model in Python and call fxlrd.compress"
            )
        model, loading = cls.from_pretrained(folder, dtype="auto", output_loading_info=True, **_LOCAL)
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"hf:{text}: {one_line(error)}") from error
    if missing := sorted(map(str, loading.get("missing_keys") or ())):
        raise FxlrdError(
            f"hf:{text}: the weights lack {missing[0][:80]} ({len(missing)} such): they are of another model"
        )
    return model.eval()


def checked(text: str) -> Path:
    """Return the folder. Raises FxlrdError, which says what to do, unless it may hold a model of transformers."""
    folder = Path(text).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise FxlrdError(f"hf:{text}: that is a file; name the folder that it is in")
        raise FxlrdError(
            f"hf:{text}: there is no such folder, and nothing is downloaded: name a local folder; a model of the hub "
            f"becomes one by hf download {text} --local-dir {folder.name}"
        )
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise FxlrdError(f"hf:{text}: that is an adapter; merge it into its model, and save that")
    files = sorted(path.name for path in folder.iterdir())
    found = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    raise FxlrdError(f"hf:{text}: config.json is missing, found: {found or 'nothing'}; name a folder with it")


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer in a folder, which can pad."""
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise FxlrdError(
            f"hf:{folder}: its tokenizer cannot be read: {one_line(error)}; put its files (tokenizer.json) there"
        ) from error
    if tokenizer.pad_token is None:  # what pads is masked: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def image_processor_of(folder: Path) -> Callable[..., Any] | None:
    """Return the image processor in a folder, or None if there is none."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        processor: Callable[..., Any] = _transformers().AutoImageProcessor.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise FxlrdError(f"hf:{folder}: its image processor cannot be read: {one_line(error)}") from error
    return processor


def is_language_model(model: nn.Module) -> bool:
    """Whether a model of transformers predicts the next token."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return type(model).__name__ in _classes("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def is_classifier(model: nn.Module) -> bool:
    """Whether a model of transformers tells texts, or images, apart."""
    kinds = ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")
    return any(type(model).__name__ in _classes(kind) for kind in kinds)


def save_folder(model: nn.Module, source: Path, target: Path) -> None:
    """Write a compressed model of transformers as a folder, with the tokenizer's and processor's files of ``source``.

    `fxlrd.load` reads it, as it does the whole of a model of sentence-transformers whose folder ``source`` is.
    """
    origin = recall(model)
    if origin is None or origin.refused is not None or origin.arguments is not None:
        raise FxlrdError(
            f"--save {target}: from_pretrained cannot make this model again: compress it in Python, and fxlrd.save"
        )
    try:
        model.save_pretrained(target)  # type: ignore[operator]
        for path in _beside_model(source):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    except FxlrdError:
        raise
    except Exception as error:
        raise FxlrdError(f"--save {target}: {one_line(error)}") from error


def check_target(source: Path, target: Path | None) -> None:
    """Raise FxlrdError where the compressed model would replace the original."""
    if target is not None and target.resolve() == source.resolve():
        raise FxlrdError(f"--save {target}: the original model is there; name another directory")


def _beside_model(folder: Path) -> list[Path]:
    """Return the files of a folder that describe how its model is used; not the model itself, nor code."""
    own = [
        path
        for path in folder.iterdir()
        if path.suffix in _TEXT_FILES and path.name not in _OURS and not path.name.endswith(".index.json")
    ]
    # The other modules of sentence-transformers, such as 1_Pooling, lie in folders of theirs.
    modules = folder / "modules.json"
    names = [part["path"] for part in json.loads(modules.read_text(encoding="utf-8"))] if modules.is_file() else []
    inside = [path for name in names if name for path in sorted((folder / name).rglob("*")) if path.suffix != ".py"]
    return [path for path in (*own, *inside) if path.is_file() and path.resolve().is_relative_to(folder.resolve())]


def _classes(mapping: str) -> set[str]:
    _transformers()
    from transformers.models.auto import modeling_auto

    return {
        name
        for names in getattr(modeling_auto, mapping, {}).values()
        for name in (names if isinstance(names, (tuple, list)) else (names,))
    }


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise FxlrdError("hf: models need transformers: pip install transformers") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
