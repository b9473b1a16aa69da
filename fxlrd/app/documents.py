"""Texts in files: .txt, and .jsonl or .csv with a field of text and perhaps one of its label."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxlrd.app.examples import Class
from fxlrd.app.images import classes_of, files_with, without_strays
from fxlrd.errors import FxlrdError, one_line

SUFFIXES = (".txt", ".jsonl", ".csv")
_TEXT = ("text", "sentence", "content", "review", "document")
_LABEL = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class Document:
    """A text, and its class where that is known."""

    text: str
    label: Class | None = None


def documents_in(where: str, running: bool) -> list[Document]:
    """Return the texts of a file or a folder. Raises FxlrdError for one without any.

    The text of a .txt file is one if it is ``running`` on, and otherwise a text a line. Where subfolders name classes,
    a file is one text; if a class has one file only, its lines are texts.
    """
    path = Path(where)
    files = list(files_with(path, SUFFIXES)) if path.is_dir() else [path]
    if not files:
        raise FxlrdError(f"{where}: there are no texts in it ({', '.join(s[1:] for s in SUFFIXES)})")
    if path.is_dir() and not running and all(file.suffix.lower() == ".txt" for file in files):
        files = without_strays(where, path, files)
    folders = classes_of(where, path, files) if path.is_dir() else []
    if running or len(set(folders)) < 2 or any(file.suffix.lower() != ".txt" for file in files):
        folders = []
    found: list[Document] = []
    for i, file in enumerate(files):
        label = folders[i] if folders else None
        lines = folders.count(folders[i]) == 1 if folders else not running
        found += _documents(file, label, lines)
    if not found:
        raise FxlrdError(f"{where}: its files hold no text")
    return found


def _documents(file: Path, label: str | None, lines: bool) -> Iterator[Document]:
    text, suffix = _read(file), file.suffix.lower()
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _record(f"{file}, line {number}", _json(f"{file}, line {number}", line))
    elif suffix == ".csv":
        for number, row in enumerate(_rows(file, text), 2):
            yield _record(f"{file}, row {number}", row)
    else:
        yield from (Document(part.strip(), label) for part in (text.splitlines() if lines else [text]) if part.strip())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FxlrdError(f"{file}: it is not UTF-8 (byte {error.start}): convert it") from error
    except OSError as error:
        raise FxlrdError(f"{file}: {one_line(error)}") from error


def _rows(file: Path, text: str) -> list[dict[str, Any]]:
    most = csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a text may be longer than the usual limit
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise FxlrdError(f"{file}: {one_line(error)}") from error
    finally:
        csv.field_size_limit(most)


def _json(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise FxlrdError(f"{where}: {one_line(error)}") from error


def _record(where: str, record: Any) -> Document:
    fields = {str(key).strip().lower(): value for key, value in record.items()} if isinstance(record, Mapping) else {}
    text = next((fields[name] for name in _TEXT if isinstance(fields.get(name), str)), None)
    if text is None:
        names = ", ".join(list(fields)[:5]) or type(record).__name__
        raise FxlrdError(f"{where}: there is no field text, found: {names}; name it text")
    return Document(text, next((label for name in _LABEL if (label := _class(fields.get(name))) is not None), None))


def _class(value: Any) -> Class | None:
    """Return a label; 1.0 is 1, as a table writes it in which some are missing."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        value = value.strip()
        whole = re.fullmatch(r"(\d+)(\.0+)?", value)
        return int(whole[1]) if whole else value or None
    return value if isinstance(value, int) else None
