"""Atomic writes: a file is complete or does not exist."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name beside it, then rename it; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_regular(path: Path, most: int) -> str:
    """Return the text of a regular file of at most ``most`` bytes.

    Raises OSError for anything else, such as a FIFO, a directory or a device, which might never end, and for a larger
    file; UnicodeDecodeError for what is not UTF-8.
    """
    # Without O_NONBLOCK, to open a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is no file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path} has more than {most:,} bytes")
    return content.decode()


def write_out(path: Path, text: str) -> None:
    """Write to a path that a user chose: atomically to a file, or the one behind a link; also to a device or pipe."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_atomically(path.resolve(), text)
