from __future__ import annotations

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fxlrd.timing.cache import Cache, Entry, Ratio, Setting, cache_folder, signature

CPU = torch.device("cpu")
SETTING = Setting("cpu: some", "2.0", 2, False)
ENTRY = Entry({"original": Ratio(1.0), "rank 16": Ratio(0.5, 0.01)}, Ratio(0.25, 0.02), 5e-4)


def test_cache_round_trip(tmp_path):
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.load(SETTING, "layer") is None
    cache.store(SETTING, "layer", ENTRY)
    assert cache.load(SETTING, "layer") == ENTRY
    other = replace(ENTRY, timings={"rank 8": Ratio(3.0)})
    cache.store(SETTING, "layer", other)
    assert Cache(cache.folder).load(SETTING, "layer") == other
    assert len(list(cache.folder.iterdir())) == 1


def stored(folder):
    cache = Cache(folder)
    cache.store(SETTING, "layer", ENTRY)
    (path,) = folder.iterdir()
    return cache, path


def damaged(change):
    def write(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


def timing(**fields):
    return damaged(lambda c: c["timings"].update(original={"ratio": 1.0, "spread": 0.0, **fields}))


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def huge(path):
    os.truncate(path, 10 * 2**30)  # sparse: no disk is filled


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE = {
    "fifo": fifo,
    "folder": folder,
    "huge": huge,
    "device": device,
    "zero ratio": timing(ratio=0.0),
    "empty": lambda p: p.write_text(""),
    "truncated": lambda p: p.write_text(p.read_text()[:90]),
    "binary": lambda p: p.write_bytes(bytes(range(256))),
    "list": lambda p: p.write_text("[]"),
    "null": lambda p: p.write_text("null"),
    "number": lambda p: p.write_text("3"),
    "nested": lambda p: p.write_text("[" * 100_000),
    "no key": damaged(lambda c: c.pop("key")),
    "other key": damaged(lambda c: c["key"].update(threads=3)),
    "other format": damaged(lambda c: c.update(format=0)),
    "no timings": damaged(lambda c: c.pop("timings")),
    "list of timings": damaged(lambda c: c.update(timings=[1, 2])),
    "timing a number": damaged(lambda c: c["timings"].update(original=1.0)),
    "field missing": damaged(lambda c: c["timings"].update(original={"spread": 1.0})),
    "field unknown": timing(more=1.0),
    "text": timing(ratio="1.0"),
    "none": timing(ratio=None),
    "true": timing(ratio=True),
    "negative": timing(ratio=-1.0),
    "NaN": timing(spread=float("nan")),
    "Inf": timing(ratio=float("inf")),
    "no reference": damaged(lambda c: c.pop("reference")),
    "reference in text": damaged(lambda c: c.update(reference="1.0")),
    "no seconds": damaged(lambda c: c.pop("reference_seconds")),
    "seconds in text": damaged(lambda c: c.update(reference_seconds="1.0")),
    "no time at all": damaged(lambda c: c.update(reference_seconds=0.0)),
    "no ratio at all": damaged(lambda c: c.update(reference={"ratio": 0.0, "spread": 0.0})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_ignored_with_a_warning(tmp_path, damage):
    cache, path = stored(tmp_path)
    damage(path)
    with pytest.warns(UserWarning, match=r"^timing cache: .* is ignored") as caught:
        assert cache.load(SETTING, "layer") is None
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert path.name in str(caught[0].message)


@pytest.mark.parametrize("damage", ["truncated", "binary", "list"])
def test_a_damaged_file_is_replaced(tmp_path, damage):
    cache, path = stored(tmp_path)
    DAMAGE[damage](path)
    cache.store(SETTING, "layer", ENTRY)
    assert cache.load(SETTING, "layer") == ENTRY


@pytest.mark.filterwarnings("error")
def test_a_file_of_the_first_format_is_replaced_without_a_word(tmp_path):
    """It has seconds, and nothing to compare them with those of another minute."""
    cache, path = stored(tmp_path)
    timings = {"original": {"seconds": 2e-3, "ratio": 1.0, "spread": 0.0}}
    path.write_text(json.dumps({"format": 1, "key": json.loads(path.read_text())["key"], "timings": timings}))
    assert cache.load(SETTING, "layer") is None
    cache.store(SETTING, "layer", ENTRY)
    assert cache.load(SETTING, "layer") == ENTRY


def test_a_file_of_another_layer_is_ignored(tmp_path):
    cache, path = stored(tmp_path)
    cache.store(SETTING, "another", ENTRY)
    path.write_text(next(p for p in tmp_path.iterdir() if p != path).read_text())
    with pytest.warns(UserWarning, match="it is about another setting or layer"):
        assert cache.load(SETTING, "layer") is None


def test_a_folder_that_cannot_be_written_is_gone_without(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.warns(UserWarning, match=r"^timing cache: .* cannot be written .*; going on without$") as caught:
        Cache(blocked / "latency").store(SETTING, "layer", ENTRY)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert blocked.read_text() == "no folder"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    cache, path = stored(tmp_path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        cache.store(SETTING, "layer", replace(ENTRY, timings={}))
    assert list(tmp_path.iterdir()) == [path]
    assert cache.load(SETTING, "layer") == ENTRY


@pytest.mark.filterwarnings("error")
def test_writers_at_once_leave_a_whole_file(tmp_path):
    cache, path = stored(tmp_path)
    written = [replace(ENTRY, timings={f"rank {r}": Ratio(r * 1e-3) for r in range(1, 2 + 40 * i)}) for i in range(4)]

    def work(entry):
        for _ in range(15):
            cache.store(SETTING, "layer", entry)
            assert cache.load(SETTING, "layer") in written

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, written))
    assert cache.load(SETTING, "layer") in written
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("error")
def test_keys_differ_by_setting_and_layer(tmp_path):
    cache = Cache(tmp_path)
    settings = [
        SETTING,
        SETTING._replace(device="cuda"),
        SETTING._replace(torch_version="2.1"),
        SETTING._replace(threads=1),
        SETTING._replace(compiled=True),
    ]
    conv, shape = nn.Conv2d(4, 8, 3), (1, 4, 8, 8)
    signatures = [
        signature(conv, shape, torch.float32, "contiguous"),
        signature(conv, shape, torch.bfloat16, "contiguous"),
        signature(conv, shape, torch.float32, "channels_last"),
        signature(conv, (2, 4, 8, 8), torch.float32, "contiguous"),
        signature(nn.Conv2d(4, 8, 3, stride=2), shape, torch.float32, "contiguous"),
        signature(nn.Conv2d(4, 8, 3, bias=False), shape, torch.float32, "contiguous"),
    ]
    keys = list(itertools.product(settings, signatures))
    for i, key in enumerate(keys):
        assert cache.load(*key) is None
        cache.store(*key, replace(ENTRY, reference_seconds=1.0 + i))
    assert [cache.load(*key).reference_seconds for key in keys] == list(range(1, 1 + len(keys)))


def test_setting_of_this_process(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    here = Setting.current(CPU, compiled=True)
    assert here.device.startswith("cpu: ")
    assert here[1:] == (torch.__version__, 3, True)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path))
    assert Cache().folder == tmp_path / "latency"
    monkeypatch.delenv("FXLRD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "fxlrd" / "latency"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "fxlrd" / "latency"


def test_cache_folder_without_a_home(monkeypatch):
    monkeypatch.delenv("FXLRD_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/fxlrd")
