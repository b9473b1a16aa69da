"""Texts in files."""

from __future__ import annotations

import json

import pytest

from fxlrd import FxlrdError
from fxlrd.app.documents import Document, documents_in


def test_a_text_file_is_a_text_a_line_or_runs_on(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert documents_in(str(tmp_path), running=False) == [Document("one"), Document("two")]
    assert documents_in(str(tmp_path / "a.txt"), running=True) == [Document("one\n\ntwo")]


def test_folders_name_classes(tmp_path):
    for name, files in {"neg": {"0": "bad\nvery", "1": "worse"}, "pos": {"all": "good\nbetter"}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / f"{file}.txt").write_text(text)
    found = documents_in(str(tmp_path), running=False)
    assert [(d.text, d.label) for d in found] == [
        ("bad\nvery", "neg"), ("worse", "neg"), ("good", "pos"), ("better", "pos"),
    ]  # fmt: skip


def test_fields_of_text_and_label(tmp_path):
    lines = [{"text": "a", "label": 1}, {"Text": "b", "label": "0"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert documents_in(str(tmp_path / "a.jsonl"), running=False) == [Document("a", 1), Document("b", 0)]
    (tmp_path / "a.csv").write_text('sentence,label\n"a, b",good\n')
    assert documents_in(str(tmp_path / "a.csv"), running=False) == [Document("a, b", "good")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "there are no texts in it"),
        ("a.txt", b" \n", "its files hold no text"),
        ("a.txt", b"\xff\xfe", r"a\.txt: it is not UTF-8 \(byte 0\): convert it"),
        ("a.csv", b"x,y\n1,2\n", r"a\.csv, row 2: there is no field text, found: x, y; name it text"),
        ("a.jsonl", b'{"text": "a"}\n[1]', r"a\.jsonl, line 2: there is no field text, found: list"),
        ("a.jsonl", b"text", r"a\.jsonl, line 1: JSONDecodeError"),
    ],
)
def test_what_holds_no_text(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FxlrdError, match=message):
        documents_in(str(tmp_path), running=False)
