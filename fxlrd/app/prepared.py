"""What the options of a command ask for, made ready: the model, inputs, and the user's examples for each purpose."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxlrd.app import texts
from fxlrd.app.documents import SUFFIXES as TEXT_SUFFIXES
from fxlrd.app.documents import documents_in
from fxlrd.app.evaluation import Measure, measure_for, outputs_of
from fxlrd.app.examples import Examples
from fxlrd.app.huggingface import is_language_model, tokenizer_of
from fxlrd.app.images import images_in
from fxlrd.app.inputs import calibration_for
from fxlrd.app.labels import labels_of
from fxlrd.app.output import warn
from fxlrd.app.subject import Subject, subject_of
from fxlrd.app.training import check_trainable, check_training
from fxlrd.errors import FxlrdError

_CALIBRATION = {"images": 512, "texts": 512, "sequences": 128}
"""Examples that calibration reads, where --examples does not say."""
_HELD_OUT = {"images": 1000, "texts": 1000, "sequences": 128}
"""Examples held out at most, where --eval names none."""
_BATCH = {"images": 32, "texts": 16, "sequences": 4}
"""Examples that are read at a time, where --batch is 1."""
_CHOSEN_FROM = 64
"""Texts of which the longest are timed."""


@dataclass(frozen=True)
class Prepared:
    """What a command works with.

    Attributes:
        subject: the model.
        x: inputs for it, which are timed.
        calibration: batches of inputs, or None.
        measure: what measures models on examples that no fit has seen, or None.
        training: labelled examples, or running text, to train on, or None.
        size: how many of them are read at a time.
    """

    subject: Subject
    x: Any
    calibration: list[Any] | None
    measure: Measure | None
    training: Examples | None
    size: int


def prepared(options: argparse.Namespace, calibrates: bool = False) -> Prepared:
    """Return what the options ask for. Examples to train on serve for calibration too, if a pass ``calibrates``."""
    data, evaluation, training = (getattr(options, name, None) for name in ("calibration", "eval", "finetune"))
    check(options)
    subject = subject_of(options.model, options)
    examples = None if data is None or is_tensors(data) else _examples(data, subject)
    to_train = None if training is None else _labelled("--finetune", _examples(training, subject), subject)
    if to_train is not None:
        check_trainable(subject.model, to_train, options.distill)
    held_out = None if evaluation is None else _labelled("--eval", _examples(evaluation, subject), subject)
    if held_out is None and to_train is not None:
        to_train, held_out = _split(to_train)
    if _same(data, training) or (data is None and calibrates):
        examples = to_train
    elif held_out is None and examples is not None and _measures(options):
        examples, held_out = _split(examples)
        held_out = _labelled_if_told(held_out, subject)
    noun = next((e.noun for e in (examples, to_train, held_out) if e is not None), "images")
    size = options.batch if options.batch > 1 else _BATCH[noun]
    x = _example(subject, examples or to_train or held_out)
    calibration = _calibration(data, examples, x, subject, size)
    measure = None if held_out is None else measure_for(subject.model, held_out, size)
    if evaluation is not None and measure is None:
        raise FxlrdError(f"--eval {evaluation}: a {type(subject.model).__name__} gives no scores of classes to compare")
    return Prepared(subject, x, calibration, measure, to_train, size)


def check(options: argparse.Namespace) -> None:
    """Raise FxlrdError for options that what is asked for does not read."""
    data, evaluation, training = (getattr(options, name, None) for name in ("calibration", "eval", "finetune"))
    folders = [where for where in (data, evaluation, training) if where is not None and not is_tensors(where)]
    for option, where in (("--calibration", data), ("--eval", evaluation), ("--finetune", training)):
        absent = where is not None and not os.path.exists(where)
        if (where in folders and absent) or (option != "--calibration" and where is not None and where not in folders):
            kinds = f"a folder of images or texts, or a file of texts ({', '.join(TEXT_SUFFIXES)})"
            raise FxlrdError(f"{option} {where}: {'it does not exist; ' if absent else ''}give {kinds}")
    if evaluation is not None and (_same(evaluation, data) or _same(evaluation, training)):
        raise FxlrdError(f"--eval {evaluation}: the same examples are fitted to; leave --eval out, a part is held out")
    for name in ("mean", "std", "examples"):
        if getattr(options, name, None) is not None and not folders:
            raise FxlrdError(f"--{name}: that is for a folder of examples; give --calibration DIR")
    for name in ("epochs", "lr", "distill"):
        if getattr(options, name, None) is not None and training is None:
            raise FxlrdError(f"--{name}: that is for training; give --finetune DIR")
    if getattr(options, "examples", None) is not None and options.examples < 1:
        raise FxlrdError(f"--examples {options.examples}: at least one is needed")
    if training is not None:
        check_training(options)


def _measures(options: argparse.Namespace) -> bool:
    """Whether the command measures on examples held out: not by a function of the user's."""
    return hasattr(options, "eval") and getattr(options, "evaluate", None) is None


