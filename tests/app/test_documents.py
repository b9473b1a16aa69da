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


def test_labels_are_found_however_a_table_writes_them(tmp_path):
    (tmp_path / "a.csv").write_text("text, label\ngood,1.0\nbad,0\nneither,\n")
    assert [d.label for d in documents_in(str(tmp_path / "a.csv"), running=False)] == [1, 0, None]
    lines = [{"text": "a", "label": 1.0}, {"text": "b", "label": float("nan"), "class": "x"}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [d.label for d in documents_in(str(tmp_path / "a.jsonl"), running=False)] == [1, "x", None]


def test_a_text_may_be_longer_than_a_field_usually_is(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 2 * before}\n")
    assert len(documents_in(str(tmp_path / "a.csv"), running=False)[0].text) == 2 * before
    assert csv.field_size_limit() == before


def test_files_beside_the_folders_of_classes_are_left_out(tmp_path, capsys):
    for name in ("neg", "pos"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    (tmp_path / "urls.txt").write_text("a\nb\nc")
    found = documents_in(str(tmp_path), running=False)
    assert [d.label for d in found] == ["neg", "neg", "pos", "pos"]
    assert "urls.txt left out: beside the folders of classes" in capsys.readouterr().err


def test_a_table_is_read_whatever_texts_lie_in_folders_beside_it(tmp_path):
    for name in ("docs", "licenses"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a", "label": 1}))
    assert Document("a", 1) in documents_in(str(tmp_path), running=False)


def test_running_text_in_folders_runs_on(tmp_path):
    for name in ("books", "wiki"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.txt").write_text("one\n\ntwo\n")
    assert documents_in(str(tmp_path), running=True) == [Document("one\n\ntwo")] * 2


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
