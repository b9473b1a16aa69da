from __future__ import annotations

import os
from pathlib import Path

import pytest

from fxlrd.files import read_regular


def test_only_regular_files_of_a_size_are_read(tmp_path):
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.write_text("four")
    os.mkfifo(fifo)
    assert read_regular(file, 4) == "four"
    for path, most in ((file, 3), (fifo, 4), (tmp_path, 4), (Path("/dev/zero"), 4)):
        with pytest.raises(OSError, match=r"is no file|more than|directory"):
            read_regular(path, most)
