"""Texts of the user's as the inputs of a model of transformers: read from files, and turned to tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.app.documents import Document
from fxlrd.app.examples import Examples
from fxlrd.app.huggingface import is_classifier, is_language_model
from fxlrd.app.output import warn
from fxlrd.errors import FxlrdError

_LENGTH, _LENGTH_OF_LANGUAGE_MODELS = 128, 256
"""Tokens of an input where --length does not say."""


def length_for(model: nn.Module, length: int | None) -> int:
    """Return how many tokens an input has: ``length``, or a usual number of them that the model takes.

    Raises FxlrdError for more tokens than it has positions.
    """
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if length is None:
        usual = _LENGTH_OF_LANGUAGE_MODELS if is_language_model(model) else _LENGTH
        # RoBERTa's positions begin after the padding token's number.
        return usual if most is None or most > usual + 2 else max(1, most - 2)
    if length < 2:
        raise FxlrdError(f"--length {length}: an input has at least two tokens")
    if most is not None and length > most:
        raise FxlrdError(f"--length {length}: the model has {most} positions")
    return length


def random_ids(model: nn.Module, count: int, length: int) -> Tensor:
    """Return seeded random tokens (count × length)."""
    if count < 1:
        raise FxlrdError(f"--batch {count}: a batch has at least one example")
    config: Any = model.config
    size = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    ids = torch.randint(0, size, (count, length), generator=torch.Generator().manual_seed(0))
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) and 0 <= end < size:
        ids[ids == end] = (end + 1) % size  # a classifier looks for the one end of each text
        ids[:, -1] = end
    return ids


def as_inputs(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Return tokens without padding as the arguments of the model."""
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in names and not is_language_model(model):
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs | _constants(model, ids)


def _constants(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Return what else the call needs: no cache of keys and values, and a start for a decoder."""
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    decodes = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names
    if decodes and not is_classifier(model):  # which shifts the tokens itself
        inputs["decoder_input_ids"] = ids
    return inputs


def sequences(where: str, documents: Sequence[Document], tokenizer: Any, model: nn.Module, length: int) -> Examples:
    """Return running text in sequences of ``length`` tokens, for a model that predicts the next one.

    Documents are separated by the token of their end. What the tokenizer begins a text with, as Gemma needs it, begins
    each sequence.
    """
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = tokenizer("a", verbose=False)["input_ids"][:1]
    start = start if start == [tokenizer.bos_token_id] else []
    for document in documents:
        ids += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] + end
    count = len(ids) // (length - len(start))
    if not count:
        number = f"{len(ids)} tokens, and a sequence {length}"
        raise FxlrdError(f"{where}: its text has {number}: give more text, or a smaller --length")
    running = torch.tensor(ids[: count * (length - len(start))]).view(count, -1)
    table = torch.cat([torch.tensor(start, dtype=running.dtype).expand(count, -1), running], 1)

    def read(numbers: Sequence[int]) -> tuple[Any, Sequence[int]]:
        return as_inputs(model, table[list(numbers)]), numbers

    return Examples(where, "sequences", read, tuple(range(count)))


def texts(where: str, documents: Sequence[Document], tokenizer: Any, model: nn.Module, length: int) -> Examples:
    """Return texts one by one, cut to ``length`` tokens and padded to the longest of their batch."""
    names = inspect.signature(model.forward).parameters

    def read(numbers: Sequence[int]) -> tuple[Any, Sequence[int]]:
        if not numbers:
            return None, numbers
        rows = [documents[number].text for number in numbers]
        encoded = tokenizer(rows, truncation=True, max_length=length, padding=len(rows) > 1, return_tensors="pt")
        inputs = {name: value for name, value in encoded.items() if name in names}
        return inputs | _constants(model, inputs["input_ids"]), numbers

    labels = [document.label for document in documents if document.label is not None]
    if 0 < len(labels) < len(documents):
        first = next(number for number, document in enumerate(documents, 1) if document.label is None)
        warn(f"{where}: classes are not read: text {first} has none ({len(documents) - len(labels)} such)")
    return Examples(where, "texts", read, tuple(range(len(documents))), labels if len(labels) == len(documents) else [])