def is_tensors(where: str) -> bool:
    """Whether --calibration names random inputs or a file of tensors, not examples."""
    return where == "random" or (not os.path.isdir(where) and not where.lower().endswith(TEXT_SUFFIXES))


def _same(a: str | None, b: str | None) -> bool:
    return a is not None and b is not None and os.path.realpath(a) == os.path.realpath(b)


def _examples(where: str, subject: Subject) -> Examples:
    """Return the user's examples as the model takes them, in an order of no meaning; running text as it runs."""
    if not subject.reads_text:
        if not os.path.isdir(where):
            raise FxlrdError(f"{where}: the model takes images, give a folder of them")
        images = images_in(where, subject.prepare())
        return _placed(images, subject.inputs).shuffled()
    if subject.options.mean is not None or subject.options.std is not None:
        raise FxlrdError("--mean and --std are for images; the model reads text")
    assert subject.folder is not None
    running = is_language_model(subject.model)
    documents, tokenizer = documents_in(where, running), tokenizer_of(subject.folder)
    if not running:
        config: Any = subject.model.config
        if getattr(config, "pad_token_id", 0) is None:  # a decoder finds the end of each text by it
            config.pad_token_id = tokenizer.pad_token_id
        found = texts.texts(where, documents, tokenizer, subject.model, subject.length())
        return _placed(found, subject.placed).shuffled()
    return _placed(texts.sequences(where, documents, tokenizer, subject.model, subject.length()), subject.placed)


def _placed(examples: Examples, place: Any) -> Examples:
    def read(numbers: Any) -> Any:
        inputs, numbers = examples.read(numbers)
        return (place(inputs) if numbers else None), numbers

    return replace(examples, read=read)


def _split(examples: Examples) -> tuple[Examples, Examples]:
    """Return the examples to fit to and those that are held out; of running text the end."""
    fitted, held_out = examples.split()
    if not len(held_out):
        few = f"{len(examples)} {examples.noun} are too few to hold some out and measure on"
        warn(f"{examples.where}: {few}: give --eval DATA, or ten at least")
    return fitted, held_out.first(_HELD_OUT[examples.noun])


def _labelled(option: str, examples: Examples, subject: Subject) -> Examples:
    """Return examples with the numbers of the outputs that stand for their classes, if they have any."""
    if not examples.classes:
        return examples
    count = outputs_of(subject.model, examples)
    if count is None:
        raise FxlrdError(f"{option} {examples.where}: the model's outputs are no scores of classes")
    labels, note = labels_of(f"{option} {examples.where}", examples.classes, count, subject.class_names(count))
    if note:
        warn(note)
    return replace(examples, labels=labels)


def _labelled_if_told(examples: Examples, subject: Subject) -> Examples:
    """Return examples for calibration with labels where their classes are the model's."""
    try:
        return _labelled("--calibration", examples, subject) if len(examples) else examples
    except FxlrdError as error:
        warn(f"classes are not compared: {error}")
        return examples


def _example(subject: Subject, examples: Examples | None) -> Any:
    """Return inputs of the user's, --batch of them: of texts of unlike lengths the longest; else random ones."""
    if examples is None:
        return subject.example()
    count = subject.options.batch
    if count < 1:
        raise FxlrdError(f"--batch {count}: a batch has at least one example")
    numbers = examples.numbers[: max(count, _CHOSEN_FROM)] if examples.noun == "texts" else examples.numbers
    if examples.noun == "texts":
        numbers = tuple(sorted(numbers, key=lambda n: -examples.read([n])[0]["input_ids"].shape[1]))
    for start in range(0, len(numbers), count):
        x, read = examples.read(numbers[start : start + count])
        if len(read) == count:
            return x
    number = f"{len(examples)} {examples.noun}"
    raise FxlrdError(f"--batch {count}: {examples.where} has {number}: give more, or a smaller batch")


def _calibration(data: str | None, examples: Examples | None, x: Any, subject: Subject, size: int) -> list[Any] | None:
    if examples is not None:
        count = subject.options.examples or _CALIBRATION[examples.noun]
        return [inputs for inputs, _ in examples.spread(count).batches(size)]
    if data is None:
        return None
    if isinstance(x, Tensor):
        return list(calibration_for(data, subject.options.batch, x))
    main, others = next(iter(x.items())), dict(list(x.items())[1:])
    return [{main[0]: part, **_like(part, others)} for part in calibration_for(data, subject.options.batch, main[1])]


def _like(part: Tensor, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return masks, kinds of tokens and the start of a decoder for other tokens."""
    return {
        name: part if name == "decoder_input_ids" else value[: len(part)] if isinstance(value, Tensor) else value
        for name, value in others.items()
    }
