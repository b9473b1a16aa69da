from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxlrd.timing import clock as latency
from fxlrd.timing.cache import Cache, Setting, cache_folder, example, signature
from fxlrd.timing.clock import Timing, compare
from fxlrd.timing.inductor import compiled

CPU = torch.device("cpu")
SETTING = Setting("cpu: some", "2.0", 2, False)
TIMINGS = {"original": Timing(2e-3), "rank 16": Timing(1e-3, 0.5, 0.01)}


class Clock:
    """A clock that moves only when a fake callable runs, and remembers which ran."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.ran = []
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def call(self, name, cost):
        def run():
            self.now += cost(len(self.ran)) if callable(cost) else cost
            self.ran.append(name)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_faster_than_the_reference_only_beyond_the_noise():
    assert Timing(1.0, 0.9, 0.05).faster()
    assert not Timing(1.0, 0.95, 0.05).faster()
    assert not Timing(1.0, 0.99, 0.05).faster()
    assert not Timing(1.0).faster()
    assert not Timing(1.0, 1.2, 0.0).faster()


def test_faster_than_another_only_beyond_the_noise_of_both():
    other = Timing(1.0, 0.9, 0.04)
    assert Timing(1.0, 0.84, 0.03).faster(other)
    assert not Timing(1.0, 0.86, 0.03).faster(other)
    assert not other.faster(Timing(1.0, 0.84, 0.03))
    assert not other.faster(other)


def test_compare_measures_ratios_to_the_first(clock):
    found = compare({"a": clock.call("a", 1e-3), "b": clock.call("b", 2e-3)}, CPU)
    assert list(found) == ["a", "b"]
    assert (found["a"].seconds, found["b"].seconds) == pytest.approx((1e-3, 2e-3), rel=1e-9)
    assert (found["a"].ratio, found["b"].ratio) == pytest.approx((1, 2), rel=1e-9)
    assert (found["a"].spread, found["b"].spread) == pytest.approx((0, 0), abs=1e-9)


def test_compare_interleaves_and_alternates(clock):
    compare({"a": clock.call("a", 1e-3), "b": clock.call("b", 1e-3), "c": clock.call("c", 1e-3)}, CPU)
    assert clock.ran[:9] == [*"aaabbbccc"]
    rounds = ["".join(clock.ran[i : i + 6]) for i in range(9, len(clock.ran), 6)]
    assert rounds == ["aabbcc", "ccbbaa"] * 3 + ["aabbcc"]


def test_a_drift_of_the_machine_leaves_the_ratios(clock):
    def drifting(cost):
        return lambda ran: cost * (1 + (max(0, ran - 6) // 4) ** 2)  # four calls a round after six to warm up

    found = compare({"a": clock.call("a", drifting(1e-3)), "b": clock.call("b", drifting(3e-3))}, CPU)
    assert found["b"].ratio == pytest.approx(3, rel=1e-9)
    assert found["b"].spread == pytest.approx(0, abs=1e-9)
    assert found["a"].seconds == pytest.approx(1e-2, rel=1e-9)  # the middle one of seven rounds: 1 + 3²


def test_short_calls_are_repeated_within_a_sample(clock):
    found = compare({"a": clock.call("a", 1e-4), "b": clock.call("b", 1e-3)}, CPU)
    assert found["a"].seconds == pytest.approx(1e-4, rel=1e-9)
    assert found["b"].ratio == pytest.approx(10, rel=1e-9)
    assert clock.ran.count("a") == 3 + 7 * (1 + 5)
    assert clock.ran.count("b") == 3 + 7 * (1 + 1)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 7), (0.0605, 11), (1e9, 60)])
def test_noise_goes_on_to_the_limit(clock, seconds, rounds):
    def noisy(_):  # 1, 2, 3, 1, … milliseconds, each for both calls of a round
        return 1e-3 * (1 + (clock.ran.count("b") - 3) // 2 % 3)

    found = compare({"a": clock.call("a", 1e-3), "b": clock.call("b", noisy)}, CPU, seconds=seconds)
    assert clock.ran.count("a") == 3 + 2 * rounds
    assert found["a"].spread == 0
    assert found["b"].spread > latency.SPREAD * found["b"].ratio


def test_spread_is_the_interval_of_a_median():
    found = latency._timing([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (found.seconds, found.ratio) == (3, 3)
    assert found.spread == pytest.approx(1.96 * 1.2533 * 1.4826 * 1 / 5**0.5, rel=1e-12)


def test_cache_round_trip(tmp_path):
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.load(SETTING, "layer") == {}
    cache.store(SETTING, "layer", TIMINGS)
    assert cache.load(SETTING, "layer") == TIMINGS
    cache.store(SETTING, "layer", {"rank 8": Timing(3e-3)})
    assert Cache(cache.folder).load(SETTING, "layer") == {"rank 8": Timing(3e-3)}
    assert len(list(cache.folder.iterdir())) == 1


def stored(folder):
    cache = Cache(folder)
    cache.store(SETTING, "layer", TIMINGS)
    (path,) = folder.iterdir()
    return cache, path


def damaged(change):
    def write(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


def timing(**fields):
    return damaged(lambda c: c["timings"].update(original={"seconds": 1.0, "ratio": 1.0, "spread": 0.0, **fields}))


DAMAGE = {
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
    "field missing": damaged(lambda c: c["timings"].update(original={"ratio": 1.0})),
    "field unknown": timing(more=1.0),
    "text": timing(seconds="1.0"),
    "none": timing(seconds=None),
    "true": timing(seconds=True),
    "negative": timing(seconds=-1.0),
    "NaN": timing(spread=float("nan")),
    "Inf": timing(ratio=float("inf")),
    "folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_ignored_with_a_warning(tmp_path, damage):
    cache, path = stored(tmp_path)
    damage(path)
    with pytest.warns(UserWarning, match=r"^timing cache: .* is ignored") as caught:
        assert cache.load(SETTING, "layer") == {}
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert path.name in str(caught[0].message)


@pytest.mark.parametrize("damage", ["truncated", "binary", "list"])
def test_a_damaged_file_is_replaced(tmp_path, damage):
    cache, path = stored(tmp_path)
    DAMAGE[damage](path)
    cache.store(SETTING, "layer", TIMINGS)
    assert cache.load(SETTING, "layer") == TIMINGS


def test_a_file_of_another_layer_is_ignored(tmp_path):
    cache, path = stored(tmp_path)
    cache.store(SETTING, "another", TIMINGS)
    path.write_text(next(p for p in tmp_path.iterdir() if p != path).read_text())
    with pytest.warns(UserWarning, match="it is about another setting or layer"):
        assert cache.load(SETTING, "layer") == {}


def test_a_folder_that_cannot_be_written_is_gone_without(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.warns(UserWarning, match=r"^timing cache: .* cannot be written .*; going on without$") as caught:
        Cache(blocked / "latency").store(SETTING, "layer", TIMINGS)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert blocked.read_text() == "no folder"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    cache, path = stored(tmp_path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        cache.store(SETTING, "layer", {})
    assert list(tmp_path.iterdir()) == [path]
    assert cache.load(SETTING, "layer") == TIMINGS


@pytest.mark.filterwarnings("error")
def test_writers_at_once_leave_a_whole_file(tmp_path):
    cache, path = stored(tmp_path)
    written = [{f"rank {r}": Timing(r * 1e-3) for r in range(1, 2 + 40 * i)} for i in range(4)]

    def work(timings):
        for _ in range(15):
            cache.store(SETTING, "layer", timings)
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
        assert cache.load(*key) == {}
        cache.store(*key, {"original": Timing(float(i))})
    assert [cache.load(*key)["original"].seconds for key in keys] == list(range(len(keys)))


def test_setting_of_this_process(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    here = Setting.here(CPU, compiled=True)
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


def test_example_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    x = example((2, 3, 4, 5), torch.bfloat16, "channels_last", CPU)
    assert (x.shape, x.dtype) == ((2, 3, 4, 5), torch.bfloat16)
    assert x.is_contiguous(memory_format=torch.channels_last)
    y = example((2, 3, 4, 5), torch.bfloat16, "contiguous", CPU)
    assert y.is_contiguous()
    assert torch.equal(x, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_has_a_code_object_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda gm: asked.append(gm) or gm)
    module = nn.Sequential(nn.Linear(4, 4)).eval()
    calls = [compiled(module) for _ in range(2)]
    assert type(asked[0]).forward.__code__ is not type(asked[1]).forward.__code__
    x = torch.randn(2, 4)
    assert all(torch.equal(call(x), module(x)) for call in calls)


@pytest.mark.slow
def test_compiled_really_freezes_the_weights():
    module, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    call = compiled(module)
    with torch.no_grad():
        before = call(x)
        module[0].weight.zero_()
        assert torch.equal(call(x), before), "the weights are constants of the compiled code"
    assert not torch._inductor.config.freezing


def test_cache_folder_without_a_home(monkeypatch):
    monkeypatch.delenv("FXLRD_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/fxlrd")
