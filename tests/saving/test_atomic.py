"""Whoever is killed, and whatever fails, leaves the old checkpoint or the new one."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.passes import Decompose
from fxlrd.saving import storage as checkpoint
from fxlrd.saving.load import load
from fxlrd.saving.save import save
from tests.saving.nets import Net, X, compressed, empty, equal

STEPS = ["_hashed", "_synced", "write_whole", "save_file"]


def forked(call):
    """The exit status of a child process that does ``call`` only: torch's threads don't survive a fork, so a model
    that ran there would wait for them forever (which the alarm ends)."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            call()
        finally:
            os._exit(8)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("step", "nth"), [*((s, 0) for s in STEPS), ("_synced", 1), ("_synced", 2), ("unlink", 0)])
def test_whoever_is_killed_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, step, nth, when):
    net = lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU())  # noqa: E731
    old, new = (compressed(net(), torch.ones(2, 16), pipeline=[Decompose(ranks=r)]) for r in (2, 3))
    save(old, tmp_path)
    place = checkpoint.Path if step == "unlink" else checkpoint
    function, calls = getattr(place, step), iter(range(99))

    def killed(*args, **kwargs):
        if next(calls) != nth:
            return function(*args, **kwargs)
        if when == "after":
            function(*args, **kwargs)
        os._exit(7)

    def save_and_die():
        setattr(place, step, killed)
        save(new, tmp_path)

    assert forked(save_and_die) == 7
    loaded = load(tmp_path, empty(net))
    rank = loaded[0].first.out_features
    assert rank in (2, 3)
    assert equal((old if rank == 2 else new).model, loaded, torch.ones(2, 16))
    save(new, tmp_path)
    assert equal(new.model, load(tmp_path, empty(net)), torch.ones(2, 16))
    assert len(list(tmp_path.iterdir())) == 2, "what the killed one left is gone"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
def test_what_a_killed_write_of_tensors_leaves_is_gone_after_the_next_save(tmp_path, monkeypatch):
    def killed(tensors, file):
        file.with_name(".tmp0a1b2c").write_bytes(b"half")  # where safetensors writes before it puts its file in place
        os._exit(7)

    new = compressed(Net())

    def save_and_die():
        monkeypatch.setattr(checkpoint, "save_file", killed)
        save(new, tmp_path)

    assert forked(save_and_die) == 7
    assert any(tmp_path.rglob(".tmp0a1b2c"))
    save(new, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_old_weights_that_may_not_be_removed_are_no_error(tmp_path, monkeypatch):
    save(compressed(Net()), tmp_path)
    new = compressed(Net().eval(), ratio=4)

    def forbidden(*args, **kwargs):  # as in a folder with the sticky bit, of the file of another user
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Path, "unlink", forbidden)
        save(new, tmp_path)
    assert equal(new.model, load(tmp_path, Net()), X)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = compressed(Net()), compressed(Net(), ratio=4)
    save(old, tmp_path)
    kept = sorted(p.name for p in tmp_path.iterdir())

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ["save_file", "write_whole"]:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(FxlrdError, match=r"nothing was changed there: OSError: .*No space left"):
                save(new, tmp_path)
        assert equal(old.model.eval(), load(tmp_path, Net()).eval(), X)
    assert set(kept) <= {p.name for p in tmp_path.iterdir()}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_other_files_are_not_touched(tmp_path):
    for name in ["notes.txt", "weights-mine.safetensors", "model.safetensors"]:
        (tmp_path / name).write_text("mine")
    save(compressed(Net()), tmp_path)
    save(compressed(Net(), ratio=4), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    old, new = compressed(Net()), compressed(Net(), ratio=4)
    save(old, tmp_path)
    first, check = iter([True]), checkpoint._check_file

    def replaced(*args):
        if next(first, False):
            save(new, tmp_path)
        return check(*args)

    monkeypatch.setattr(checkpoint, "_check_file", replaced)
    assert equal(new.model.eval(), load(tmp_path, Net()).eval(), X)
